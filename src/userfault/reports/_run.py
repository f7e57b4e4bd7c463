"""What a measured run did, as plain data: what `userfault demo` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["PhaseReport", "RunReport"]


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """One part of a run.

    Attributes:
        name: What was done.
        seconds: How long it took.
        steps: How many times.
        asked_bytes: Size of the elements that were used, as often as they were.
        touched_bytes: Size of the distinct blocks that were loaded.
        read_bytes: Bytes read from the source.
        faults: How many times a thread waited for a block.
        blocks_demand: Blocks loaded because of that.
        blocks_ahead: Blocks loaded by readahead or prefetch.
        evictions: Blocks dropped to keep the budget.
        step_p50_ns: Median time of one step.
        step_p99_ns: 99th percentile of it.
        reference_seconds: How long the reference took for the same, None if it was not asked.
        checked: Whether the reference got the same values.
    """

    name: str
    seconds: float
    steps: int
    asked_bytes: int
    touched_bytes: int
    read_bytes: int
    faults: int
    blocks_demand: int
    blocks_ahead: int
    evictions: int
    step_p50_ns: int
    step_p99_ns: int
    reference_seconds: float | None = None
    checked: bool | None = None


@dataclass(frozen=True, slots=True)
class RunReport:
    """A whole run.

    Attributes:
        name: What was opened.
        reference: What the results were compared with, for example "zarr".
        nbytes: Size of the memory.
        block: Size of a block.
        budget: How many bytes could be resident.
        open_seconds: From the call of open() to its return.
        resident_peak: Most bytes that the engine had resident.
        kernel_peak: Most bytes that the kernel saw resident, sampled.
        fault_p50_ns: Median time from a fault to its end, as the engine measured it.
        fault_p99_ns: 99th percentile of it.
        phases: The parts, in order.
        result: What the last part computed, for people.
    """

    name: str
    reference: str
    nbytes: int
    block: int
    budget: int
    open_seconds: float
    resident_peak: int
    kernel_peak: int
    fault_p50_ns: int
    fault_p99_ns: int
    phases: tuple[PhaseReport, ...]
    result: str = ""

    @property
    def checked(self) -> bool:
        """Whether every part got what the reference got."""
        return all(phase.checked for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "checked": self.checked}
