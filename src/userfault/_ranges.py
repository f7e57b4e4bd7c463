"""Which blocks of a memory a request means: byte ranges, slices, or arrays that are views of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from userfault.errors import RangeError

if TYPE_CHECKING:
    from userfault._observed import ObservedMemory

__all__ = ["Where", "block_runs"]

# Everything, bytes start to stop, bytes as a slice or range of step 1, or a view.
Where = "None | tuple[int, int] | slice | range | np.ndarray[Any, Any]"

# A view with more separate pieces than this is taken as the range from its first byte to its last.
_MOST_PIECES = 1 << 20


def block_runs(memory: ObservedMemory, where: object) -> list[tuple[int, int]]:
    """Return runs (first block, count) of `memory` that hold `where`, in ascending order and apart.

    Raises:
        RangeError: `where` is not inside the memory.
        TypeError: `where` is nothing of the kind.
    """
    if where is None:
        return [(0, memory.nblocks)]
    if isinstance(where, tuple | slice | range):
        start, stop = _byte_range(memory, where)
        return [_blocks_of(memory, start, stop)] if stop > start else []
    if hasattr(where, "__array_interface__") and hasattr(where, "strides"):
        return _view_runs(memory, where)
    raise TypeError(
        f"{where!r} says no part of a memory: give None, (start, stop) in bytes, a slice or range of bytes, or an "
        "array that is a view of it"
    )


def _byte_range(memory: ObservedMemory, where: tuple[int, ...] | slice | range) -> tuple[int, int]:
    if isinstance(where, slice):
        if where.step not in (None, 1):
            raise RangeError(f"{where}: a slice of bytes has step 1")
        return slice(where.start, where.stop).indices(memory.nbytes)[:2]
    if isinstance(where, range):
        if where.step != 1:
            raise RangeError(f"{where}: a range of bytes has step 1")
        start, stop = where.start, where.stop
    else:
        if len(where) != 2:
            raise RangeError(f"{where}: give (start, stop) in bytes")
        start, stop = where
    if not 0 <= start <= stop <= memory.nbytes:
        raise RangeError(
            f"bytes [{start}, {stop}) are not inside {memory.name}, which has {memory.nbytes} bytes"
        )
    return start, stop


def _blocks_of(memory: ObservedMemory, start: int, stop: int) -> tuple[int, int]:
    first = start // memory.block
    return first, (stop - 1) // memory.block - first + 1


def _view_runs(memory: ObservedMemory, view: Any) -> list[tuple[int, int]]:
    import numpy as np

    array = np.asarray(view)
    if array.size == 0:
        return []
    # From the innermost axis out: as long as axes are dense together, they make one piece.
    axes = sorted(
        (
            (abs(stride), length, stride)
            for stride, length in zip(array.strides, array.shape, strict=True)
            if length > 1
        )
    )
    address: int = array.__array_interface__["data"][0]
    low = address + sum((length - 1) * stride for _, length, stride in axes if stride < 0) - memory.address
    piece = array.itemsize
    while axes and axes[0][0] <= piece:
        step, length, _ = axes.pop(0)
        piece += step * (length - 1)
    span = piece + sum(step * (length - 1) for step, length, _ in axes)
    if low < 0 or low + span > memory.nbytes:
        raise RangeError(f"the array is not a view of {memory.name}")
    pieces = 1
    for _, length, _ in axes:
        pieces *= length
    if pieces > _MOST_PIECES:
        return [_blocks_of(memory, low, low + span)]
    starts = np.full(1, low, dtype=np.int64)
    for step, length, _ in axes:
        starts = (starts[:, None] + np.arange(length, dtype=np.int64) * step).ravel()
    starts.sort()
    first, last = starts // memory.block, (starts + piece - 1) // memory.block
    # A new run begins where a gap is; `last` rises with `starts`, since all pieces have one length.
    begins = np.flatnonzero(np.concatenate(([True], first[1:] > last[:-1] + 1)))
    ends = np.concatenate((begins[1:], [len(first)])) - 1
    return [(int(f), int(e - f + 1)) for f, e in zip(first[begins], last[ends], strict=True)]
