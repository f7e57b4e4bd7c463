"""What all test processes of a machine share, and one may change at a time: pytest-xdist runs several."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

KSM = Path("/sys/kernel/mm/ksm")

_held: set[Path] = set()


@contextlib.contextmanager
def exclusively(setting: Path) -> Iterator[None]:
    """Keep the other test processes from changing the setting that this file of the kernel's is, until the end."""
    if setting in _held:
        yield
        return
    with setting.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held.add(setting)
        try:
            yield
        finally:
            _held.remove(setting)


@contextlib.contextmanager
def merging() -> Iterator[None]:
    """Have KSM run, fast; skip where it cannot be had."""
    if not os.access(KSM / "run", os.W_OK):
        pytest.skip("needs KSM, and root to start it")
    with exclusively(KSM / "run"):
        if int((KSM / "pages_shared").read_text()):
            # Virtual machines, for example: to go over their memory takes minutes.
            pytest.skip("needs KSM that nobody else uses")
        wanted = {"pages_to_scan": "100000", "sleep_millisecs": "1", "run": "1"}
        before = {name: (KSM / name).read_text() for name in wanted}
        for name, value in wanted.items():
            (KSM / name).write_text(value)
        try:
            yield
        finally:
            for name, value in before.items():
                (KSM / name).write_text(value)
