"""A source over any object with `shape`, `dtype` and slicing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from userfault.errors import FormatError
from userfault.sources._abc import Order
from userfault.sources._chunked import ChunkedSource

__all__ = ["SlicedSource", "tile_shape"]

Bytes = npt.NDArray[np.uint8]
# What one slicing call reads if the object does not say how it is divided.
_TILE_NBYTES = 1 << 20


class SlicedSource(ChunkedSource):
    """An array that is read by slicing an object, one chunk at a time.

    Args:
        array: Sliced with one `slice` for each axis (`()` if it has none); gives something NumPy takes for an
            array.
        dtype: Type of the elements.
        shape: Shape of the array; no axis is 0.
        chunks: What to read at a time, None if the object does not care.
        order: Order of the memory.
        threads: How many slicing calls may run at once.
    """

    def __init__(
        self,
        array: Any,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        chunks: tuple[int, ...] | None,
        order: Order,
        threads: int,
    ) -> None:
        chunks = tile_shape(shape, dtype.itemsize, order) if chunks is None else chunks
        super().__init__(dtype, shape, chunks, order, bytes(dtype.itemsize), threads)
        self._array = array
        self._chunks = chunks

    def read_part(self, selection: tuple[slice, ...]) -> Any:
        """Slice the object."""
        return self._array[selection]

    def load_chunk(self, place: tuple[int, ...], out: Bytes, need: int) -> int:
        """Slice one chunk out of the object."""
        selection = tuple(
            slice(index * chunk, min((index + 1) * chunk, length))
            for index, chunk, length in zip(place, self._chunks, self._shape, strict=True)
        )
        part = np.asarray(self.read_part(selection))
        expected = tuple(cut.stop - cut.start for cut in selection)
        if part.shape != expected:
            raise FormatError(f"slicing gave an array of shape {part.shape} instead of {expected}")
        # Another byte order is converted; another type is not what was promised.
        if not np.can_cast(part.dtype, self._dtype, "equiv"):
            raise FormatError(f"slicing gave elements of dtype {part.dtype} instead of {self._dtype}")
        chunk = out.view(self._dtype)
        # Only what lies inside the array is there to be copied, and is ever looked at.
        inside = tuple(slice(0, length) for length in expected)
        if self.order == "F":
            chunk.reshape(self._chunks[::-1]).T[inside] = part
        else:
            chunk.reshape(self._chunks)[inside] = part
        return len(out)


def tile_shape(shape: tuple[int, ...], itemsize: int, order: Order) -> tuple[int, ...]:
    """Return chunks of about 1 MiB that are contiguous in memory."""
    axes = shape[::-1] if order == "F" else shape
    chunks: list[int] = []
    room = max(1, _TILE_NBYTES // itemsize)
    for length in reversed(axes):
        chunk = min(length, room)
        chunks.insert(0, chunk)
        # Beyond an axis that is cut, chunks are one row thick.
        room = room // length if chunk == length else 1
        room = max(1, room)
    return tuple(chunks[::-1] if order == "F" else chunks)
