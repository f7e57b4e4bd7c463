"""What the ledger is made of: methods, areas, and what each tracker has in it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from userfault.track import _runs

if TYPE_CHECKING:
    from userfault.track._ledger import Ledger
    from userfault.track._runs import Runs
    from userfault.track._targets import Target
    from userfault.track._touched import Found, Touched

__all__ = ["Area", "Collected", "Method", "Plan", "Subscription"]


@dataclass(frozen=True)
class Collected:
    """What a method found in some areas.

    Attributes:
        accessed: Pages that were touched at all, None if the method cannot tell.
        written: Pages that were written, None if the method cannot tell.
        blind: Where it could not look.
    """

    accessed: Runs | None
    written: Runs | None
    blind: Runs


class Method(Protocol):
    """A way of tracking; one object for each, which lives as long as the process.

    All is called under the ledger's lock. Runs are sorted and disjoint, but may touch where two areas do. Three further
    functions are called where a method has them: `before_fork(runs)` and `after_fork(runs)` in the parent, with all of
    the method's runs, and `abandon()`, to forget everything in a process that was forked without hooks.

    Attributes:
        name: How results name it.
        tells_reads: Whether it tells which pages were accessed at all.
        tells_writes: Whether it tells which were written.
    """

    name: str
    tells_reads: bool
    tells_writes: bool

    def granularity(self, start: int) -> int:
        """Return how many bytes are told apart in the memory at an address."""

    def begin(self, runs: Runs) -> None:
        """Begin, all or nothing: from here on every access that the method tells of is noticed."""

    def collect(self, runs: Runs, rearm: bool) -> Collected:
        """Return what was touched since `begin`, or since the last call with `rearm`."""

    def end(self, runs: Runs) -> None:
        """End: it is ordinary memory again. Memory that is gone is no error."""

    def forked(self, runs: Runs) -> None:
        """In a forked child, with all runs of this method: forget what the parent had, and begin anew."""


class Area:
    """A range of addresses that is tracked in one way, and for whom."""

    __slots__ = ("end", "method", "start", "subscriptions", "unit")

    def __init__(
        self, start: int, end: int, method: Method, unit: int, subscriptions: set[Subscription]
    ) -> None:
        self.start, self.end = start, end
        self.method = method
        self.unit = unit  # its granularity
        self.subscriptions = subscriptions


@dataclass(frozen=True)
class Plan:
    """How to collect for a subscription, as long as no area changes.

    Attributes:
        version: The ledger's when it was made.
        steps: The methods, their runs, and who else is told of what they find.
        told: For each target what is known of it: whether accesses and writes are, the method's name, the granularity.
    """

    version: int
    steps: list[tuple[Method, Runs, list[Subscription]]]
    told: list[tuple[bool, bool, str, int]]


class Subscription:
    """What one tracker has in the ledger. Made by `Ledger.subscribe`.

    Attributes:
        who: What messages call the tracker.
        targets: Its objects.
        reads: Whether it wants to know of all accesses, not of writes only.
        writes: Whether it wants to know of writes.
        notes: For each target, what must be known of all its results.
    """

    def __init__(
        self, owner: Ledger, who: str, targets: tuple[Target, ...], reads: bool, writes: bool
    ) -> None:
        self.who = who
        self.targets = targets
        self.reads = reads
        self.writes = writes
        self.notes: list[tuple[str, ...]] = [()] * len(targets)
        self._ledger = owner
        self._extents: list[tuple[int, int]] = []
        self._bounds: Runs = _runs.EMPTY
        self._began_ns = 0
        self._pid = os.getpid()
        self._closed = False
        self._lost = ""
        self._plan: Plan | None = None
        # What others collected, for us to tell later.
        self._accessed: Runs = _runs.EMPTY
        self._written: Runs = _runs.EMPTY
        self._blind: Runs = _runs.EMPTY

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def peek(self) -> list[Found]:
        """Return what was touched of each target since the interval began."""
        return list(self.touched(reset=False)._found)

    def take(self) -> list[Found]:
        """Return what was touched of each target, and begin a new interval in the same step."""
        return list(self.touched(reset=True)._found)

    def touched(self, *, reset: bool) -> Touched:
        """Return what was touched as a result with its times; with `reset` a new interval begins in the same step.

        Raises:
            TrackError: It was closed, or could not go on in this forked child.
            ForkedError: This process was forked without Python's hooks.
        """
        return self._ledger._collect(self, reset)

    def close(self) -> None:
        """End it, and the tracking of what nobody else tracks. Idempotent."""
        self._ledger._close(self)

    def abandon(self) -> None:
        """Do as `close` as soon as that is possible: from a finaliser, which may run in the middle of anything."""
        self._ledger._abandon(self)

    def _give(self, found: Collected) -> None:
        if self.reads and found.accessed is not None and len(found.accessed):
            self._accessed = _runs.union(self._accessed, _runs.intersect(found.accessed, self._bounds))
        if found.written is not None and len(found.written):
            self._written = _runs.union(self._written, _runs.intersect(found.written, self._bounds))
        if len(found.blind):
            self._blind = _runs.union(self._blind, _runs.intersect(found.blind, self._bounds))

    def _forget(self) -> None:
        self._accessed = self._written = self._blind = _runs.EMPTY
        self._began_ns = time.monotonic_ns()
