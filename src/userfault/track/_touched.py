"""What was touched: the result of all trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from userfault.errors import RangeError, UntrackableError
from userfault.track import _runs
from userfault.track._targets import Target, find_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from userfault.track._runs import Runs

__all__ = ["Found", "Kind", "Touched"]

Kind = Literal["accessed", "written", "read_only"]


@dataclass(frozen=True)
class Found:
    """What was found of one object.

    Attributes:
        accessed: Runs of pages that were touched at all, None if only writes were looked for.
        written: Runs that were written, None if the method cannot tell.
        method: How it was found out (`userfault.track.methods` lists them).
        granularity: Bytes that are told apart: the size of its pages, or of a paged memory's blocks.
        blind: Runs where the method could not look (pinned pages, for example); they count as touched.
        notes: What else must be known of this result, in sentences.
    """

    accessed: Runs | None
    written: Runs | None
    method: str
    granularity: int
    blind: Runs
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Touched:
    """Which pages of the tracked objects were touched in an interval.

    Objects are named by themselves, by another view of the same bytes, or by name; where there is one only, it may be
    left out. Addresses are never told: byte ranges count from the object's beginning.

    Attributes:
        start_ns: When the interval began (CLOCK_MONOTONIC).
        stop_ns: When it ended.
    """

    start_ns: int
    stop_ns: int
    _targets: tuple[Target, ...]
    _found: tuple[Found, ...]

    def _of(self, which: Any) -> tuple[Target, Found]:
        target = find_target(self._targets, which)
        return target, self._found[self._targets.index(target)]

    def _runs(self, which: Any, kind: Kind | None) -> tuple[Target, Runs]:
        target, found = self._of(which)
        if kind is None:
            kind = "written" if found.accessed is None else "accessed"
        if kind not in ("accessed", "written", "read_only"):
            raise RangeError(f"kind {kind!r} is not one of 'accessed', 'written', 'read_only'")
        if kind != "written" and found.accessed is None:
            raise UntrackableError(
                f"{target.name}: only writes were tracked; use track_accesses to see reads"
            )
        if kind != "accessed" and found.written is None:
            raise UntrackableError(
                f"{target.name}: the method {found.method!r} cannot tell reads from writes; choose another with method="
            )
        if kind == "accessed":
            runs = found.accessed
        elif kind == "written":
            runs = found.written
        else:
            assert found.accessed is not None
            assert found.written is not None
            runs = _runs.subtract(found.accessed, found.written)
        assert runs is not None
        return target, runs

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the objects."""
        return tuple(target.name for target in self._targets)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes touched of each object by name: accessed ones, or written ones if only writes were tracked.

        Whole pages, cut at the object's ends.
        """
        return {t.name: sum(stop - start for start, stop in self.ranges(t.name)) for t in self._targets}

    def method(self, which: Any = None) -> str:
        """Return how it was found out."""
        return self._of(which)[1].method

    def granularity(self, which: Any = None) -> int:
        """Return how many bytes are told apart: a touch of one means all of them."""
        return self._of(which)[1].granularity

    def notes(self, which: Any = None) -> tuple[str, ...]:
        """Return what else must be known of the result, in sentences; usually nothing."""
        return self._of(which)[1].notes

    def ranges(self, which: Any = None, kind: Kind | None = None) -> list[tuple[int, int]]:
        """Return the bytes that were touched as (start, stop) from the object's beginning, in ascending order.

        They are whole pages, cut at the object's ends. `shared` says which of them lie on pages that other data shares.

        Args:
            which: The object.
            kind: `"accessed"`, `"written"`, or `"read_only"` (accessed and not written). None: what was tracked.

        Raises:
            UntrackableError: The method cannot tell this kind.
            RangeError: The object is not tracked, or `kind` is none.
        """
        target, runs = self._runs(which, kind)
        inside = _runs.clip(runs, target.address, target.address + target.nbytes) - np.uint64(target.address)
        return [(start, stop) for start, stop in inside.tolist()]

    def shared(self, which: Any = None, kind: Kind | None = None) -> list[tuple[int, int]]:
        """Return the part of `ranges` that lies on pages which the object shares with other data.

        There it may have been the neighbour that was touched: an object that does not begin or end at a page's border
        shares its first or last page, of the size that `granularity` says. Raises as `ranges`.
        """
        target, runs = self._runs(which, kind)
        unit = self.granularity(which)
        inside = _runs.clip(runs, target.address, target.address + target.nbytes)
        inside = _runs.intersect(inside, _runs.runs_of(target.shared_pages(unit)))
        return [(start, stop) for start, stop in (inside - np.uint64(target.address)).tolist()]

    def blind(self, which: Any = None) -> list[tuple[int, int]]:
        """Return where the method could not look, as `ranges` does; these bytes count as touched."""
        target, found = self._of(which)
        inside = _runs.clip(found.blind, target.address, target.address + target.nbytes)
        return [(start, stop) for start, stop in (inside - np.uint64(target.address)).tolist()]

    def mask(self, which: Any = None, kind: Kind | None = None) -> NDArray[np.bool_]:
        """Return one boolean for each piece of `granularity` bytes: whether it was touched.

        Element 0 is the page that holds the object's first byte, so an unaligned object may have one more than its size
        says. Raises as `ranges`.
        """
        target, runs = self._runs(which, kind)
        unit = self.granularity(which)
        start = target.start if target.memory is not None else target.start // unit * unit
        if target.memory is not None:
            memory = target.memory.address
            start = memory + (target.address - memory) // unit * unit
        return _runs.as_mask(runs, start, target.end, unit)

    def slices(self, which: Any = None, kind: Kind | None = None) -> list[slice]:
        """Return what was touched as slices of the array's longest-striding axis: rows of a C-ordered array.

        A slice holds every row that has a byte on a touched page. For an array in Fortran order they are columns;
        `axis` says which axis it is. Objects that are no arrays are taken as bytes. Raises as `ranges`.
        """
        target, _ = self._runs(which, kind)
        ranges = self.ranges(which, kind)
        array = target.array
        if array is None or array.ndim == 0:
            return [slice(start, stop) for start, stop in ranges]
        axis = self.axis(which)
        stride, length = array.strides[axis], array.shape[axis]
        if length <= 1 or stride == 0:
            return [slice(0, length)] if ranges else []
        # From the lowest address up: a row begins at each step and reaches as far as the other axes do.
        step = abs(stride)
        reach = target.nbytes - step * (length - 1)
        found = []
        for start, stop in ranges:
            first = max(0, -(-(start - reach + 1) // step))
            last = min(length, -(-stop // step))
            if last > first:
                found.append((first, last) if stride > 0 else (length - last, length - first))
        return [slice(int(first), int(last)) for first, last in _runs.runs_of(found).tolist()]

    def axis(self, which: Any = None) -> int:
        """Return the axis that `slices` is about: the one with the largest stride, 0 for anything that is no array."""
        array = self._of(which)[0].array
        if array is None or array.ndim == 0:
            return 0
        return max(range(array.ndim), key=lambda k: (abs(array.strides[k]) if array.shape[k] > 1 else -1, -k))

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {count} bytes" for name, count in self.nbytes.items())
        return f"<userfault.track.Touched {parts} in {(self.stop_ns - self.start_ns) / 1e9:.3f} s>"
