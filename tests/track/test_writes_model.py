"""Random writes, takes, and trackers that come and go, against a model: sets of pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.tracking import KINDS, PAGE, memory_of, poke, written_by_read
from userfault.track import track_writes
from userfault.track._ledger import ledger
from userfault.track._writes import WriteTracker

pytestmark = pytest.mark.needs_feature("WP_ASYNC")

COUNT = 12  # pages
SIZE = COUNT * PAGE


@dataclass
class Watched:
    """A tracker of bytes [start, stop), and the pages that it must know of."""

    tracker: WriteTracker
    start: int
    stop: int
    written: set[int] = field(default_factory=set)

    def expected(self) -> list[tuple[int, int]]:
        """Return the ranges that it has to report."""
        found: list[tuple[int, int]] = []
        for page in sorted(self.written):
            low, high = max(page * PAGE, self.start), min((page + 1) * PAGE, self.stop)
            if found and found[-1][1] == low - self.start:
                found[-1] = (found[-1][0], high - self.start)
            else:
                found.append((low - self.start, high - self.start))
        return found


class Machine(RuleBasedStateMachine):
    array: np.ndarray
    memory: Iterator[np.ndarray]

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[Watched] = []

    @initialize(kind=st.sampled_from(KINDS), there=st.booleans())
    def begin(self, kind: str, there: bool) -> None:
        with memory_of(kind, COUNT) as array:
            self.array = array
        if there:
            self.array[:] = 1

    def _wrote(self, start: int, length: int) -> None:
        for page in range(start // PAGE, (start + length - 1) // PAGE + 1):
            for one in self.watched:
                if one.start // PAGE <= page <= (one.stop - 1) // PAGE:
                    one.written.add(page)

    @rule(start=st.integers(0, SIZE - 1), length=st.integers(1, 3 * PAGE), kernel=st.booleans())
    def write(self, start: int, length: int, kernel: bool) -> None:
        length = min(length, SIZE - start)
        if kernel:
            written_by_read(self.array, start, length)
        else:
            poke(self.array, start, length)
        self._wrote(start, length)

    @rule()
    def read(self) -> None:
        self.array.sum()

    @precondition(lambda self: len(self.watched) < 4)
    @rule(start=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
    def track(self, start: int, length: int) -> None:
        stop = min(start + length, SIZE)
        self.watched.append(Watched(track_writes(self.array[start:stop]).start(), start, stop))

    @precondition(lambda self: self.watched)
    @rule(which=st.integers(0, 3), what=st.sampled_from(["take", "peek", "stop"]))
    def ask(self, which: int, what: str) -> None:
        one = self.watched[which % len(self.watched)]
        assert getattr(one.tracker, what)().ranges() == one.expected()
        if what != "peek":
            one.written.clear()
        if what == "stop":
            self.watched.remove(one)

    def teardown(self) -> None:
        for one in self.watched:
            assert one.tracker.stop().ranges() == one.expected()
        assert ledger.areas == []


def test_against_a_model() -> None:
    quiet = settings(
        deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Machine, settings=quiet)  # type: ignore[no-untyped-call]
