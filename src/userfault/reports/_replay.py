"""Replay a trace: which blocks were resident when, and how often each kind of event happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault.reports._recording import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from userfault.reports._recording import Recording

__all__ = ["Changes", "changes", "count", "occupancy", "resident_over_time", "touched_blocks"]


@dataclass(frozen=True, slots=True)
class Changes:
    """The moments at which a block came or went, ordered by time.

    Attributes:
        seconds: When, since the recording's start.
        block: Which.
        delta: +1 it became resident, -1 it left.
        at_start: Blocks that were resident already when the trace began.
    """

    seconds: NDArray[np.float64]
    block: NDArray[np.int64]
    delta: NDArray[np.int8]
    at_start: NDArray[np.int64]


def _ordered(recording: Recording) -> NDArray[Any]:
    events = recording.events
    return events[np.argsort(events["t_ns"], kind="stable")]


def changes(recording: Recording) -> Changes:
    """Find every change of residency.

    A block that is loaded while it is resident (two threads asked for it) or dropped while it is absent is no
    change. A block whose first event is its eviction, or a write, was resident before the trace began.
    """
    events = _ordered(recording)
    seconds = (events["t_ns"].astype(np.int64) - recording.start_ns) / 1e9
    block = events["block"].astype(np.int64)
    present = (events["kind"] != Kind.EVICT) & (events["kind"] != Kind.POISON)
    by_block = np.argsort(block, kind="stable")  # stays ordered by time within a block
    sorted_block, sorted_present = block[by_block], present[by_block]
    first = np.ones(len(events), bool)
    first[1:] = sorted_block[1:] != sorted_block[:-1]
    before = np.zeros(len(events), bool)
    before[1:] = sorted_present[:-1]
    # Only what is resident can be dropped, written to, or written back.
    was_there = np.isin(events["kind"][by_block], (Kind.EVICT, Kind.DIRTY, Kind.WRITE))
    before[first] = was_there[first]
    delta = np.empty(len(events), np.int8)
    delta[by_block] = sorted_present.astype(np.int8) - before.astype(np.int8)
    changed = delta != 0
    return Changes(seconds[changed], block[changed], delta[changed], sorted_block[first & was_there])


def resident_over_time(recording: Recording) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the times, in seconds, at which the resident bytes changed, and the bytes from then on."""
    found = changes(recording)
    level = (len(found.at_start) + np.cumsum(found.delta.astype(np.int64))) * recording.block
    times = np.concatenate(([0.0], found.seconds, [recording.seconds]))
    start = len(found.at_start) * recording.block
    last = level[-1] if len(level) else start
    return times, np.concatenate(([start], level, [last]))


def occupancy(recording: Recording, columns: int, rows: int) -> NDArray[np.float32]:
    """Return which share of each cell of a time × address grid was resident, as `(rows, columns)`.

    Row 0 is address 0. A share is taken at its column's end: what came and went within one is not seen.
    """
    found = changes(recording)
    own, shown = _grid_rows(recording, rows)
    grid = np.zeros((own, columns + 1), np.int32)
    column = np.clip(_column_of(recording, found.seconds, columns), 0, columns)
    np.add.at(grid, (_row_of(recording, found.block, own), column), found.delta)
    np.add.at(grid[:, 0], _row_of(recording, found.at_start, own), 1)
    resident = np.cumsum(grid, axis=1)[:, :columns]
    per_row = np.bincount(_row_of(recording, np.arange(recording.blocks), own), minlength=own)
    share: NDArray[np.float32] = (resident / np.maximum(per_row, 1)[:, None]).astype(np.float32)
    return share[shown]


def count(recording: Recording, kind: Kind, columns: int, rows: int) -> NDArray[np.int64]:
    """Count the events of one kind in each cell of a time × address grid, as `(rows, columns)`."""
    events = recording.events[recording.events["kind"] == kind]
    own, shown = _grid_rows(recording, rows)
    seconds = (events["t_ns"].astype(np.int64) - recording.start_ns) / 1e9
    column = np.clip(_column_of(recording, seconds, columns), 0, columns - 1)
    row = _row_of(recording, events["block"].astype(np.int64), own)
    cells = np.bincount(row * columns + column, minlength=own * columns).reshape(own, columns)
    return cells[shown]


def touched_blocks(recording: Recording, start_ns: int | None = None, end_ns: int | None = None) -> int:
    """Count the distinct blocks that were loaded, whatever for, within a stretch of time."""
    events = recording.events
    wanted = np.isin(events["kind"], (Kind.DEMAND, Kind.READAHEAD, Kind.PREFETCH, Kind.REPLAY))
    if start_ns is not None:
        wanted &= events["t_ns"] >= start_ns
    if end_ns is not None:
        wanted &= events["t_ns"] < end_ns
    return len(np.unique(events["block"][wanted]))


def _grid_rows(recording: Recording, rows: int) -> tuple[int, NDArray[np.int64]]:
    """Return how many rows have a block of their own, and which of those each drawn row shows."""
    own = max(1, min(rows, recording.blocks))
    return own, np.arange(rows) * own // rows


def _row_of(recording: Recording, block: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    return np.clip(block * rows // max(recording.blocks, 1), 0, rows - 1)


def _column_of(recording: Recording, seconds: NDArray[np.float64], columns: int) -> NDArray[np.int64]:
    return np.floor(seconds / max(recording.seconds, 1e-9) * columns).astype(np.int64)
