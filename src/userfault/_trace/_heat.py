"""Where and when an object was touched: as a matrix for pictures, and as regions that are hot or cold.

Heat is a share of the time: of all the time in which an object was looked at, the part that lies in intervals in which
a page was touched. 1 means touched between any two looks, 0 never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault._trace._model import LOADS, EventKind
from userfault._trace._touches import byte_edges, sampled_objects, touches_of
from userfault.errors import RangeError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from userfault._trace._model import Trace, TracedObject
    from userfault._trace._touches import Kind

    Floats = NDArray[np.float64]

__all__ = ["Region", "cold", "heat_matrix", "hot"]


@dataclass(frozen=True)
class Region:
    """A part of an object that is about equally hot.

    Attributes:
        object: The object's name.
        start: Its first byte, from the object's beginning.
        stop: The byte behind its last one.
        heat: Share of the time in which it was touched, from 0 to 1; the mean of its bytes.
    """

    object: str
    start: int
    stop: int
    heat: float

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.stop - self.start


def hot(
    trace: Trace,
    *,
    at_least: float = 0.5,
    min_bytes: int = 0,
    limit: int | None = None,
    kind: Kind | None = None,
    objects: Iterable[str | int] | str | int | None = None,
) -> list[Region]:
    """Return the regions that were touched often, the hottest first.

    Args:
        trace: The recording.
        at_least: Least heat of a page: the share of the time, 0 to 1. Neighbouring pages that reach it are one region.
        min_bytes: Smaller regions are left out.
        limit: Most regions.
        kind: What counts as a touch: "accessed", "written" or "read_only". None is what was watched for.
        objects: Names or numbers of the objects. None: all that have samples.

    Raises:
        RangeError: There is no such object, it was not watched for this, or a share is none.
    """
    regions = _regions(trace, kind, objects, low=_share(at_least), high=1.0, min_bytes=min_bytes)
    regions.sort(key=lambda region: (-region.heat, -region.nbytes))
    return regions[:limit]


def cold(
    trace: Trace,
    *,
    at_most: float = 0.0,
    min_bytes: int = 0,
    limit: int | None = None,
    kind: Kind | None = None,
    objects: Iterable[str | int] | str | int | None = None,
) -> list[Region]:
    """Return the regions that were touched seldom, by default never, the largest first. Arguments as in `hot`."""
    regions = _regions(trace, kind, objects, low=0.0, high=_share(at_most), min_bytes=min_bytes)
    regions.sort(key=lambda region: -region.nbytes)
    return regions[:limit]


def _share(share: float) -> float:
    if not 0 <= share <= 1:
        raise RangeError(f"a share of the time is between 0 and 1, not {share!r}")
    return share


def _regions(
    trace: Trace,
    kind: Kind | None,
    objects: Iterable[str | int] | str | int | None,
    *,
    low: float,
    high: float,
    min_bytes: int,
) -> list[Region]:
    found = []
    for thing in sampled_objects(trace, objects, kind):
        touches = touches_of(trace, thing, kind)
        duration = touches.duration_ns
        if not len(duration):
            continue
        pieces = touches.pieces()
        heat = pieces.summed(duration[touches.sample]) / duration.sum()
        edges = byte_edges(thing, pieces.edges)
        nbytes = np.diff(edges)
        chosen = (heat >= low) & (heat <= high) & (nbytes > 0)
        borders = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
        weighed = np.concatenate(([0.0], np.cumsum(heat * nbytes)))
        for first, last in borders.reshape(-1, 2).tolist():
            start, stop = int(edges[first]), int(edges[last])
            if stop - start >= min_bytes:
                mean = (
                    float(heat[first])
                    if last == first + 1
                    else float(weighed[last] - weighed[first]) / (stop - start)
                )
                found.append(Region(thing.name, start, stop, min(1.0, max(0.0, mean))))
    return found


def heat_matrix(
    trace: Trace,
    object: str | int,
    time_bins: int,
    space_bins: int,
    kind: Kind | EventKind | Iterable[EventKind] | None = None,
    *,
    start_ns: int = 0,
    stop_ns: int | None = None,
) -> Floats:
    """Return how hot an object was over time and space: the share of each cell that was touched.

    For sampled objects a cell's value is its heat (mean over its pages and the time in which they were looked at); a
    sample that lasts longer than a bin counts in all of them alike. For paged memories it is the share of the cell's
    blocks that had an event in this time.

    Args:
        trace: The recording.
        object: Name or number of the object.
        time_bins: How many columns, equal parts of the time from `start_ns` to `stop_ns`.
        space_bins: How many rows, equal parts of the object's pages.
        kind: What counts: "accessed", "written", "read_only"; for paged memories one or more of `EventKind`, or
            "written" for first writes. None is what was watched for, or for paged memories every load.
        start_ns: Where the first column begins.
        stop_ns: Where the last one ends. None: with the trace.

    Returns:
        Shape (space_bins, time_bins), values from 0 to 1, row 0 at the object's beginning. NaN where nothing is known:
        the object was not there, or not looked at.

    Raises:
        RangeError: There is no such object, it was not watched for this, or there are no bins.
    """
    thing = trace.object(object)
    stop_ns = trace.duration_ns if stop_ns is None else stop_ns
    if time_bins < 1 or space_bins < 1:
        raise RangeError(f"a matrix needs bins, not {space_bins} by {time_bins}")
    stop_ns = max(stop_ns, start_ns + 1)
    axis = _TimeAxis(start_ns, stop_ns, time_bins)
    if thing.watched == "faults":
        return _event_matrix(trace, thing, axis, space_bins, kind)
    if kind is not None and not isinstance(kind, str):
        raise RangeError(
            f"{thing.name!r} is no paged memory: it has no events {kind!r}; use kind='accessed' or 'written'"
        )
    sampled_objects(trace, thing.id, kind)
    return _sample_matrix(trace, thing, axis, space_bins, kind)


@dataclass(frozen=True)
class _TimeAxis:
    start_ns: int
    stop_ns: int
    bins: int

    def __call__(self, t_ns: NDArray[Any]) -> Floats:
        """Times in units of bins."""
        # The division comes last, here and for space: what is on a border must not land beside it.
        bins = (t_ns - self.start_ns) * float(self.bins) / (self.stop_ns - self.start_ns)
        return np.clip(bins, 0.0, float(self.bins))


def _ramps(x: Floats, bins: int) -> list[tuple[NDArray[np.int64], Floats]]:
    # What lies behind position x, as the difference from each bin to the next: (1 - f) of its own bin and f more of the
    # one behind. A range is what lies behind its start less what lies behind its end.
    k = np.minimum(x.astype(np.int64), bins - 1)
    f = x - k
    return [(k, 1 - f), (k + 1, f)]


def _observed(start: Floats, stop: Floats, bins: int) -> Floats:
    steps = np.zeros(bins + 1)
    for sign, x in ((1.0, start), (-1.0, stop)):
        for k, weight in _ramps(x, bins):
            steps += sign * np.bincount(k, weight, bins + 1)
    return np.cumsum(steps)[:-1]


def _area(t0: Floats, t1: Floats, s0: Floats, s1: Floats, time_bins: int, space_bins: int) -> Floats:
    """Return the area of rectangles in each cell of a grid; exactly 0 where none reaches."""
    width = time_bins + 1
    cells = (space_bins + 1) * width
    steps, reached = np.zeros(cells), np.zeros(cells)
    for sign_s, s in ((1.0, s0), (-1.0, s1)):
        for sign_t, t in ((1.0, t0), (-1.0, t1)):
            for row, of_row in _ramps(s, space_bins):
                for column, of_column in _ramps(t, time_bins):
                    steps += sign_s * sign_t * np.bincount(row * width + column, of_row * of_column, cells)
            # Which cells any of them reaches is counted in whole numbers: no rounding makes a touch out of nothing.
            row = (s if sign_s > 0 else np.ceil(s)).astype(np.int64)
            column = (t if sign_t > 0 else np.ceil(t)).astype(np.int64)
            reached += sign_s * sign_t * np.bincount(row * width + column, minlength=cells)
    area, count = (
        np.cumsum(np.cumsum(table.reshape(space_bins + 1, width), axis=0), axis=1)[:-1, :-1]
        for table in (steps, reached)
    )
    return np.where(count > 0.5, np.maximum(area, 0.0), 0.0)


def _sample_matrix(
    trace: Trace, thing: TracedObject, axis: _TimeAxis, space_bins: int, kind: Kind | None
) -> Floats:
    touches = touches_of(trace, thing, kind)
    start, stop = axis(touches.start_ns), axis(touches.start_ns + touches.duration_ns)
    observed = _observed(start, stop, axis.bins)
    s0 = touches.page * space_bins / thing.pages
    s1 = (touches.page + touches.count) * space_bins / thing.pages
    inside = stop[touches.sample] > start[touches.sample]
    t0, t1 = start[touches.sample][inside], stop[touches.sample][inside]
    area = _area(t0, t1, s0[inside], s1[inside], axis.bins, space_bins)
    known = observed > 1e-9
    matrix = np.full((space_bins, axis.bins), np.nan)
    matrix[:, known] = np.minimum(area[:, known] / observed[known], 1.0)
    return matrix


def _event_matrix(
    trace: Trace,
    thing: TracedObject,
    axis: _TimeAxis,
    space_bins: int,
    kind: Kind | EventKind | Iterable[EventKind] | None,
) -> Floats:
    if kind is None or kind == "accessed":
        kinds: list[int] = list(LOADS)
    elif kind == "written":
        kinds = [EventKind.DIRTY]
    elif isinstance(kind, EventKind):
        kinds = [kind]
    elif isinstance(kind, str):
        raise RangeError(
            f"{thing.name!r} is a paged memory: what was {kind!r} is not known; use one of EventKind"
        )
    else:
        kinds = [EventKind(one) for one in kind]
    events = trace.events[(trace.events["object"] == thing.id) & np.isin(trace.events["kind"], kinds)]
    events = events[(events["t_ns"] >= axis.start_ns) & (events["t_ns"] < axis.stop_ns)]
    column = np.minimum(axis(events["t_ns"]).astype(np.int64), axis.bins - 1)
    once = np.unique(column * thing.pages + np.minimum(events["block"], thing.pages - 1))
    column, block = np.divmod(once, thing.pages)
    s0, s1 = block * space_bins / thing.pages, (block + 1) * space_bins / thing.pages
    t0 = column.astype(np.float64)
    matrix = np.minimum(_area(t0, t0 + 1, s0, s1, axis.bins, space_bins), 1.0)
    born, died = axis(
        np.array([thing.born_ns, trace.duration_ns if thing.died_ns is None else thing.died_ns])
    )
    matrix[:, : int(born)] = np.nan
    matrix[:, int(np.ceil(died)) :] = np.nan
    return matrix
