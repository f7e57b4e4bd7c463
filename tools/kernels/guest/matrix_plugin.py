"""A pytest plugin that tells of collection and of each test, as lines of JSON in the file that MATRIX_EVENTS names.

Used twice: on this machine with --collect-only, to know what must run inside, and inside. A byte of the serial line is
a call into the emulator, so a test that the file of MATRIX_IDS lists is told by its number, and passing says little.
"""

from __future__ import annotations

import gc
import json
import os
from typing import TextIO

import pytest


class Teller:
    """Writes the events of one session."""

    def __init__(self, path: str, ids: str | None) -> None:
        # Open for the whole session: the tests' check for leaks compares before and after each test. And nobody's
        # controlling terminal, which would be hung up at the end of pytest.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
        self.file: TextIO = os.fdopen(os.open(path, flags, 0o644), "w", encoding="ascii", buffering=1)
        self.ids: list[str] = []
        if ids is not None:
            with open(ids, encoding="utf-8") as file:
                self.ids = json.load(file)
        self.numbers = {id: number for number, id in enumerate(self.ids)}
        self.forget()

    def forget(self) -> None:
        """Begin with the next test."""
        self.outcome, self.seconds, self.reason, self.text = "passed", 0.0, "", ""

    def say(self, *event: object) -> None:
        """Write one event."""
        self.file.write(json.dumps(event, separators=(",", ":")) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.say("uncollected", report.nodeid, report.outcome, _reason(report), report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        ids = [item.nodeid for item in session.items]
        if ids != self.ids:
            self.say("collected", ids)
        # The check for leaks collects garbage after every test. What was imported is none: without it a collection
        # takes a hundredth of the time, which under emulation was most of the time of most tests.
        gc.collect()
        gc.freeze()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.forget()
        self.say("begin", self.numbers.get(nodeid, nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Make one outcome of setup, call and teardown: the worst."""
        self.seconds += report.duration
        if report.failed:
            self.outcome = "failed" if report.when == "call" else "error"
            self.text += report.longreprtext
        elif report.skipped and self.outcome == "passed":
            self.outcome, self.reason = (
                ("xfailed", report.wasxfail) if hasattr(report, "wasxfail") else ("skipped", _reason(report))
            )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        more = (self.reason, self.text) if self.outcome != "passed" else ()
        self.say("end", self.numbers.get(nodeid, nodeid), self.outcome, round(self.seconds, 3), *more)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.say("finish", int(exitstatus))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(
        Teller(os.environ["MATRIX_EVENTS"], os.environ.get("MATRIX_IDS")), "matrix-teller"
    )


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return why it was skipped."""
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    return said.removeprefix("Skipped: ")
