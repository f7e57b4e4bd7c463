"""Sets of pages as runs: sorted, disjoint (start, end) addresses in an array of shape (n, 2), uint64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    Runs = NDArray[np.uint64]

__all__ = [
    "EMPTY",
    "as_mask",
    "clip",
    "from_mask",
    "intersect",
    "joined",
    "pieces",
    "runs_of",
    "subtract",
    "total",
    "union",
]

EMPTY: Runs = np.zeros((0, 2), np.uint64)
EMPTY.setflags(write=False)


def runs_of(pairs: Iterable[tuple[int, int]] | NDArray[Any]) -> Runs:
    """Return the runs of (start, end) pairs in any order; those that overlap or touch are joined."""
    pairs = np.asarray(pairs if isinstance(pairs, np.ndarray) else list(pairs), np.uint64).reshape(-1, 2)
    pairs = pairs[pairs[:, 1] > pairs[:, 0]]
    if len(pairs) < 2:
        return pairs
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(pairs[:, 1])
    begins = np.concatenate(([True], pairs[1:, 0] > reach[:-1]))
    lasts = np.append(np.flatnonzero(begins)[1:] - 1, len(pairs) - 1)
    return np.column_stack((pairs[begins, 0], reach[lasts]))


def joined(starts: NDArray[np.uint64], ends: NDArray[np.uint64]) -> Runs:
    """Return the runs of what is sorted and disjoint already; those that touch are joined."""
    count = len(starts)
    if not count:
        return EMPTY
    apart = starts[1:] != ends[:-1]
    if not apart.all():
        edge = np.ones(1, np.bool_)
        starts, ends = starts[np.concatenate((edge, apart))], ends[np.concatenate((apart, edge))]
        count = len(starts)
    runs = np.empty((count, 2), np.uint64)
    runs[:, 0], runs[:, 1] = starts, ends
    return runs


def pieces(runs: Runs, bounds: Sequence[tuple[int, int]]) -> list[Runs]:
    """Return what lies in each of the [start, end)."""
    if not len(runs):
        return [runs] * len(bounds)
    if len(bounds) == 1:
        return [clip(runs, *bounds[0])]
    starts, ends = np.ascontiguousarray(runs[:, 0]), np.ascontiguousarray(runs[:, 1])
    found = []
    for start, end in bounds:
        first = int(np.searchsorted(ends, np.uint64(start), "right"))
        last = int(np.searchsorted(starts, np.uint64(end), "left"))
        found.append(clip(runs[first:last], start, end))
    return found


def union(a: Runs, b: Runs) -> Runs:
    """Return what is in either."""
    if not len(a) or not len(b):
        return b if len(b) else a
    return runs_of(np.concatenate((a, b)))


def _combined(a: Runs, b: Runs, wanted_b: bool) -> Runs:
    # A sweep over all edges: how many of each are open from one edge to the next.
    edges = np.concatenate((a[:, 0], a[:, 1], b[:, 0], b[:, 1]))
    steps = np.zeros((len(edges), 2), np.int64)
    n, m = len(a), len(b)
    steps[:n, 0], steps[n : 2 * n, 0] = 1, -1
    steps[2 * n : 2 * n + m, 1], steps[2 * n + m :, 1] = 1, -1
    order = np.argsort(edges, kind="stable")
    edges, open_ = edges[order], np.cumsum(steps[order], axis=0)
    inside = (open_[:-1, 0] > 0) & ((open_[:-1, 1] > 0) == wanted_b) & (edges[1:] > edges[:-1])
    return runs_of(np.column_stack((edges[:-1][inside], edges[1:][inside])))


def intersect(a: Runs, b: Runs) -> Runs:
    """Return what is in both."""
    return _combined(a, b, True) if len(a) and len(b) else EMPTY


def subtract(a: Runs, b: Runs) -> Runs:
    """Return what is in `a` and not in `b`."""
    return _combined(a, b, False) if len(a) and len(b) else a


def clip(runs: Runs, start: int, end: int) -> Runs:
    """Return what lies in [start, end)."""
    if not len(runs) or (start <= runs[0, 0] and runs[-1, 1] <= end):
        return runs
    cut = np.clip(runs, np.uint64(start), np.uint64(end))
    return cut[cut[:, 1] > cut[:, 0]]


def total(runs: Runs) -> int:
    """Return how many bytes they hold."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def as_mask(runs: Runs, start: int, end: int, unit: int) -> NDArray[np.bool_]:
    """Return one boolean for each `unit` bytes of [start, end): whether a byte of it is in the runs."""
    count = -(-(end - start) // unit)
    steps = np.zeros(count + 1, np.int32)
    inside = clip(runs, start, end)
    if len(inside):
        first = (inside[:, 0] - np.uint64(start)) // np.uint64(unit)
        last = (inside[:, 1] - np.uint64(start) + np.uint64(unit - 1)) // np.uint64(unit)
        np.add.at(steps, first.astype(np.int64), 1)
        np.add.at(steps, last.astype(np.int64), -1)
    return np.cumsum(steps[:-1]) > 0


def from_mask(mask: NDArray[np.bool_], start: int, unit: int) -> Runs:
    """Return the runs of what is set, if element i stands for `unit` bytes from `start` + i * `unit`."""
    edges = np.flatnonzero(
        np.diff(np.concatenate(([False], np.asarray(mask, np.bool_), [False])).astype(np.int8))
    )
    return (np.uint64(start) + edges.astype(np.uint64) * np.uint64(unit)).reshape(-1, 2)
