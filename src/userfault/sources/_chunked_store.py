"""A source in chunks that can be written: each write is a read, a change and a write of whole chunks.

What the store writes at once is a *unit*: a chunk, or a shard of several. Of each unit that a write touches, the chunks
concerned are put together in memory (read first, unless the write covers them), changed, and given to the store, which
encodes and keeps them. One thread at a time works on a unit.

A chunk is put whole, and a reader finds the old one or the new one. A chunk *in a shard* is read in two steps, where it
is and what is there, and if the shard is replaced between them, something else is there. So nothing of a shard is read
while it is put.

A cached chunk is never changed in place: readers may be copying from it, and the store may refuse the new one. It is
replaced when the store has taken it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault.errors import SourceError, UserfaultError
from userfault.sources._abc import PageStore, check_range
from userfault.sources._chunk_grid import Box, ChunkGrid
from userfault.sources._chunked import ChunkedSource, Copy, in_bytes

__all__ = ["ChunkedStore"]

Bytes = npt.NDArray[np.uint8]

# Units share locks: enough of them that two threads rarely meet at one for different units.
_LOCKS = 64


class _Turns:
    """Lets many threads read, or one write. Who wants to write goes before those who want to read from then on."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._readers = 0
        self._waiting = 0
        self._writing = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            while self._writing or self._waiting:
                self._changed.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            while self._writing or self._readers:
                self._changed.wait()
            self._waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class ChunkedStore(ChunkedSource, PageStore):
    """An array in chunks that can be written. A subclass inherits from what reads it, too, and gives `store_part`.

    Attributes:
        lossless: Whether a chunk that is read has the same bytes as when it was written, whatever they are.
    """

    lossless: bool = True

    def set_units(self, units: tuple[int, ...] | None) -> None:
        """Say what the store writes at once; called when all else is initialised.

        Args:
            units: Shape of it, each length a multiple of the chunk's; None for a chunk.
        """
        chunks = self._grid
        self._units = chunks
        if units is not None:
            self._units = ChunkGrid(chunks.shape, in_bytes(units, self._dtype.itemsize, self.order))
        self.write_unit = self._units.write_unit
        self._unit_locks = tuple(threading.Lock() for _ in range(_LOCKS))
        self._sharded = self._units.chunks != chunks.chunks
        self._turns = tuple(_Turns() for _ in range(_LOCKS)) if self._sharded else ()

    @abstractmethod
    def store_part(self, selection: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Write whole chunks of one unit, as far as they are inside the array; return when the store keeps them.

        Args:
            selection: Which part of the array, on its own axes.
            values: Its elements, in any memory order. Not to be kept: the caller owns the memory.
        """

    def read_chunk(self, number: int, out: Bytes, need: int) -> int:
        """Decode one chunk, not while its shard is put."""
        if not self._sharded:
            return super().read_chunk(number, out, need)
        place = zip(self._grid.coordinates(number), self._grid.chunks, self._units.chunks, strict=True)
        unit = self._units.number(tuple(at * chunk // length for at, chunk, length in place))
        with self._turns[unit % _LOCKS].reading():
            return super().read_chunk(number, out, need)

    def write_from(self, offset: int, buffer: memoryview) -> None:
        """Store `buffer` from `offset` on; any thread may call this."""
        check_range(self, offset, len(buffer))
        if len(buffer) == 0:
            return
        data = np.frombuffer(buffer, np.uint8)
        parts: dict[int, list[Copy]] = {}
        for box in self._units.boxes(offset, offset + len(data)):
            view = data[box.offset : box.offset + math.prod(box.shape)].reshape(box.shape)
            for piece in self._units.pieces(box):
                parts.setdefault(piece.number, []).append((view[piece.inside], piece.chunk))
        self._run([self._write_job(number, pieces) for number, pieces in parts.items()])

    def _write_job(self, number: int, pieces: list[Copy]) -> Callable[[], None]:
        def job() -> None:
            with self._unit_locks[number % _LOCKS]:
                self._write_unit(number, pieces)

        return job

    def _write_unit(self, number: int, pieces: list[Copy]) -> None:
        units, chunks = self._units, self._grid
        # Where the unit begins in the array, and the chunks in it that the pieces touch.
        origin = [
            place * length for place, length in zip(units.coordinates(number), units.chunks, strict=True)
        ]
        low, high = [], []
        for axis, chunk in enumerate(chunks.chunks):
            first = min(part[axis].start for _, part in pieces) // chunk
            last = -(-max(part[axis].stop for _, part in pieces) // chunk)
            low.append(first * chunk)
            high.append(min(last * chunk, chunks.shape[axis] - origin[axis]))
        shape = tuple(stop - start for start, stop in zip(low, high, strict=True))
        box = Box(tuple(at + start for at, start in zip(origin, low, strict=True)), shape, 0)
        values = np.empty(shape, np.uint8)
        if sum(view.size for view, _ in pieces) < values.size:
            self._read_box(box, values)
        for view, part in pieces:
            inside = tuple(
                slice(cut.start - start, cut.stop - start) for cut, start in zip(part, low, strict=True)
            )
            values[inside] = view
        turn = self._turns[number % _LOCKS].writing() if self._sharded else contextlib.nullcontext()
        try:
            with turn:
                self._store_box(box, values)
        except BaseException:
            # It may have been kept all the same, as when only the answer was lost.
            for piece in chunks.pieces(box):
                self._cache.drop(piece.number)
            raise
        self._refresh(box, values)

    def _read_box(self, box: Box, values: Bytes) -> None:
        copies: dict[int, list[Copy]] = {}
        for piece in self._grid.pieces(box):
            copies[piece.number] = [(values[piece.inside], piece.chunk)]
        self._from_cache(copies, dict.fromkeys(copies, self._grid.chunk_nbytes), [])

    def _store_box(self, box: Box, values: Bytes) -> None:
        itemsize = self._dtype.itemsize
        elements = values.view(self._dtype)
        starts = (*box.start[:-1], box.start[-1] // itemsize)
        selection = tuple(
            slice(start, start + length) for start, length in zip(starts, elements.shape, strict=True)
        )
        if not self._shape:
            selection, elements = (), elements.reshape(())
        elif self.order == "F":
            selection, elements = selection[::-1], elements.T
        try:
            self.store_part(selection, elements)
        except UserfaultError:
            raise
        except Exception as error:  # stores and codecs raise what they like
            # obstore appends the whole structure of an error in Rust's debug form.
            detail = str(error).partition("\n")[0].strip() or type(error).__name__
            where = ", ".join(f"{cut.start}:{cut.stop}" for cut in selection)
            raise SourceError(
                f"{self.name}[{where}] cannot be written: {detail}",
                detail=detail,
                errno=getattr(error, "errno", None),
            ) from error

    def _refresh(self, box: Box, values: Bytes) -> None:
        """Bring the cache up to date with what was written."""
        grid = self._grid
        keep = self.lossless and self._cache.capacity >= grid.chunk_nbytes
        for piece in grid.pieces(box):
            if not keep:
                self._cache.drop(piece.number)
            elif values.shape == grid.chunks:
                self._cache.replace(piece.number, values.reshape(-1))
            else:
                # Beyond the array's edges there is nothing to be read.
                chunk = np.zeros(grid.chunks, np.uint8)
                chunk[piece.chunk] = values[piece.inside]
                self._cache.replace(piece.number, chunk.reshape(-1))
