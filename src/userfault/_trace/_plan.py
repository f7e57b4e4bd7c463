"""The plan of a replay: what a recorded run loaded, in the order in which it was needed, as few long reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from userfault._trace._model import LOADS
from userfault.errors import RangeError, TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from userfault._trace._model import Trace, TracedObject

__all__ = ["Plan", "plan"]

# So many loads in a row count as being at the same time: within them order does not matter, and blocks that are
# neighbours become one extent.
_NEAR = 256


@dataclass(frozen=True)
class Plan:
    """What to load, in order. No block is in it twice.

    Attributes:
        extents: First block and how many, for each read.
        block: Bytes of a block.
        nbytes: Bytes of all of them; the last block may be shorter.
        name: The object that it was recorded of.
    """

    extents: tuple[tuple[int, int], ...]
    block: int
    nbytes: int
    name: str

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.extents)

    def __len__(self) -> int:
        return len(self.extents)


def plan(
    trace: Trace,
    object: str | int | None = None,
    *,
    nbytes: int | None = None,
    source: str | None = None,
    block: int | None = None,
    gap: int = 0,
    longest: int = 64 << 20,
    limit: int | None = None,
) -> Plan:
    """Return the blocks that a run loaded, in the order of their first load, as extents.

    All loads count, those ahead of demand too: the trace does not say which of them were for nothing.

    Args:
        trace: The recording.
        object: Name or number of the paged memory. None: the one that `source` and `nbytes` fit.
        nbytes: Size of the memory that is to be filled; the recorded one must have the same.
        source: What its bytes come from, to choose by among several; one that was recorded elsewhere is no mistake.
        block: Bytes of its blocks, if they are others than when it was recorded.
        gap: Bytes between two extents that are rather read than left out.
        longest: Most bytes of an extent.
        limit: Most bytes of the plan: what was needed first stays in.

    Raises:
        RangeError: There is no such object.
        TraceError: The trace has no paged memory, none that fits, or several.
    """
    thing = _chosen(trace, object, nbytes, source)
    block = thing.granularity if block is None else block
    if block < 1 or gap < 0 or longest < 1:
        raise RangeError(
            f"a plan has blocks and extents of at least 1 byte, not {block=}, {gap=}, {longest=}"
        )
    loads = _first_loads(trace, thing, block)
    if limit is not None:
        loads = loads[: limit // block]
    extents = _extents(loads, gap // block, max(1, longest // block))
    blocks = -(-thing.nbytes // block)
    short = blocks * block - thing.nbytes if any(first + count == blocks for first, count in extents) else 0
    return Plan(tuple(extents), block, sum(count for _, count in extents) * block - short, thing.name)


def _chosen(trace: Trace, which: str | int | None, nbytes: int | None, source: str | None) -> TracedObject:
    if which is not None:
        candidates = [trace.object(which)]
        if candidates[0].watched != "faults":
            raise TraceError(
                f"{candidates[0].name!r} is no paged memory in this trace, so it has no loads: record the memory"
            )
    else:
        candidates = [thing for thing in trace.objects if thing.watched == "faults"]
        if not candidates:
            raise TraceError("the trace has no paged memory to replay: record a run that opens one")
    fitting = [thing for thing in candidates if nbytes is None or thing.nbytes == nbytes]
    if not fitting:
        sizes = ", ".join(f"{thing.name!r} ({thing.nbytes} bytes)" for thing in candidates)
        raise TraceError(
            f"the trace has no paged memory of {nbytes} bytes, only {sizes}: record a run with this data"
        )
    if source is not None and len(fitting) > 1:
        fitting = [thing for thing in fitting if thing.source == source] or fitting
    if len(fitting) > 1:
        names = ", ".join(repr(thing.name) for thing in fitting)
        raise TraceError(f"several memories of the trace fit: {names}; say which, by name")
    return fitting[0]


def _first_loads(trace: Trace, thing: TracedObject, block: int) -> NDArray[np.int64]:
    """Return the blocks that were loaded, each once, in the order of their first load, in blocks of this size."""
    events = trace.events[(trace.events["object"] == thing.id) & np.isin(trace.events["kind"], LOADS)]
    loaded = events["block"].astype(np.int64)
    if block != thing.granularity:
        first = loaded * thing.granularity // block
        stop = -(-np.minimum((loaded + 1) * thing.granularity, thing.nbytes) // block)
        count = stop - first
        loaded = np.repeat(first - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
    blocks, where = np.unique(loaded, return_index=True)
    return blocks[np.argsort(where)]


def _extents(loads: NDArray[np.int64], gap: int, longest: int) -> list[tuple[int, int]]:
    if not len(loads):
        return []
    planned = np.zeros(int(loads.max()) + 1, np.bool_)
    extents: list[tuple[int, int]] = []
    for begin in range(0, len(loads), _NEAR):
        near = loads[begin : begin + _NEAR]
        near = near[~planned[near]]
        if not len(near):
            continue
        order = np.argsort(near)
        ascending = near[order]
        # A gap is filled only with blocks that are in no extent yet.
        steps = np.diff(ascending)
        cuts = np.flatnonzero(steps > gap + 1) + 1
        parts = []
        for piece, ranks in zip(np.split(ascending, cuts), np.split(order, cuts), strict=True):
            parts += [
                (int(ranks.min()), *extent)
                for extent in _unplanned(int(piece[0]), int(piece[-1]) + 1, planned)
            ]
        for _, first, stop in sorted(parts):
            planned[first:stop] = True
            extents.append((first, stop - first))
    return _cut(_joined(extents), longest)


def _unplanned(first: int, stop: int, planned: NDArray[np.bool_]) -> list[tuple[int, int]]:
    taken = planned[first:stop]
    if not taken.any():
        return [(first, stop)]
    edges = np.flatnonzero(np.diff(np.concatenate(([True], taken, [True])).astype(np.int8)))
    return [(first + int(a), first + int(b)) for a, b in edges.reshape(-1, 2)]


def _joined(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join extents that follow one another in the plan and in the memory: a scan is one read."""
    joined: list[tuple[int, int]] = []
    for first, count in extents:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def _cut(extents: list[tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    return [
        (first + at, min(longest, count - at)) for first, count in extents for at in range(0, count, longest)
    ]
