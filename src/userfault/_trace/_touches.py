"""What a trace says of one object: the pages of all its samples, and the pieces between the edges of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from userfault.errors import RangeError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from userfault._trace._model import Trace, TracedObject

    Ints = NDArray[np.int64]

__all__ = ["Kind", "Pieces", "Touches", "byte_edges", "sampled_objects", "touches_of"]

Kind = Literal["accessed", "written", "read_only"]

_FEW = 1 << 22


@dataclass(frozen=True)
class Touches:
    """The runs of pages of one object.

    Attributes:
        thing: The object.
        start_ns: Of each sample, by time.
        stop_ns: Likewise.
        page: First page of each run, sample by sample.
        count: How many pages it has.
        sample: The sample that it belongs to.
    """

    thing: TracedObject
    start_ns: Ints
    stop_ns: Ints
    page: Ints
    count: Ints
    sample: Ints

    @property
    def duration_ns(self) -> Ints:
        """How long each sample took, at least one nanosecond."""
        duration: Ints = np.maximum(self.stop_ns - self.start_ns, 1)
        return duration

    def pieces(self) -> Pieces:
        """Return the object in pieces that lie wholly inside or outside of each run."""
        ends, pages = self.page + self.count, self.thing.pages
        if pages > max(_FEW, 4 * len(ends)):
            edges = np.unique(np.concatenate(([0, pages], self.page, ends)))
            return Pieces(edges, np.searchsorted(edges, self.page), np.searchsorted(edges, ends))
        # Many runs for the size: a table of all pages is faster than a search.
        begins = np.zeros(pages + 1, np.bool_)
        begins[[0, pages]] = begins[self.page] = begins[ends] = True
        number = np.cumsum(begins) - 1
        return Pieces(np.flatnonzero(begins), number[self.page], number[ends])


@dataclass(frozen=True)
class Pieces:
    """An object in pieces.

    Attributes:
        edges: The pages at which pieces begin, and the end.
        first: Of each run, the first piece in it.
        last: The first one behind it.
    """

    edges: Ints
    first: Ints
    last: Ints

    def summed(self, weights: Ints) -> Ints:
        """Return for each piece the sum of the weights of the runs that hold it."""
        steps = np.zeros(len(self.edges), np.int64)
        np.add.at(steps, self.first, weights)
        np.subtract.at(steps, self.last, weights)
        return np.cumsum(steps)[:-1]


def byte_edges(thing: TracedObject, pages: NDArray[Any]) -> Ints:
    """Return where pages begin, in bytes from the object's beginning and inside of it."""
    return np.clip(pages.astype(np.int64) * thing.granularity - thing.lead, 0, thing.nbytes)


def can_tell(thing: TracedObject, kind: Kind | None) -> bool:
    """Whether samples of this object tell this kind of touch."""
    if thing.watched == "faults":
        return False
    if kind is None:
        return True
    if thing.watched == "writes":
        return kind == "written"
    return kind == "accessed" or thing.tells_writes


def sampled_objects(
    trace: Trace, objects: Iterable[str | int] | str | int | None, kind: Kind | None
) -> list[TracedObject]:
    """Return the objects that are meant: those named, or all that have samples of this kind.

    Raises:
        RangeError: There is no such object, or it has no such samples.
    """
    if kind not in (None, "accessed", "written", "read_only"):
        raise RangeError(f"kind {kind!r} is not one of 'accessed', 'written', 'read_only'")
    if objects is None:
        found = [thing for thing in trace.objects if can_tell(thing, kind)]
        if not found and trace.objects:
            raise RangeError(f"no object of this trace has samples of what was {kind or 'touched'}")
        return found
    if isinstance(objects, (str, int)):
        objects = [objects]
    found = [trace.object(which) for which in objects]
    for thing in found:
        if not can_tell(thing, kind):
            raise RangeError(
                f"{thing.name!r} was watched for {thing.watched} only: what was {kind or 'touched'} is not known"
            )
    return found


def touches_of(trace: Trace, thing: TracedObject, kind: Kind | None = None) -> Touches:
    """Return what the samples of an object say; kind None is what was watched for."""
    rows = trace.samples[trace.samples["object"] == thing.id]
    counts = rows["runs"].astype(np.int64)
    sample = np.repeat(np.arange(len(rows)), counts)
    index = np.arange(len(sample)) + np.repeat(
        rows["first"].astype(np.int64) - np.cumsum(counts) + counts, counts
    )
    runs = trace.runs[index]
    if kind in ("written", "read_only"):
        wanted = runs["written"] == (kind == "written")
        runs, sample = runs[wanted], sample[wanted]
    return Touches(
        thing,
        rows["start_ns"].astype(np.int64),
        rows["stop_ns"].astype(np.int64),
        runs["page"].astype(np.int64),
        runs["count"].astype(np.int64),
        sample,
    )
