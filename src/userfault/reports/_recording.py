"""What happened to a memory's blocks over time, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault._trace import EventKind as Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TRACE_DTYPE", "Kind", "Phase", "Recording"]

# One record per event; a trace may carry more fields, these are the ones that are read.
TRACE_DTYPE = np.dtype([("t_ns", "<u8"), ("block", "<u4"), ("kind", "u1")])


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time with a name, for example "look-ups".

    Attributes:
        name: What the program did.
        start_ns: Begin on the monotonic clock, in nanoseconds.
        end_ns: End on the same clock.
    """

    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Recording:
    """A memory's trace and what is needed to read it.

    Attributes:
        name: The memory's name, for the title.
        nbytes: Size of the memory in bytes.
        block: Size of a block in bytes.
        budget: How many bytes could be resident, None if there was no limit.
        events: Records with the fields of `TRACE_DTYPE`, in any order.
        start_ns: Time zero of the report, on the monotonic clock of the records.
        end_ns: End of the report.
        phases: Named stretches of time, in order.
        lost: Records that the trace could not keep.
    """

    name: str
    nbytes: int
    block: int
    budget: int | None
    events: NDArray[Any]
    start_ns: int
    end_ns: int
    phases: tuple[Phase, ...] = ()
    lost: int = 0

    @property
    def blocks(self) -> int:
        """How many blocks the memory has."""
        return -(-self.nbytes // self.block)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) / 1e9
