"""What one machine said: its events (written by `guest/`) read into tests, programs and troubles.

An event is a JSON array: what happened, and the facts. See the methods below.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

FAILED, ERROR, PASSED, SKIPPED, XFAILED = "failed", "error", "passed", "skipped", "xfailed"
NOT_AN_EVENT = (ValueError, LookupError, TypeError, AttributeError)  # what reading another line raises
SKIPS_ITSELF = 77  # exit code of an engine test that cannot run here


@dataclass(slots=True)
class Outcome:
    """How a test or a test program went."""

    outcome: str = PASSED
    seconds: float = 0.0
    reason: str = ""
    text: str = ""


@dataclass(slots=True)
class Results:
    """Everything that a run has said so far.

    Attributes:
        expected: The ids of the tests to be run, as they were collected outside: events name a test by its number here.
    """

    expected: list[str] = field(default_factory=list)
    release: str = ""
    boot_s: float = 0.0
    collected: list[str] | None = None
    tests: dict[str, Outcome] = field(default_factory=dict)
    programs: dict[str, Outcome] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    step: str = ""
    running: str = ""
    exit_status: int | None = None
    troubles: list[str] = field(default_factory=list)
    ended: bool = False

    def feed(self, line: str) -> str | None:
        """Take one event; return a line about it if it is worth one while others wait.

        What is no event raises one of `NOT_AN_EVENT`.
        """
        what, *facts = json.loads(line)
        said = getattr(self, f"_on_{what.replace('-', '_')}")(*facts)
        return said if isinstance(said, str) else None

    def skips(self) -> dict[str, list[str]]:
        """Return what did not run, by reason: ids of tests, names of programs."""
        found: dict[str, list[str]] = {}
        for name, outcome in [*self.tests.items(), *self.programs.items()]:
            if outcome.outcome == SKIPPED:
                found.setdefault(outcome.reason, []).append(name)
            elif outcome.outcome == XFAILED:
                found.setdefault(f"xfail: {outcome.reason}", []).append(name)
        return found

    def failures(self) -> dict[str, str]:
        """Return what failed, with what it said."""
        everything = [*self.tests.items(), *self.programs.items()]
        return {name: outcome.text for name, outcome in everything if outcome.outcome in (FAILED, ERROR)}

    # --- the events

    def _on_boot(self, release: str, seconds: float) -> str:
        self.release, self.boot_s = release, seconds
        return f"Linux {release} is up"

    def _on_step(self, name: str) -> None:
        self.step = name

    def _on_step_end(self, name: str, code: int | None, seconds: float) -> str:
        self.steps[name] = seconds
        of = self.programs
        if name == "pytest":
            of = self.tests
            self._check_end_of_pytest(code)
        self.step = self.running = ""
        return f"{name} {seconds:.0f} s: {count(of.values())}"

    def _on_uncollected(self, id: str, outcome: str, reason: str, text: str) -> None:
        if outcome == SKIPPED:
            self.tests[id] = Outcome(SKIPPED, reason=reason)
        else:
            self.troubles.append(f"{id} could not be collected:\n{text}")

    def _on_collected(self, ids: list[str]) -> None:
        self.collected = ids

    def _on_begin(self, test: int | str) -> None:
        self.running = self._id(test)

    def _on_end(
        self, test: int | str, outcome: str, seconds: float, reason: str = "", text: str = ""
    ) -> None:
        self.tests[self._id(test)] = Outcome(outcome, seconds, reason, text)
        self.running = ""

    def _on_finish(self, exit_status: int) -> None:
        self.exit_status = exit_status

    def _on_program(self, name: str) -> None:
        self.running = name

    def _on_program_end(self, name: str, code: int | None, seconds: float, said: str) -> None:
        self.running = ""
        program = self.programs[name] = Outcome(seconds=seconds, text=said)
        if code == SKIPS_ITSELF:
            last = said.strip().rpartition("\n")[2]
            program.outcome, program.reason = SKIPPED, f"{name}: {last}"
        elif code != 0:
            program.outcome, program.text = FAILED, f"{_how(code)}\n{said}"

    def _on_off(self) -> None:
        self.ended = True

    def _id(self, test: int | str) -> str:
        return self.expected[test] if isinstance(test, int) else test

    def _check_end_of_pytest(self, code: int | None) -> None:
        if self.exit_status is None:
            during = f" while {self.running} was running" if self.running else ""
            self.troubles.append(f"pytest broke off{during} ({_how(code)}); the console has what it said")
        elif code not in (0, 1):
            self.troubles.append(f"pytest: {_how(code)}; the console has what it said")


def count(outcomes: Iterable[Outcome]) -> str:
    """Return how many there are of each kind, as text."""
    counted = Counter(outcome.outcome for outcome in outcomes)
    return ", ".join(f"{number} {what}" for what, number in sorted(counted.items())) or "nothing"


def combined(parts: Iterable[Results]) -> Results:
    """Return the results of a kernel's machines as those of one."""
    whole = Results(ended=True)
    for part in parts:
        whole.release = whole.release or part.release
        whole.boot_s = max(whole.boot_s, part.boot_s)
        whole.tests |= part.tests
        whole.programs |= part.programs
        whole.steps |= part.steps
        whole.ended &= part.ended
    return whole


def as_dict(results: Results) -> dict[str, Any]:
    """Return what a program wants to know of a run."""
    everything = {"tests": results.tests, "programs": results.programs}
    return {
        "release": results.release,
        "seconds": {"boot": results.boot_s, **results.steps},
        **{
            name: dict(Counter(outcome.outcome for outcome in of.values())) for name, of in everything.items()
        },
        "skips": {reason: len(names) for reason, names in results.skips().items()},
        "failures": results.failures(),
        "slowest": dict(slowest(results, 20)),
    }


def slowest(results: Results, number: int) -> list[tuple[str, float]]:
    """Return the tests and programs that took longest, with their seconds."""
    times = [
        (name, outcome.seconds) for of in (results.tests, results.programs) for name, outcome in of.items()
    ]
    return sorted(times, key=lambda time: -time[1])[:number]


def _how(code: int | None) -> str:
    return "no end in time" if code is None else f"signal {-code}" if code < 0 else f"exit {code}"
