"""What a trace says of each object in all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from userfault._trace._model import LOADS, EventKind
from userfault._trace._touches import byte_edges, touches_of

if TYPE_CHECKING:
    from userfault._trace._model import Trace, TracedObject
    from userfault._trace._touches import Ints, Touches

__all__ = ["ObjectTotals", "totals"]


@dataclass(frozen=True)
class ObjectTotals:
    """An object in all.

    Attributes:
        name: What it is called.
        nbytes: Its size in bytes.
        touched: Bytes that were touched at least once (of a paged memory: loaded), in whole pages cut at its ends; None
            if only writes were watched.
        written: Bytes that were written at least once; None if the method could not tell.
        samples: How often it was looked at.
        touches: Pages that the samples report, each as often as it was reported: page faults that tracking took.
        heat: Mean heat of its pages: the share of the time in which a page was touched, 0 to 1.
        events: How many events of each kind it had, if it is a paged memory.
        loaded: Bytes that were loaded, again ones counted again, in whole blocks.
    """

    name: str
    nbytes: int
    touched: int | None
    written: int | None
    samples: int
    touches: int
    heat: float
    events: dict[EventKind, int]
    loaded: int

    @property
    def share(self) -> float:
        """Share of its bytes that were touched, or written if only writes were watched."""
        known = self.written if self.touched is None else self.touched
        return (known or 0) / self.nbytes if self.nbytes else 0.0


def totals(trace: Trace) -> list[ObjectTotals]:
    """Return what each object of a trace had in all, in the trace's order."""
    return [
        _paged(trace, thing) if thing.watched == "faults" else _sampled(trace, thing)
        for thing in trace.objects
    ]


def _sampled(trace: Trace, thing: TracedObject) -> ObjectTotals:
    touches = touches_of(trace, thing)
    duration = touches.duration_ns
    edges = byte_edges(thing, np.arange(2) * thing.pages)
    nbytes = int(edges[1] - edges[0])
    spans = byte_edges(thing, touches.page + touches.count) - byte_edges(thing, touches.page)
    possible = float(duration.sum()) * nbytes
    written = None
    if thing.tells_writes:
        written = _covered(touches_of(trace, thing, "written"))
    return ObjectTotals(
        name=thing.name,
        nbytes=thing.nbytes,
        touched=_covered(touches) if thing.watched == "accesses" else None,
        written=written,
        samples=len(duration),
        touches=int(touches.count.sum()),
        heat=float((spans * duration[touches.sample].astype(np.float64)).sum()) / possible
        if possible
        else 0.0,
        events={},
        loaded=0,
    )


def _covered(touches: Touches) -> int:
    pieces = touches.pieces()
    inside = pieces.summed(np.ones(len(touches.page), np.int64)) > 0
    return int(np.diff(byte_edges(touches.thing, pieces.edges))[inside].sum())


def _paged(trace: Trace, thing: TracedObject) -> ObjectTotals:
    events = trace.events[trace.events["object"] == thing.id]
    counts = np.bincount(events["kind"], minlength=max(EventKind) + 1)
    loads = events["block"][np.isin(events["kind"], LOADS)]
    return ObjectTotals(
        name=thing.name,
        nbytes=thing.nbytes,
        touched=_bytes_of(thing, np.unique(loads)),
        written=_bytes_of(thing, np.unique(events["block"][events["kind"] == EventKind.DIRTY])),
        samples=0,
        touches=0,
        heat=0.0,
        events={kind: int(counts[kind]) for kind in EventKind if counts[kind]},
        loaded=len(loads) * thing.granularity,
    )


def _bytes_of(thing: TracedObject, blocks: Ints) -> int:
    blocks = blocks.astype(np.int64)
    return int((byte_edges(thing, blocks + 1) - byte_edges(thing, blocks)).sum())
