"""Which memory of this process is tracked, how, and by whom: the one book that all trackers share.

Tracked memory is kept as *areas*: disjoint ranges of addresses, each with the method by which it is tracked and the
subscriptions that it has. What is collected from an area goes to all of its subscriptions, so trackers that are
nested in each other, or overlap, lose nothing to each other: each has what was touched since *it* looked last.

Fork: the hooks of `os.fork` begin everything anew in the child, so that its trackers tell of its own accesses, from the
fork on; the parent's are not disturbed. A process that was forked in C, without these hooks, is told by its pid.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from userfault.errors import ForkedError, PrivilegeError, TrackError, UntrackableError
from userfault.kernel.errors import UffdError
from userfault.track import _runs
from userfault.track._subscription import Area, Collected, Method, Plan, Subscription
from userfault.track._touched import Found, Touched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from userfault.track._runs import Runs
    from userfault.track._targets import Target

__all__ = ["Collected", "Ledger", "Method", "Subscription", "ledger"]


class Ledger:
    """The areas of one process. Safe to use from several threads; use the one that is called `ledger`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._pid = os.getpid()
        self._areas: list[Area] = []
        self._version = 0  # counts changes of areas
        self._abandoned: deque[Subscription] = deque()

    # --- what trackers call --------------------------------------------------------------------------------

    def subscribe(
        self,
        targets: Iterable[Target],
        choose: Callable[[Target], Method],
        *,
        who: str = "a tracker",
        reads: bool = False,
        writes: bool = True,
    ) -> Subscription:
        """Begin to track objects, all of them or none.

        Args:
            targets: The objects.
            choose: Returns the method for one whose memory is not tracked yet; asked only where that is so.
            who: What messages call the tracker.
            reads: Whether it must be told of all accesses.
            writes: Whether it must be told of writes.

        Raises:
            UntrackableError: The memory cannot be tracked; the message names the object.
            TrackError: Another tracker uses a method there that does not tell what is asked.
            PrivilegeError: This process may not.
        """
        made = Subscription(self, who, tuple(targets), reads, writes)
        with self._entered():
            try:
                for target in made.targets:
                    with _naming(target):
                        made._extents.append(self._add(made, target, choose))
                    made._bounds = _runs.runs_of(made._extents)
            except BaseException:
                self._drop(made)
                raise
            self._version += 1
            made._forget()
        return made

    @property
    def areas(self) -> list[tuple[int, int, str, int]]:
        """What is tracked: start, end, the method's name, and the number of trackers, in order of address."""
        with self._entered():
            return [(a.start, a.end, a.method.name, len(a.subscriptions)) for a in self._areas]

    # --- how -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            self._start_over()
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._bury()
                yield
            finally:
                self._depth -= 1

    def _bury(self) -> None:
        while self._abandoned:
            self._drop(self._abandoned.popleft())

    def _abandon(self, subscription: Subscription) -> None:
        self._abandoned.append(subscription)
        # It may be this thread that is in the middle of something, as the collector runs anywhere: then later.
        if self._lock.acquire(blocking=False):
            try:
                if not self._depth and self._pid == os.getpid():
                    self._bury()
            finally:
                self._lock.release()

    def _add(
        self, subscription: Subscription, target: Target, choose: Callable[[Target], Method]
    ) -> tuple[int, int]:
        start, end = target.start, target.end
        if target.memory is not None:  # blocks are not reset one by one, so it is tracked as a whole
            start, end = target.memory.address, target.memory.address + target.memory.nbytes
        known = self._overlapping(start, end)
        method = known[0].method if known else choose(target)
        unit = known[0].unit if known else method.granularity(start)
        if target.memory is None:
            start, end = start // unit * unit, -(-end // unit) * unit
        # Areas as they are, cut at both ends.
        self._split(start)
        self._split(end)
        known = self._overlapping(start, end)
        for area in known:
            self._check_fits(area, subscription, target)
        shared = [area for area in known if subscription not in area.subscriptions]
        if shared:  # what was touched up to now is of no concern to the new one
            self._pass_on(shared)
        held = _runs.runs_of([(area.start, area.end) for area in known])
        missing = _runs.subtract(_runs.runs_of([(start, end)]), held)
        if len(missing):
            new = method if not known else choose(target)
            new.begin(missing)
            for low, high in missing.tolist():
                self._areas.append(Area(low, high, new, unit, {subscription}))
            self._areas.sort(key=lambda area: area.start)
        for area in shared:
            area.subscriptions.add(subscription)
        return start, end

    def _check_fits(self, area: Area, subscription: Subscription, target: Target) -> None:
        if subscription in area.subscriptions:
            return
        lacking = [
            what
            for what, wanted, told in (
                ("reads", subscription.reads, area.method.tells_reads),
                ("writes", subscription.writes, area.method.tells_writes),
            )
            if wanted and not told
        ]
        if lacking:
            others = " and ".join(sorted({other.who for other in area.subscriptions}))
            raise TrackError(
                f"{target.name}: {subscription.who} needs to know of {lacking[0]}, but {others} tracks the same memory"
                f" by the method {area.method.name!r}, which does not tell: start the one that asks for more first, or"
                " one after the other"
            )

    def _overlapping(self, start: int, end: int) -> list[Area]:
        first = bisect_right(self._areas, start, key=lambda area: area.start) - 1
        if first < 0 or self._areas[first].end <= start:
            first += 1
        last = first
        while last < len(self._areas) and self._areas[last].start < end:
            last += 1
        return self._areas[first:last]

    def _split(self, at: int) -> None:
        index = bisect_right(self._areas, at, key=lambda area: area.start) - 1
        if index < 0:
            return
        area = self._areas[index]
        if area.start < at < area.end:
            self._areas.insert(index + 1, Area(at, area.end, area.method, area.unit, set(area.subscriptions)))
            area.end = at

    def _of(self, subscription: Subscription) -> list[Area]:
        areas: list[Area] = []
        for low, high in subscription._bounds.tolist():
            areas += self._overlapping(low, high)
        return areas

    def _pass_on(self, areas: Sequence[Area]) -> None:
        """Collect from areas, and give what was found to all their subscriptions."""
        for method, runs in _by_method(areas):
            found = method.collect(runs, True)
            for subscription in {s for area in areas if area.method is method for s in area.subscriptions}:
                subscription._give(found)

    def _collect(self, subscription: Subscription, reset: bool) -> Touched:
        if subscription._pid != os.getpid():
            raise ForkedError(
                f"{subscription.who}: this process was forked without Python's hooks (by a library), so nothing is"
                " tracked here; start a new tracker in it"
            )
        with self._entered():
            if subscription._closed:
                raise TrackError(f"{subscription.who} has ended")
            if subscription._lost:
                raise TrackError(subscription._lost)
            plan = subscription._plan
            if plan is None or plan.version != self._version:
                plan = subscription._plan = self._planned(subscription)
            accessed, written, blind = subscription._accessed, subscription._written, subscription._blind
            for method, runs, others in plan.steps:
                found = method.collect(runs, reset)
                accessed = accessed if found.accessed is None else _runs.union(accessed, found.accessed)
                written = written if found.written is None else _runs.union(written, found.written)
                blind = _runs.union(blind, found.blind)
                if reset:
                    for other in others:
                        other._give(found)
                    # In case that another method fails: it is not to be had a second time.
                    subscription._accessed, subscription._written, subscription._blind = (
                        accessed,
                        written,
                        blind,
                    )
            began = subscription._began_ns
            if reset:
                subscription._forget()
                ended = subscription._began_ns
            else:
                ended = time.monotonic_ns()
            told = _told(subscription, plan, accessed, written, blind)
        return Touched(began, ended, subscription.targets, told)

    def _planned(self, subscription: Subscription) -> Plan:
        areas = self._of(subscription)
        steps = []
        for method, runs in _by_method(areas):
            others = {s for area in areas if area.method is method for s in area.subscriptions}
            steps.append((method, runs, list(others - {subscription})))
        told = []
        for start, end in subscription._extents:
            inside = self._overlapping(start, end)
            methods = {area.method.name: area.method for area in inside}
            reads = subscription.reads and all(method.tells_reads for method in methods.values())
            writes = all(method.tells_writes for method in methods.values())
            told.append((reads, writes, " and ".join(methods), max(area.unit for area in inside)))
        return Plan(self._version, steps, told)

    def _close(self, subscription: Subscription) -> None:
        if subscription._pid != os.getpid():
            subscription._closed = True
            return
        with self._entered():
            self._drop(subscription)

    def _drop(self, subscription: Subscription) -> None:
        if subscription._closed or subscription._pid != os.getpid():
            return
        subscription._closed = True
        self._version += 1
        unused = []
        for area in self._areas:
            area.subscriptions.discard(subscription)
            if not area.subscriptions:
                unused.append(area)
        if unused:
            self._areas = [area for area in self._areas if area.subscriptions]
            for method, runs in _by_method(unused):
                method.end(runs)

    # --- fork ----------------------------------------------------------------------------------------------

    def _before_fork(self) -> None:
        self._lock.acquire()
        for method, runs in _by_method(self._areas):
            _optional(method, "before_fork", runs)

    def _after_fork(self) -> None:
        for method, runs in _by_method(self._areas):
            _optional(method, "after_fork", runs)
        self._lock.release()

    def _in_child(self) -> None:
        self._pid = os.getpid()
        lost: dict[int, str] = {}
        for method, runs in _by_method(self._areas):
            try:
                method.forked(runs)
            except Exception as error:
                lost[id(method)] = f"tracking did not go on in this forked child: {error}"
        for area in self._areas:
            for subscription in area.subscriptions:
                subscription._pid = self._pid
                subscription._lost = subscription._lost or lost.get(id(area.method), "")
                subscription._forget()
        self._areas = [area for area in self._areas if id(area.method) not in lost]
        self._version += 1
        self._lock.release()

    def _start_over(self) -> None:
        """Forget all, in a process that was forked without our hooks: the lock may be held by who is not here."""
        areas, self._areas = self._areas, []
        self._version += 1
        self._lock, self._depth, self._pid = threading.RLock(), 0, os.getpid()
        self._abandoned.clear()
        for method in {id(area.method): area.method for area in areas}.values():
            with contextlib.suppress(Exception):
                _optional(method, "abandon")


def _told(
    subscription: Subscription, plan: Plan, accessed: Runs, written: Runs, blind: Runs
) -> tuple[Found, ...]:
    if len(blind):  # who cannot look must not say that nothing was there
        accessed, written = _runs.union(accessed, blind), _runs.union(written, blind)
    extents = subscription._extents
    parts = zip(
        plan.told,
        subscription.notes,
        _runs.pieces(accessed, extents),
        _runs.pieces(written, extents),
        _runs.pieces(blind, extents),
        strict=True,
    )
    return tuple(
        Found(one if reads else None, two if writes else None, method, unit, three, notes)
        for (reads, writes, method, unit), notes, one, two, three in parts
    )


def _optional(method: Method, name: str, *arguments: Runs) -> None:
    function = getattr(method, name, None)
    if function is not None:
        function(*arguments)


def _by_method(areas: Iterable[Area]) -> list[tuple[Method, Runs]]:
    """Return the methods of areas with their runs; areas that touch are one run."""
    ranges: dict[int, tuple[Method, list[tuple[int, int]]]] = {}
    for area in areas:
        ranges.setdefault(id(area.method), (area.method, []))[1].append((area.start, area.end))
    made = []
    for method, pairs in ranges.values():
        runs = np.array(pairs, np.uint64)
        made.append((method, _runs.joined(runs[:, 0], runs[:, 1])))
    return made


@contextlib.contextmanager
def _naming(target: Target) -> Iterator[None]:
    """Have what goes wrong name the object."""
    try:
        yield
    except UntrackableError as error:
        name = target.name
        raise error if str(error).startswith(f"{name}:") else type(error)(f"{name}: {error}") from None
    except PermissionError as error:
        if isinstance(error, PrivilegeError):
            raise
        raise UntrackableError(f"{target.name}: {error}") from None
    except UffdError as error:
        raise UntrackableError(f"{target.name}: {error}") from None


ledger = Ledger()

# The lock is taken first, so that no thread is in the middle of something when the process is copied.
os.register_at_fork(
    before=ledger._before_fork, after_in_parent=ledger._after_fork, after_in_child=ledger._in_child
)
