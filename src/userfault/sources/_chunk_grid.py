"""Where the bytes of an array in chunks lie in its linear memory.

An array's memory is linear, its chunks are boxes. A range of the memory is a few boxes of the array
(`boxes`), and each box is cut by the chunks (`pieces`).

Everything here is in C order and in bytes: an array in Fortran order is described with its axes reversed, and
the last axis counts bytes, so that ranges need not begin or end at an element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = ["Box", "ChunkGrid", "Piece"]

_SMALLEST_BLOCK = 64 << 10
_LARGEST_UNIT = 2 << 20
_LARGEST_BLOCK = 128 << 10
# A block may touch this many times the chunks that a single page touches, and no more.
_MOST_EXTRA_CHUNKS = 1.5


class Box(NamedTuple):
    """A box of the array that is contiguous in memory.

    Attributes:
        start: First index on each axis.
        shape: Length on each axis.
        offset: Where its bytes begin in the range that was asked for.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int


class Piece(NamedTuple):
    """What one chunk has of a box.

    Attributes:
        number: The chunk, in C order of the grid.
        inside: Its part of the box.
        chunk: The same bytes in the chunk.
    """

    number: int
    inside: tuple[slice, ...]
    chunk: tuple[slice, ...]


@dataclass(frozen=True)
class ChunkGrid:
    """A regular grid of chunks over an array.

    Attributes:
        shape: Shape of the array; the last axis is in bytes.
        chunks: Shape of a chunk; the last axis is in bytes. Chunks at the far edges reach beyond the array.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of chunks on each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))

    @cached_property
    def chunk_nbytes(self) -> int:
        """Bytes of one whole chunk."""
        return math.prod(self.chunks)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape)

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return _strides(self.shape)

    @cached_property
    def _chunk_strides(self) -> tuple[int, ...]:
        return _strides(self.chunks)

    @cached_property
    def _count_strides(self) -> tuple[int, ...]:
        return _strides(self.counts)

    @cached_property
    def band(self) -> int:
        """How many chunks a linear pass over the memory comes back to.

        1 if each chunk is contiguous in memory. Otherwise the pass goes through all chunks of a band, once
        for each index on the first axis on which chunks are longer than 1.
        """
        for axis, length in enumerate(self.chunks):
            if length > 1:
                return math.prod(self.counts[axis + 1 :])
        return 1

    @cached_property
    def direct(self) -> bool:
        """Whether a chunk wholly inside the array has the same bytes, in the same order, as its memory."""
        first = next((axis for axis, length in enumerate(self.chunks) if length > 1), len(self.chunks))
        return self.chunks[first + 1 :] == self.shape[first + 1 :]

    @cached_property
    def span(self) -> int:
        """Bytes that a chunk away from the far edges has in the array."""
        return math.prod(map(min, self.chunks, self.shape))

    def block(self, page_size: int) -> int:
        """Return the block size in bytes that reads this grid well.

        A chunk that is contiguous in memory is best read at once, by a block that does not straddle chunks
        more often than it must. Of other chunks a block should not touch many more than the one page that was
        asked for does.
        """
        if self.band == 1:
            # A block that does not divide the chunk straddles two chunks now and then: one a quarter of the
            # chunk's size costs 1.25 decoded chunks on average, one as large as the chunk nearly 2. And a large
            # block makes look-ups dear: of a chunk only the beginning up to the block need be decoded, and only
            # the block placed. Scans lose nothing, since readahead asks for many blocks at once.
            exact = self.span & -self.span
            quarter = 1 << max(0, (self.span // 4).bit_length() - 1)
            return min(max(exact, quarter, _SMALLEST_BLOCK), _LARGEST_BLOCK)
        block = max(_SMALLEST_BLOCK, page_size)
        most = self._touched(page_size) * _MOST_EXTRA_CHUNKS
        while block > page_size and self._touched(block) > most:
            block //= 2
        return block

    @cached_property
    def band_span(self) -> int:
        """Bytes of the memory that the chunks of one band hold, away from the far edges."""
        for axis, length in enumerate(self.chunks):
            if length > 1:
                return min(length, self.shape[axis]) * self._strides[axis]
        return 1

    @cached_property
    def write_unit(self) -> int:
        """Bytes that are best written together: whole bands, if those are no more than 2 MiB and a power of two.

        Else as many as can be: each part of a chunk that is written alone costs encoding all of it.
        """
        span = self.band_span
        return span if span & (span - 1) == 0 and span <= _LARGEST_UNIT else _LARGEST_UNIT

    def _touched(self, length: int) -> float:
        """Return how many chunks `length` bytes touch, roughly: runs of rows, aligned to nothing."""
        touched = 1.0
        rows = float(length)
        for n, chunk, count in zip(
            reversed(self.shape), reversed(self.chunks), reversed(self.counts), strict=True
        ):
            span = min(rows, n)
            touched *= min(count, (span - 1) / chunk + 1)
            rows = rows / n
            if rows <= 1:
                break
        return touched

    def boxes(self, start: int, stop: int) -> Iterator[Box]:
        """Cut the memory's bytes `[start, stop)` into boxes, in order."""
        offset = 0
        while start < stop:
            # The largest box that begins here: whole rows of the outermost axis at whose boundary we are.
            axis = len(self.shape) - 1
            while (
                axis > 0 and start % self._strides[axis - 1] == 0 and stop - start >= self._strides[axis - 1]
            ):
                axis -= 1
            stride = self._strides[axis]
            index = self._index(start)
            count = min((stop - start) // stride, self.shape[axis] - index[axis])
            shape = (1,) * axis + (count,) + self.shape[axis + 1 :]
            yield Box(index, shape, offset)
            start += count * stride
            offset += count * stride

    def _index(self, position: int) -> tuple[int, ...]:
        index = []
        for stride in self._strides:
            quotient, position = divmod(position, stride)
            index.append(quotient)
        return tuple(index)

    def pieces(self, box: Box) -> Iterator[Piece]:
        """Cut `box` by the chunks."""
        axes = []
        for start, length, chunk, stride in zip(
            box.start, box.shape, self.chunks, self._count_strides, strict=True
        ):
            stop = start + length
            axes.append(
                [
                    (
                        number * stride,
                        slice(max(number * chunk, start) - start, min((number + 1) * chunk, stop) - start),
                        slice(max(start - number * chunk, 0), min(stop - number * chunk, chunk)),
                    )
                    for number in range(start // chunk, (stop - 1) // chunk + 1)
                ]
            )
        for cell in itertools.product(*axes):
            numbers, inside, within = zip(*cell, strict=True)
            yield Piece(sum(numbers), inside, within)

    def coordinates(self, number: int) -> tuple[int, ...]:
        """Return the place in the grid of the chunk with this number."""
        place = []
        for stride in self._count_strides:
            quotient, number = divmod(number, stride)
            place.append(quotient)
        return tuple(place)

    def number(self, place: tuple[int, ...]) -> int:
        """Return the number of the chunk at this place in the grid."""
        return sum(at * stride for at, stride in zip(place, self._count_strides, strict=True))

    def last_byte(self, piece: Piece) -> int:
        """Return how many bytes of the chunk must be decoded until all of `piece` is there."""
        last: int = sum(
            (part.stop - 1) * stride for part, stride in zip(piece.chunk, self._chunk_strides, strict=True)
        )
        return last + 1


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
