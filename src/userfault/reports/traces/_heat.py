"""The heat map's numbers: time × address × how much was touched, for each object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from userfault._trace import EventKind, heat_matrix
from userfault.reports._palette import KINDS
from userfault.reports._recording import Recording
from userfault.reports._replay import count, occupancy
from userfault.reports.traces._findings import finding
from userfault.reports.traces._panels import Heatmap, HeatStrip

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from userfault._trace import Trace, TracedObject
    from userfault.reports.traces._objects import Group

__all__ = ["READ", "WRITTEN", "AnyKind", "Canvas", "heat_map", "loads", "recording_of"]

AnyKind = Literal["accessed", "written", "read_only"] | None

NOTHING, READ, WRITTEN, BOTH, TOUCHED, RESIDENT = range(6)
# A cell is "read" or "written" if nearly all that was touched in it was.
_NEARLY = 0.9


@dataclass(frozen=True)
class Canvas:
    """What there is to draw on, in cells.

    Attributes:
        columns: How many moments.
        rows: How many rows for all objects, gaps not included.
        least: The fewest rows of an object.
        multiple: Objects take multiples of this many rows.
        spread: How many cells to each side an event takes too, where cells are too small to be seen.
        grow_to: Rows there may be instead, if there are many objects.
    """

    columns: int
    rows: int
    least: int = 2
    multiple: int = 1
    spread: int = 0
    grow_to: int = 0

    @property
    def most(self) -> int:
        """How many objects have room."""
        return max(1, max(self.rows, self.grow_to) // self.least)

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Divide the rows among objects by their sizes, at least `least` for each."""
        if not sizes:
            return []
        rows = max(self.rows, min(self.grow_to, 2 * self.least * len(sizes)))
        spare = max(rows - self.least * len(sizes), 0)
        total = sum(sizes) or 1
        return [self.least + int(spare * size / total) // self.multiple * self.multiple for size in sizes]


def heat_map(trace: Trace, shown: Sequence[Group], canvas: Canvas, kind: AnyKind) -> Heatmap:
    """Bin a trace."""
    drawn = canvas.share([group.first.nbytes for group in shown])
    strips = tuple(_strip(trace, group, canvas, rows, kind) for group, rows in zip(shown, drawn, strict=True))
    return Heatmap(trace.duration_ns / 1e9, strips)


def _strip(trace: Trace, group: Group, canvas: Canvas, drawn: int, kind: AnyKind) -> HeatStrip:
    first = group.first
    rows = max(1, min(drawn, first.pages))
    kinds = None
    if first.watched == "faults":
        recordings = (recording_of(trace, one) for one in group.objects)
        heat, hue, kinds = loads(recordings, canvas, rows, drawn)
    else:
        heat, hue = _touches(trace, group, canvas.columns, rows, kind)
    itemsize = 0
    if first.shape and first.shape[0]:
        itemsize = first.nbytes // first.shape[0]
    return HeatStrip(
        group.label,
        group.about,
        finding(trace, group),
        first.nbytes,
        first.pages * first.granularity,
        first.lead,
        itemsize,
        group.lives(trace),
        drawn,
        heat,
        hue,
        kinds,
    )


def _touches(
    trace: Trace, group: Group, columns: int, rows: int, kind: AnyKind
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    heat = _matrix(trace, group, columns, rows, kind)
    hue = np.full(heat.shape, TOUCHED, np.uint8)
    if kind == "written" or (kind is None and not group.tells_reads):
        hue[:] = WRITTEN
    elif kind == "read_only":
        hue[:] = READ
    elif kind is None and group.tells_writes:
        share = _matrix(trace, group, columns, rows, "written") / np.maximum(heat, 1e-12)
        hue[:] = BOTH
        hue[share >= _NEARLY] = WRITTEN
        hue[share <= 1 - _NEARLY] = READ
    hue[heat <= 0] = NOTHING
    return heat.astype(np.float32), hue


def _matrix(trace: Trace, group: Group, columns: int, rows: int, kind: AnyKind) -> NDArray[np.float64]:
    heat = np.zeros((rows, columns))
    duration = max(trace.duration_ns, 1)
    for one in group.objects:
        if not one.pages:
            continue
        # Only the columns in which it was there: there may be thousands of temporaries.
        first = min(one.born_ns * columns // duration, columns - 1)
        died = duration if one.died_ns is None else one.died_ns
        last = min(max(-(-died * columns // duration), first + 1), columns)
        start, stop = first * duration // columns, last * duration // columns
        own = heat_matrix(trace, one.id, last - first, rows, kind, start_ns=start, stop_ns=stop)
        heat[:, first:last] = np.fmax(heat[:, first:last], own)
    return heat


def loads(
    recordings: Iterable[Recording], canvas: Canvas, rows: int, drawn: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return what was resident, as heat and hue, and the events that matter most, of memories one after another."""
    columns = canvas.columns
    heat = np.zeros((rows, columns), np.float32)
    kinds = np.zeros((rows, columns), np.uint8)
    # Rows that are drawn larger than they are need no more of it.
    spread_rows = canvas.spread if drawn < 3 * rows else 0
    for recording in recordings:
        heat = np.maximum(heat, occupancy(recording, columns, rows))
        for kind in KINDS:
            happened = count(recording, kind, columns, rows) > 0
            # Where blocks come and go together, that they are there says more than that some went.
            happened &= (heat == 0) | (kind is not EventKind.EVICT)
            kinds[_spread(happened, spread_rows, canvas.spread)] = kind
    hue = np.where(heat > 0, RESIDENT, NOTHING).astype(np.uint8)
    return heat, hue, kinds


def _spread(cells: NDArray[np.bool_], down: int, across: int) -> NDArray[np.bool_]:
    rows, columns = cells.shape
    wide = np.zeros((rows + 2 * down, columns + 2 * across), bool)
    for row in range(2 * down + 1):
        for column in range(2 * across + 1):
            wide[row : row + rows, column : column + columns] |= cells
    return wide[down : down + rows, across : across + columns]


def recording_of(trace: Trace, one: TracedObject) -> Recording:
    """Return the events of one paged memory."""
    events = trace.events[trace.events["object"] == one.id]
    return Recording(
        one.name, one.pages * one.granularity, one.granularity, None, events, 0, trace.duration_ns
    )
