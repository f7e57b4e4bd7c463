"""Every test leaves the process as it found it, and says loudly what it could not do here."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from support import leaks, privileges

# `--hypothesis-profile=soak` tries for hours; the kernel matrix, where everything is slow, takes "emulated".
hypothesis.settings.register_profile("soak", max_examples=20_000, deadline=None)
hypothesis.settings.register_profile("emulated", max_examples=6, deadline=None, derandomize=True)

_failed = pytest.StashKey[bool]()
_not_run = pytest.StashKey[dict[str, list[str]]]()
_private = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a temporary folder of its own: what stays in it after a test was left by that test."""
    folder = Path(tempfile.mkdtemp(prefix="userfault-tests-"))
    config.stash[_private] = folder
    config.stash[_not_run] = {}
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def pytest_collection_finish() -> None:
    """Take what collecting made out of the garbage collections that the leak check makes before and after each test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_private], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this process may not do, with the reason."""
    missing = {}
    if item.get_closest_marker("needs_kernel_faults"):
        missing["kernel-mode page faults (docs/privileges.md)"] = privileges.kernel_faults_missing()
    if marker := item.get_closest_marker("needs_privilege"):
        missing[marker.args[0]] = privileges.root_missing()
    for what, why in missing.items():
        if why is not None:
            item.config.stash[_not_run].setdefault(f"needs {what}: {why}", []).append(item.nodeid)
            pytest.skip(f"needs {what}: {why}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, tests in config.stash[_not_run].items():
        terminalreporter.write_line(f"NOT RUN HERE: {len(tests)} tests, {reason}", yellow=True, bold=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[_failed] = report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that passed but left a thread, descriptor, process, mapping or temporary file.

    A test that failed, or was interrupted, is left alone: its traceback holds its arrays.
    """
    leaks.warm_up()
    before = leaks.Holdings.now()
    yield
    if request.node.stash.get(_failed, True):
        return
    left = leaks.leaks_since(before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)
