"""How to decode the chunks of one Zarr array without zarr's own pipeline, which takes hundreds of µs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault.errors import FormatError
from userfault.sources._abc import Order
from userfault.sources._codecs import Decoder, make_decoder

__all__ = ["ChunkDecoder", "ZarrPlan"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ZarrPlan:
    """Where the chunks of an array are and what they are made of.

    Attributes:
        key_format: How chunks are numbered: 2 (`0.1`) or 3 (`c/0/1`).
        shape: Shape of the array.
        chunks: Shape of a chunk.
        dtype: Type of the array's elements.
        stored: Type of the elements in a decoded chunk; it differs in byte order at most.
        axes: Axes of the array in the order in which a decoded chunk has them, the slowest first.
        codecs: Configurations of numcodecs, in the order of encoding.
        fill: One element, for chunks that are not stored.
        separator: What is between the numbers in a key.
    """

    key_format: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: np.dtype[Any]
    axes: tuple[int, ...]
    codecs: tuple[Mapping[str, Any], ...]
    fill: bytes
    separator: str

    @property
    def order(self) -> Order:
        """The memory order that chunks have, if it is one at all, else C."""
        return "F" if len(self.axes) > 1 and self.axes == tuple(reversed(range(len(self.axes)))) else "C"

    @cached_property
    def chunk_nbytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def key(self, place: tuple[int, ...]) -> str:
        """Return the key of the chunk at this place in the grid."""
        if self.key_format == 2:
            return self.separator.join(map(str, place)) or "0"
        return self.separator.join(map(str, ("c", *place)))


class ChunkDecoder:
    """Decodes chunks of one array into memory order; any thread may call it.

    Args:
        plan: What the chunks are made of.
        order: Order of the memory.

    Raises:
        ValueError: A codec is not known to numcodecs.
    """

    def __init__(self, plan: ZarrPlan, order: Order) -> None:
        # Undone from the last codec to the first one, which gives the bytes of the chunk.
        decoders = [make_decoder(config) for config in reversed(plan.codecs)] or [_Stored()]
        self._outer, self._last = decoders[:-1], decoders[-1]
        self._plan = plan
        ndim = len(plan.chunks)
        memory_axes = tuple(range(ndim)) if order == "C" else tuple(reversed(range(ndim)))
        # Position in the stored chunk of each axis, in memory order.
        self._transposition = tuple(plan.axes.index(axis) for axis in memory_axes)
        self._stored_shape = tuple(plan.chunks[axis] for axis in plan.axes)
        self._memory_shape = tuple(plan.chunks[axis] for axis in memory_axes)
        self._as_it_is = plan.stored == plan.dtype and self._transposition == tuple(range(ndim))

    def decode(self, data: Any, out: Bytes, need: int) -> int:
        """Decode `data` into `out`; return how many of its first bytes are there, at least `need`.

        Raises:
            FormatError: The data is damaged, or does not decode to one chunk.
        """
        for decoder in self._outer:
            data = decoder.decode(data)
        if self._as_it_is:
            return self._last.decode_prefix(data, out, need)
        stored = np.empty(self._plan.chunk_nbytes, np.uint8)
        self._last.decode_into(data, stored)
        chunk = stored.view(self._plan.stored).reshape(self._stored_shape).transpose(self._transposition)
        np.copyto(out.view(self._plan.dtype).reshape(self._memory_shape), chunk)
        return len(out)


class _Stored(Decoder):
    """No codec at all: the chunk's bytes are stored as they are."""

    def decode(self, data: Any) -> Any:
        return data

    def decode_prefix(self, data: Any, out: Bytes, need: int) -> int:
        if len(data) != len(out):
            raise FormatError(f"a chunk has {len(data)} bytes instead of {len(out)}")
        return super().decode_prefix(data, out, need)
