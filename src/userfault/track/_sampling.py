"""What a recorder reads at each look: which pages of an object were touched, or the events of a paged memory."""

from __future__ import annotations

import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE, TracedObject
from userfault.track import _runs
from userfault.track._accesses import AccessTracker
from userfault.track._writes import WriteTracker

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from userfault._observed import ObservedMemory
    from userfault._trace._file import TraceWriter
    from userfault.memory import PagedMemory
    from userfault.stats import Histogram
    from userfault.track._runs import Runs
    from userfault.track._targets import Target
    from userfault.track._touched import Touched
    from userfault.track._tracker import Tracker

__all__ = ["Faults", "Samples"]

# Events that a memory keeps from one look to the next: 6 MiB.
_RING = 1 << 18
# An event is written down just after whoever waited for the block was woken. At the end we wait for those; for blocks
# that come from afar only so long, as nobody has had them yet.
_SETTLE_S = 0.25
_LOADING = 1


def _described(target: Target) -> dict[str, Any]:
    array = target.array
    return {} if array is None else {"dtype": array.dtype.str, "shape": array.shape}


class Samples:
    """An object that is sampled: what was touched since the last look.

    Args:
        number: Its number in the trace.
        target: The object.
        what: Whether reads are wanted too.
        method: How to tell them, None for the best way.
        site: Where it was made.
        began_ns: When the trace began (CLOCK_MONOTONIC).
    """

    def __init__(
        self,
        number: int,
        target: Target,
        what: Literal["writes", "accesses"],
        method: str | None,
        site: str,
        began_ns: int,
    ) -> None:
        self._began_ns = began_ns
        named = {target.name: target.obj}
        self._tracker: Tracker = (
            WriteTracker((), named)
            if what == "writes"
            else AccessTracker((), named, method, method != "rwp-async")
        )
        self._tracker.start()
        state = self._tracker.peek()
        found = state._found[0]
        unit = found.granularity
        # Not the object's first page as such: its first piece of `unit` bytes may begin before.
        self._base = target.start // unit * unit
        self.obj = target.obj
        self.method = found.method
        self.notes = found.notes
        self.thing = TracedObject(
            id=number,
            name=target.name,
            nbytes=target.nbytes,
            granularity=unit,
            watched=what,
            method=found.method,
            lead=target.address - self._base,
            site=site,
            born_ns=state.start_ns - began_ns,
            tells_writes=found.written is not None,
            **_described(target),
        )

    def holds(self, target: Target) -> bool:
        """Whether this is the object."""
        return self.obj is target.obj

    def look(self, writer: TraceWriter) -> int:
        """Write down what was touched; return how many pages."""
        return self._write(writer, self._tracker.take())

    def end(self, writer: TraceWriter, died: bool) -> int:
        """Look a last time, and end tracking."""
        touched = self._tracker.stop()
        pages = self._write(writer, touched)
        if died:
            writer.end_object(self.thing.id, touched.stop_ns - self._began_ns)
        return pages

    def drop(self) -> None:
        """End tracking without a last look."""
        if self._tracker.open:
            self._tracker.stop()

    def forked(self) -> None:
        """In a forked child: its tracker goes with it, and then it is ordinary memory here."""

    def _write(self, writer: TraceWriter, touched: Touched) -> int:
        found = touched._found[0]
        if found.accessed is None:
            assert found.written is not None
            runs = self._rows(found.written, 1)
        elif found.written is None or not len(found.written):
            runs = self._rows(found.accessed, 0)
        else:
            read_only = self._rows(_runs.subtract(found.accessed, found.written), 0)
            runs = np.concatenate((self._rows(found.written, 1), read_only))
            runs = runs[np.argsort(runs["page"], kind="stable")]
        writer.add_sample(
            self.thing.id, touched.start_ns - self._began_ns, touched.stop_ns - self._began_ns, runs
        )
        return int(runs["count"].sum())

    def _rows(self, found: Runs, written: int) -> NDArray[Any]:
        unit, base = np.uint64(self.thing.granularity), np.uint64(self._base)
        found = _runs.clip(found, self._base, self._base + self.thing.pages * self.thing.granularity)
        first = (found[:, 0] - base) // unit
        stop = (found[:, 1] - base + unit - np.uint64(1)) // unit
        rows = np.zeros(len(found), RUN_DTYPE)
        rows["page"], rows["count"], rows["written"] = first, stop - first, written
        return rows


class Faults:
    """A paged memory: the events of its ring. It is not kept alive, and what it did until its end is not lost."""

    method = "events"
    notes: tuple[str, ...] = ()

    def __init__(self, number: int, target: Target, name: str, site: str, began_ns: int) -> None:
        memory = target.memory
        assert memory is not None
        self._began_ns = began_ns
        self._memory: weakref.ref[PagedMemory] = weakref.ref(memory)
        # What its end gave us, in any thread and in the middle of anything: so nothing but an append happens there.
        self._rest: deque[tuple[NDArray[Any], int, dict[str, Histogram]]] = deque()
        self._lost = 0
        self.ended = False
        memory._trace_for("a recorder", _RING)
        self._before = memory.stats().latency
        rest = self._rest

        def gone(last: ObservedMemory) -> None:
            last._when_gone = None
            _settle(last)
            rest.append((last._read_trace(), last.trace_lost, last.stats().latency))

        memory._when_gone = gone
        self.thing = TracedObject(
            id=number,
            name=name,
            nbytes=memory.nbytes,
            granularity=memory.block,
            watched="faults",
            method=self.method,
            site=site,
            source=memory.name,
            born_ns=time.monotonic_ns() - began_ns,
            **_described(target),
        )

    def holds(self, target: Target) -> bool:
        """Whether this is the object, or lies in it."""
        return target.memory is not None and self._memory() is target.memory

    @property
    def lost(self) -> int:
        """Events that were overwritten before a look came for them."""
        return self._lost

    def look(self, writer: TraceWriter) -> int:
        """Write down the events since the last look. Tracing adds no faults."""
        memory = self._memory()
        if self._rest:
            events, lost, latency = self._rest.popleft()
            self._write(writer, events, lost)
            self._say_end(writer, latency, died=True)
            if memory is not None:
                memory._end_trace()
        elif memory is not None:
            self._write(writer, memory._read_trace(), memory.trace_lost)
        return 0

    def end(self, writer: TraceWriter, died: bool) -> int:
        """Look a last time, and end the trace of the memory."""
        memory = self._memory()
        if memory is not None and not memory.closed:
            _settle(memory)
        self.look(writer)
        if memory is not None and not self.ended:
            self._finish(writer, memory, died)
        elif not self.ended:  # on its way out, in another thread
            self._say_end(writer, {}, died=True)
        return 0

    def drop(self) -> None:
        """End the trace without a last look."""
        memory = self._memory()
        if memory is not None and not self.ended:
            memory._when_gone = None
            memory._end_trace()

    def forked(self) -> None:
        """In a forked child, where the engine must not be asked: leave the trace to the parent."""
        memory = self._memory()
        if memory is not None:
            memory._when_gone = None
            memory._traced_for = ""

    def _finish(self, writer: TraceWriter, memory: PagedMemory, died: bool) -> None:
        self.drop()
        self._say_end(writer, memory.stats().latency, died)

    def _say_end(self, writer: TraceWriter, latency: dict[str, Histogram], died: bool) -> None:
        self.ended = True
        spent = {stage: _difference(histogram, self._before[stage]) for stage, histogram in latency.items()}
        writer.end_object(self.thing.id, time.monotonic_ns() - self._began_ns if died else None, spent)

    def _write(self, writer: TraceWriter, read: NDArray[Any], lost: int) -> None:
        self._lost = lost
        events = np.zeros(len(read), EVENT_DTYPE)
        events["object"], events["block"], events["kind"] = self.thing.id, read["block"], read["kind"]
        events["t_ns"] = np.maximum(read["t_ns"].astype(np.int64) - self._began_ns, 0)
        events["took_ns"] = read["took_ns"]
        writer.add_events(events[np.argsort(events["t_ns"], kind="stable")])


def _settle(memory: ObservedMemory) -> None:
    """Wait until blocks that are being loaded now are there, if that does not take long."""
    under_way = np.flatnonzero(memory.residency() == _LOADING)
    until = time.monotonic() + _SETTLE_S
    while len(under_way) and time.monotonic() < until:
        time.sleep(0.0002)
        under_way = under_way[memory.residency()[under_way] == _LOADING]


def _difference(now: Histogram, before: Histogram) -> dict[str, Any]:
    buckets = [a - b for a, b in zip(now.buckets, before.buckets, strict=True)]
    while buckets and not buckets[-1]:
        buckets.pop()
    return {"count": now.count - before.count, "sum_ns": now.sum_ns - before.sum_ns, "buckets": buckets}
