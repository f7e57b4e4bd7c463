"""The working set: how much memory a program touches in a window of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault._trace._touches import byte_edges, sampled_objects, touches_of
from userfault.errors import RangeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from userfault._trace._model import Trace
    from userfault._trace._touches import Ints, Kind, Touches

__all__ = ["WorkingSet", "working_set"]

# Pairs of a sample and a piece that are held at a time.
_PAIRS = 1 << 21


@dataclass(frozen=True, eq=False)
class WorkingSet:
    """Bytes touched in a window that moves over time.

    Attributes:
        times_ns: When the window ends: the end of each sample, in nanoseconds from the trace's beginning.
        nbytes: Bytes that were touched in the window before; each counts once. Whole pages, cut at the object's ends.
        lasts_ns: How long each value stands for: the time since the one before.
        window_ns: Length of the window; None if it is the interval between two looks.
        by_object: Of these bytes, those of each object, by name.
    """

    times_ns: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    lasts_ns: NDArray[np.int64]
    window_ns: int | None
    by_object: dict[str, NDArray[np.int64]]

    @property
    def peak(self) -> int:
        """The most bytes, 0 if there are no samples."""
        return int(self.nbytes.max(initial=0))

    @property
    def mean(self) -> float:
        """Mean over the time, 0 if there are no samples."""
        return float(np.average(self.nbytes, weights=self.lasts_ns)) if len(self.nbytes) else 0.0

    def percentiles(self, percents: Iterable[float] = (0, 25, 50, 75, 95, 99, 100)) -> dict[float, int]:
        """Return the bytes that the working set does not exceed for so many percent of the time.

        Raises:
            RangeError: A percent is not between 0 and 100.
        """
        order = np.argsort(self.nbytes, kind="stable")
        reached = np.cumsum(self.lasts_ns[order])
        found = {}
        for percent in percents:
            if not 0 <= percent <= 100:
                raise RangeError(f"a percentile is between 0 and 100, not {percent!r}")
            if not len(order):
                found[percent] = 0
                continue
            at = int(np.searchsorted(reached, reached[-1] * percent / 100))
            found[percent] = int(self.nbytes[order[min(at, len(order) - 1)]])
        return found


def working_set(
    trace: Trace,
    window: float | None = None,
    *,
    kind: Kind | None = None,
    objects: Iterable[str | int] | str | int | None = None,
) -> WorkingSet:
    """Return how many bytes were touched in a sliding window.

    A sample says that its pages were touched between two looks, not when; they count from the second look on, for the
    length of the window. So a window is good to one interval, and one that is shorter than the intervals is one
    interval. What is gone (a freed array) does not count any more.

    Args:
        trace: The recording.
        window: Length of the window in seconds. None: the interval between two looks.
        kind: What counts as a touch: "accessed", "written" or "read_only". None is what was watched for.
        objects: Names or numbers of the objects. None: all that have samples.

    Raises:
        RangeError: The window has no length, there is no such object, or it was not watched for this.
    """
    if window is not None and not window > 0:
        raise RangeError(f"a window is longer than 0 seconds, not {window!r}")
    window_ns = None if window is None else max(1, round(window * 1e9))
    things = sampled_objects(trace, objects, kind)
    found = [touches_of(trace, thing, kind) for thing in things]
    times = np.unique(np.concatenate([touches.stop_ns for touches in found] or [np.zeros(0, np.int64)]))
    by_object: dict[str, Ints] = {}
    for touches in found:  # names need not be different
        curve = _curve(touches, times, window_ns)
        by_object[touches.thing.name] = curve + by_object.get(touches.thing.name, 0)
    starts = [int(touches.start_ns[0]) for touches in found if len(touches.start_ns)]
    lasts = np.diff(times, prepend=min(starts, default=0))
    return WorkingSet(
        times_ns=times,
        nbytes=sum(by_object.values(), np.zeros(len(times), np.int64)),
        lasts_ns=np.maximum(lasts, 1),
        window_ns=window_ns,
        by_object=by_object,
    )


def _curve(touches: Touches, times: Ints, window_ns: int | None) -> Ints:
    """Return the bytes of one object that are in the window at each of the times."""
    thing = touches.thing
    if not len(touches.stop_ns):
        return np.zeros(len(times), np.int64)
    # A sample's pages count from its own end until just before the end of their window. With several objects there are
    # times between: there its last sample holds.
    begins = np.searchsorted(times, touches.stop_ns)
    following = np.append(begins[1:], len(times))
    ends = following
    if window_ns is not None:
        # At least to the object's own next look: a shorter window is one interval.
        ends = np.maximum(np.searchsorted(times, touches.stop_ns + window_ns), following)
    if thing.died_ns is not None:
        # The last sample ends when the object does, and it was touched in there.
        alive = np.searchsorted(times, thing.died_ns, side="right")
        ends = np.maximum(np.minimum(ends, alive), np.minimum(begins + 1, len(times)))
    steps = np.zeros(len(times) + 1, np.int64)
    if window_ns is None:
        spans = byte_edges(thing, touches.page + touches.count) - byte_edges(thing, touches.page)
        nbytes = np.zeros(len(begins), np.int64)
        np.add.at(nbytes, touches.sample, spans)
        np.add.at(steps, begins, nbytes)
        np.subtract.at(steps, ends, nbytes)
    else:
        _slide(touches, begins, ends, steps)
    return np.cumsum(steps)[:-1]


def _slide(touches: Touches, begins: Ints, ends: Ints, steps: Ints) -> None:
    # Piece by piece in the order of time: one that is touched again while it still counts goes on counting; otherwise
    # it counts from here.
    pieces = touches.pieces()
    nbytes = np.diff(byte_edges(touches.thing, pieces.edges))
    until = np.full(len(nbytes), -1, np.int64)
    for piece, sample in _pairs(pieces.first, pieces.last, touches.sample):
        # By piece, and then by time: to sort such numbers is several times as fast as a stable argsort.
        order = np.sort((piece << 32) | np.arange(len(piece))) & 0xFFFFFFFF
        piece, sample = piece[order], sample[order]
        changes = np.flatnonzero(np.diff(piece)) + 1
        firsts = np.concatenate(([0], changes))
        lasts = np.append(changes, len(piece)) - 1
        end = ends[sample]
        before = np.empty(len(piece), np.int64)
        before[1:] = end[:-1]
        before[firsts] = until[piece[firsts]]
        begin = np.maximum(begins[sample], before)
        fresh = begin < end
        np.add.at(steps, begin[fresh], nbytes[piece[fresh]])
        np.subtract.at(steps, end[fresh], nbytes[piece[fresh]])
        until[piece[lasts]] = end[lasts]


def _pairs(first: Ints, last: Ints, sample: Ints) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield pieces and samples that belong together, in the order of the runs, a bounded number at a time."""
    lengths = last - first
    total = np.cumsum(lengths)
    begin = 0
    while begin < len(first):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + _PAIRS, side="right")))
        count = lengths[begin:end]
        offset = np.repeat(first[begin:end] - (np.cumsum(count) - count), count)
        yield offset + np.arange(len(offset)), np.repeat(sample[begin:end], count)
        begin = end
