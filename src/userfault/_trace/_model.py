"""A trace in memory: what was touched or loaded, when, of which object."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from userfault.errors import RangeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EVENT_DTYPE", "LOADS", "RUN_DTYPE", "SAMPLE_DTYPE", "Cost", "EventKind", "Trace", "TracedObject"]

Watched = Literal["writes", "accesses", "faults"]

# One row for each sample of one object, also where nothing was touched: `runs` rows of the table of runs, from `first`
# on.
SAMPLE_DTYPE = np.dtype(
    [("object", "<u4"), ("start_ns", "<i8"), ("stop_ns", "<i8"), ("first", "<u8"), ("runs", "<u4")]
)
# `count` pages (of the object's `granularity`) from page `page` on; `written` is 1 for pages that were written.
# The runs of one sample are in ascending order and apart.
RUN_DTYPE = np.dtype([("page", "<u4"), ("count", "<u4"), ("written", "u1")])
# One row for each event of a paged memory. `block` counts the object's `granularity`.
EVENT_DTYPE = np.dtype(
    [("object", "<u4"), ("t_ns", "<i8"), ("took_ns", "<u4"), ("block", "<u4"), ("kind", "u1")]
)


class EventKind(IntEnum):
    """What an event says of its block."""

    DEMAND = 1  # loaded because somebody touched it
    READAHEAD = 2  # loaded because the access pattern said that it would be touched
    PREFETCH = 3  # loaded because the program asked for it
    EVICT = 4  # dropped to keep the budget
    POISON = 5  # given up: its source failed for good
    WRITE = 6  # written back
    DIRTY = 7  # written to for the first time since it was clean
    REPLAY = 8  # loaded because an earlier run needed it


LOADS = (EventKind.DEMAND, EventKind.READAHEAD, EventKind.PREFETCH, EventKind.REPLAY)
"""The events that bring a block into memory."""


@dataclass(frozen=True)
class TracedObject:
    """An object of a trace.

    Attributes:
        id: Its number in the trace's tables.
        name: What it is called.
        nbytes: Its size in bytes.
        granularity: Bytes that were told apart: pages, huge pages, or blocks.
        watched: `"writes"`, `"accesses"` (reads and writes), or `"faults"` (the events of a paged memory).
        method: How.
        lead: Bytes of its first page that lie before it.
        dtype: Type of its elements as text, "" if it is no array.
        shape: Its shape, () if it is no array.
        site: Where in the program it was made, for example "stencil.py:12", "" if that is not known.
        source: Where a paged memory's bytes come from, "" for other memory.
        born_ns: When it appeared, in nanoseconds from the trace's beginning.
        died_ns: When it went, None if it was there to the end.
        latency: Of paged memories, histograms by stage at the trace's end, as in `userfault.Histogram`:
            {"fault": {"count", "sum_ns", "buckets"}, ...}.
        tells_writes: Whether the method told writes from reads; where it did not, no page counts as written.
    """

    id: int
    name: str
    nbytes: int
    granularity: int
    watched: Watched
    method: str = ""
    lead: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()
    site: str = ""
    source: str = ""
    born_ns: int = 0
    died_ns: int | None = None
    latency: dict[str, dict[str, Any]] = field(default_factory=dict)
    tells_writes: bool = True

    @property
    def pages(self) -> int:
        """How many pages, or blocks, it has."""
        return -(-(self.lead + self.nbytes) // self.granularity)


@dataclass(frozen=True)
class Cost:
    """What recording cost.

    Attributes:
        cpu_ns: CPU time of the recorder, in nanoseconds: of its thread, and of beginning and ending to track objects.
        wall_ns: How long the recording took.
        samples: How often it looked.
        traps: Page faults that tracking added to the program: one for each page that was reported in a sample.
    """

    cpu_ns: int = 0
    wall_ns: int = 0
    samples: int = 0
    traps: int = 0

    @property
    def share(self) -> float:
        """Share of one CPU that the recorder used."""
        return self.cpu_ns / self.wall_ns if self.wall_ns else 0.0


@dataclass(frozen=True)
class Trace:
    """A recording. All times are nanoseconds from its beginning.

    Attributes:
        objects: The objects, in the order of their ids.
        samples: What was touched between two looks: rows of `SAMPLE_DTYPE`, by the time of the second.
        runs: Pages that were touched: rows of `RUN_DTYPE`, which `samples` refers to.
        events: Events of paged memories: rows of `EVENT_DTYPE`, by time.
        duration_ns: How long it is.
        started_ns: When it began, in nanoseconds since the epoch.
        lost: Events that could not be kept.
        cost: What the recording cost.
        about: Facts on the run: "command", "python", "kernel", "page_size", "version"; "every" (seconds between two
            looks as asked for) and "every_used" (what the budget left of that), "notes" (sentences).
        complete: Whether it was closed; False if the program ended before, or the file was cut.
    """

    objects: tuple[TracedObject, ...]
    samples: NDArray[Any]
    runs: NDArray[Any]
    events: NDArray[Any]
    duration_ns: int
    started_ns: int = 0
    lost: int = 0
    cost: Cost = field(default_factory=Cost)
    about: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    def object(self, which: str | int) -> TracedObject:
        """Return an object by name or number.

        Raises:
            RangeError: There is none.
        """
        for candidate in self.objects:
            if which in (candidate.id, candidate.name):
                return candidate
        names = ", ".join(repr(candidate.name) for candidate in self.objects)
        raise RangeError(f"the trace has no object {which!r}; it has {names or 'none'}")
