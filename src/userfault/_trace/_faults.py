"""What the events of paged memories say: how long faults took, and what was loaded on demand or ahead of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault._trace._model import EventKind
from userfault.errors import RangeError
from userfault.stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from userfault._trace._model import Trace, TracedObject

__all__ = ["Activity", "Latency", "demand_and_ahead", "fault_latency"]


@dataclass(frozen=True, eq=False)
class Latency:
    """How long faults took.

    Attributes:
        took_ns: Of each recorded demand fault, from the kernel's message to the wake-up, in ascending order.
        stages: Histograms of all faults, recorded or not, by stage: "queue", "source", "install", "fault", "write".
    """

    took_ns: NDArray[np.int64]
    stages: dict[str, Histogram]

    @property
    def count(self) -> int:
        """How many recorded faults there are."""
        return len(self.took_ns)

    @property
    def mean_ns(self) -> float:
        """Their mean, 0 if there is none."""
        return float(self.took_ns.mean()) if len(self.took_ns) else 0.0

    def percentile(self, percent: float) -> float:
        """Return the nanoseconds that `percent` (0 to 100) of the recorded faults do not pass, 0 if there is none."""
        return float(np.percentile(self.took_ns, percent)) if len(self.took_ns) else 0.0


@dataclass(frozen=True, eq=False)
class Activity:
    """Events of paged memories over time.

    Attributes:
        edges_ns: Borders of the bins, one more than there are bins.
        counts: Of each kind of event, how many there were in each bin.
        nbytes: The bytes of their blocks.
    """

    edges_ns: NDArray[np.int64]
    counts: dict[EventKind, NDArray[np.int64]]
    nbytes: dict[EventKind, NDArray[np.int64]]


def _paged(trace: Trace, objects: Iterable[str | int] | str | int | None) -> list[TracedObject]:
    if objects is None:
        return [thing for thing in trace.objects if thing.watched == "faults"]
    if isinstance(objects, (str, int)):
        objects = [objects]
    things = [trace.object(which) for which in objects]
    for thing in things:
        if thing.watched != "faults":
            raise RangeError(f"{thing.name!r} is no paged memory: it has no faults")
    return things


def _events(trace: Trace, things: list[TracedObject]) -> NDArray[Any]:
    return trace.events[np.isin(trace.events["object"], [thing.id for thing in things])]


def fault_latency(trace: Trace, objects: Iterable[str | int] | str | int | None = None) -> Latency:
    """Return how long faults took, of all paged memories or of some.

    Raises:
        RangeError: There is no such object, or it is no paged memory.
    """
    things = _paged(trace, objects)
    events = _events(trace, things)
    stages: dict[str, list[dict[str, Any]]] = {}
    for thing in things:
        for stage, histogram in thing.latency.items():
            stages.setdefault(stage, []).append(histogram)
    took = events["took_ns"][events["kind"] == EventKind.DEMAND].astype(np.int64)
    return Latency(np.sort(took), {stage: _sum(parts) for stage, parts in stages.items()})


def _sum(parts: list[dict[str, Any]]) -> Histogram:
    buckets = [0] * max(len(part["buckets"]) for part in parts)
    for part in parts:
        for bucket, count in enumerate(part["buckets"]):
            buckets[bucket] += count
    return Histogram(
        sum(part["count"] for part in parts), sum(part["sum_ns"] for part in parts), tuple(buckets)
    )


def demand_and_ahead(
    trace: Trace,
    bins: int,
    objects: Iterable[str | int] | str | int | None = None,
    *,
    start_ns: int = 0,
    stop_ns: int | None = None,
) -> Activity:
    """Return how many blocks were loaded on demand and ahead of it, evicted, written and so on, over time.

    Args:
        trace: The recording.
        bins: Into how many parts the time is divided.
        objects: Names or numbers of paged memories. None: all.
        start_ns: Where the first bin begins.
        stop_ns: Where the last one ends. None: with the trace.

    Raises:
        RangeError: There is no such object, it is no paged memory, or there are no bins.
    """
    if bins < 1:
        raise RangeError(f"the time is divided into at least 1 bin, not {bins}")
    things = _paged(trace, objects)
    stop_ns = max(trace.duration_ns if stop_ns is None else stop_ns, start_ns + 1)
    events = _events(trace, things)
    events = events[(events["t_ns"] >= start_ns) & (events["t_ns"] <= stop_ns)]
    at = np.minimum((events["t_ns"] - start_ns) * float(bins) / (stop_ns - start_ns), bins - 1).astype(
        np.int64
    )
    size = np.zeros(len(events), np.int64)
    for thing in things:
        mine = events["object"] == thing.id
        size[mine] = np.minimum(
            thing.nbytes - events["block"][mine].astype(np.int64) * thing.granularity, thing.granularity
        )
    counts, nbytes = {}, {}
    for kind in EventKind:
        of_kind = events["kind"] == kind
        counts[kind] = np.bincount(at[of_kind], minlength=bins)
        nbytes[kind] = np.bincount(at[of_kind], size[of_kind], minlength=bins).astype(np.int64)
    edges = start_ns + np.arange(bins + 1) * (stop_ns - start_ns) // bins
    return Activity(edges, counts, nbytes)
