"""Do what the plan says, measure it, and compare the results with the reference."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from userfault.cli._demo.plan import Piece, lookups, pieces, step_size, windows
from userfault.cli._demo.smaps import resident_bytes
from userfault.reports import Phase, PhaseReport, Recording, RunReport, touched_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from userfault.cli._demo.reference import Reference
    from userfault.memory import PagedMemory

__all__ = ["Outcome", "Watcher", "run"]

_LOOKUPS: Final = 500
_TRACE_RECORDS: Final = 1 << 20
_SAMPLE_NS: Final = 50_000_000
_SUM_TYPES: Final = {"b": "i8", "i": "i8", "u": "u8", "f": "f8", "c": "c16"}
_PHASES: Final = ("look-ups", "windowed scan", "full reduction")


class Watcher(Protocol):
    """Hears how far the run is; the live line is one. Without a memory, none is in use."""

    def __call__(self, name: str, done: int, total: int, memory: PagedMemory | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did, for the table and for the picture."""

    report: RunReport
    recording: Recording


@dataclass(slots=True)
class _Phase:
    report: PhaseReport
    mark: Phase
    plan: list[Piece]
    values: list[bytes]


def run(
    name: str,
    arrays: Mapping[str, NDArray[Any]],
    memory: PagedMemory,
    reference: Reference,
    *,
    open_seconds: float,
    watch: Watcher,
) -> Outcome:
    """Read single elements, windows and everything, then the same once more from the reference.

    Args:
        name: What to call it in the report.
        arrays: C-contiguous arrays in `memory`.
        memory: Their memory.
        reference: The other way to read them.
        open_seconds: How long opening took.
        watch: Told of every step.
    """
    meter = _Meter(memory, arrays, watch)
    step = step_size(memory.nbytes, memory.budget)
    plans = (
        lookups(arrays, _LOOKUPS),
        windows(arrays, step, reference.align),
        pieces(arrays, step, reference.align),
    )
    memory.trace_start(_TRACE_RECORDS)
    start_ns = time.monotonic_ns()
    phases = [meter.measure(title, plan) for title, plan in zip(_PHASES, plans, strict=True) if plan]
    end_ns = time.monotonic_ns()
    memory.trace_stop()
    stats = memory.stats()
    recording = Recording(
        name=name,
        nbytes=memory.nbytes,
        block=memory.block,
        budget=stats.budget,
        events=meter.events(),
        start_ns=start_ns,
        end_ns=end_ns,
        phases=tuple(phase.mark for phase in phases),
    )
    reports = tuple(_check(phase, reference, watch) for phase in phases)
    fault = stats.latency["fault"]
    report = RunReport(
        name=name,
        reference=reference.name,
        nbytes=memory.nbytes,
        block=memory.block,
        budget=stats.budget,
        open_seconds=open_seconds,
        resident_peak=stats.resident_peak,
        kernel_peak=meter.kernel_peak,
        fault_p50_ns=int(fault.percentile(50)),
        fault_p99_ns=int(fault.percentile(99)),
        phases=reports,
        result=_mean(arrays, phases),
    )
    return Outcome(report, recording)


def _mean(arrays: Mapping[str, NDArray[Any]], phases: Sequence[_Phase]) -> str:
    """Say what the full reduction came to, if it was of one array of floating-point numbers."""
    if len(arrays) != 1 or not phases or phases[-1].report.name != _PHASES[-1]:
        return ""
    (array,) = arrays.values()
    if array.dtype.kind != "f":
        return ""
    total = sum(float(np.frombuffer(value[:8], np.float64)[0]) for value in phases[-1].values)
    return f"mean of all {array.size:,} elements: {total / array.size:.6g}"


class _Meter:
    """Runs phases and keeps what is seen meanwhile."""

    def __init__(self, memory: PagedMemory, arrays: Mapping[str, NDArray[Any]], watch: Watcher) -> None:
        self.kernel_peak = 0
        self._memory, self._arrays, self._watch = memory, arrays, watch
        self._budget = memory.budget
        self._traces: list[NDArray[Any]] = []
        self._next_sample_ns = 0

    def events(self) -> NDArray[Any]:
        """Return all trace records so far."""
        self._traces.append(self._memory.trace_read())
        return np.concatenate(self._traces)

    def measure(self, name: str, plan: Sequence[Piece]) -> _Phase:
        """Read the pieces of a plan one after the other."""
        before = self._memory.stats()
        values: list[bytes] = []
        times_ns = np.empty(len(plan), np.int64)
        asked = 0
        start_ns = time.monotonic_ns()
        for step, piece in enumerate(plan):
            began_ns = time.perf_counter_ns()
            view = self._arrays[piece.name][piece.index]
            # A digest goes over its piece twice. What may not stay resident meanwhile is taken out first.
            values.append(digest(view if view.nbytes <= self._budget // 2 else view.copy()))
            times_ns[step] = time.perf_counter_ns() - began_ns
            asked += view.nbytes
            self._look(name, step + 1, len(plan))
        end_ns = time.monotonic_ns()
        self._look(name, len(plan), len(plan), sample=True)
        after = self._memory.stats()
        trace = self._memory.trace_read()
        self._traces.append(trace)
        mark = Phase(name, start_ns, end_ns)
        loads = Recording(name, self._memory.nbytes, self._memory.block, None, trace, start_ns, end_ns)
        report = PhaseReport(
            name=name,
            seconds=(end_ns - start_ns) / 1e9,
            steps=len(plan),
            asked_bytes=asked,
            touched_bytes=min(touched_blocks(loads) * self._memory.block, self._memory.nbytes),
            read_bytes=after.bytes_read - before.bytes_read,
            faults=after.faults - before.faults,
            blocks_demand=after.blocks_demand - before.blocks_demand,
            blocks_ahead=_ahead(after) - _ahead(before),
            evictions=after.evictions - before.evictions,
            step_p50_ns=int(np.percentile(times_ns, 50)),
            step_p99_ns=int(np.percentile(times_ns, 99)),
        )
        return _Phase(report, mark, list(plan), values)

    def _look(self, name: str, done: int, total: int, *, sample: bool = False) -> None:
        now_ns = time.monotonic_ns()
        if not sample and now_ns < self._next_sample_ns:
            return
        self._next_sample_ns = now_ns + _SAMPLE_NS
        self.kernel_peak = max(self.kernel_peak, resident_bytes(self._memory.address, self._memory.nbytes))
        self._watch(name, done, total, self._memory)


def _ahead(stats: Any) -> int:
    return int(stats.blocks_readahead + stats.blocks_prefetch)


def digest(view: NDArray[Any]) -> bytes:
    """Reduce a piece to some bytes, to tell whether two readers got the same elements.

    They begin with the sum, which is what the reduction is about: in a fixed order and a wide type, so that
    the same elements give the same bits whoever read them. The exclusive or of all words follows, for what a
    sum does not see, and for elements that have none.
    """
    piece = np.ascontiguousarray(view)
    flat = piece.reshape(-1).view(np.uint8)
    words = len(flat) // 8 * 8
    mixed: bytes = np.bitwise_xor.reduce(flat[:words].view(np.uint64)).tobytes() + flat[words:].tobytes()
    wide = _SUM_TYPES.get(piece.dtype.kind)
    return (np.sum(piece, dtype=wide).tobytes() if wide else b"") + mixed


def _check(phase: _Phase, reference: Reference, watch: Watcher) -> PhaseReport:
    start = time.monotonic()
    same = True
    for step, (piece, value) in enumerate(zip(phase.plan, phase.values, strict=True)):
        same &= digest(reference.read(piece)) == value
        watch(f"the same with {reference.name}", step + 1, len(phase.plan), None)
    return replace(phase.report, reference_seconds=time.monotonic() - start, checked=same)
