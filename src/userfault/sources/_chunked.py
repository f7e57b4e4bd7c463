"""A source whose data comes in chunks that must be decoded whole: the part that is the same for all of them.

A request is cut into the pieces that chunks have of it. Chunks that the cache holds are copied from at once;
the others are decoded, several at a time, straight into the request where they fill a stretch of it, else
into the cache.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault import options
from userfault.sources._abc import ArraySource, Order, check_range
from userfault.sources._chunk_cache import CacheEntry, ChunkCache
from userfault.sources._chunk_grid import ChunkGrid

__all__ = ["ChunkedSource", "Copy", "in_bytes"]

Bytes = npt.NDArray[np.uint8]
# Where a piece goes: the view of the request, and the part of the chunk.
Copy = tuple[Bytes, tuple[slice, ...]]

# A request of this size is a scan or a prefetch, not a look-up: the rest of its chunks will be wanted too.
_SCAN_NBYTES = 512 << 10
# How many chunks beside a band are in use at once: those that reads side by side have in part.
_MOST_AT_EDGES = 4


class ChunkedSource(ArraySource):
    """An array in chunks of one shape.

    Args:
        dtype: Type of the elements.
        shape: Shape of the array; no axis is 0.
        chunks: Shape of a chunk.
        order: Order of the memory.
        fill: One element, for chunks that are not stored.
        threads: How many chunks to load at once: more than CPUs if loading is waiting.
    """

    affinity = True

    def __init__(
        self,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        order: Order,
        fill: bytes,
        threads: int | None = None,
    ) -> None:
        self._dtype = dtype
        self._shape = shape
        self.order = order
        self._nbytes = math.prod(shape) * dtype.itemsize
        self._threads = options.cpu_count() if threads is None else threads
        self.concurrency = self._threads
        grid = ChunkGrid(in_bytes(shape, dtype.itemsize, order), in_bytes(chunks, dtype.itemsize, order))
        self._grid = grid
        self.block = grid.block(mmap.PAGESIZE)
        # What a pass over the memory comes back to, unless each block is made of whole chunks.
        if not (grid.direct and self.block % grid.chunk_nbytes == 0):
            self.wants_cache = (grid.band + min(self._threads, _MOST_AT_EDGES)) * grid.chunk_nbytes
        self._cache = ChunkCache(grid.chunk_nbytes, self.wants_cache)
        self._fill_element = fill
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        # Where recent requests ended: one that begins there continues a scan.
        self._ends: deque[int] = deque(maxlen=4 * self._threads)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self._nbytes

    @abstractmethod
    def load_chunk(self, place: tuple[int, ...], out: Bytes, need: int) -> int:
        """Decode one chunk into `out`, in memory order, beyond the array's edges too.

        Args:
            place: Which chunk, on the array's own axes.
            out: One-dimensional, as long as a chunk.
            need: How many of its first bytes are needed now.

        Returns:
            How many were decoded, at least `need`; 0 if the chunk is not stored.
        """

    def set_cache(self, nbytes: int) -> None:
        """Keep at most `nbytes` of decoded chunks."""
        self._cache.resize(nbytes)

    def close(self) -> None:
        """End the threads and forget the chunks."""
        with self._pool_lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self._cache.clear()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on; any thread may call this."""
        length = len(buffer)
        check_range(self, offset, length)
        if length == 0:
            return
        out = np.frombuffer(buffer, np.uint8)
        copies, needs, whole = self._cut(offset, out)
        jobs: list[Callable[[], None]] = [self._direct_job(number, view) for number, view in whole]
        if needs:
            scan = self._is_scan(offset, length)
            if scan:
                needs = dict.fromkeys(needs, self._grid.chunk_nbytes)
            self._from_cache(copies, needs, jobs, ahead=scan and self._grid.band == 1)
        else:
            self._run(jobs)

    def _is_scan(self, offset: int, length: int) -> bool:
        """Return whether what follows will be asked for soon, and can be kept until then."""
        scan = length >= _SCAN_NBYTES or offset in self._ends
        self._ends.append(offset + length)
        return scan and self._cache.capacity >= self._grid.chunk_nbytes

    def _cut(
        self, offset: int, out: Bytes
    ) -> tuple[dict[int, list[Copy]], dict[int, int], list[tuple[int, Bytes]]]:
        """Return the copies to make from chunks, how much of each they need, what to decode in place."""
        grid = self._grid
        copies: dict[int, list[Copy]] = {}
        needs: dict[int, int] = {}
        whole: list[tuple[int, Bytes]] = []
        for box in grid.boxes(offset, offset + len(out)):
            view = out[box.offset : box.offset + math.prod(box.shape)].reshape(box.shape)
            for piece in grid.pieces(box):
                target = view[piece.inside]
                # What is decoded in place must be a view: `reshape` of anything else would be a copy.
                if grid.direct and target.size == grid.chunk_nbytes and target.flags.c_contiguous:
                    whole.append((piece.number, target.reshape(-1)))
                    continue
                copies.setdefault(piece.number, []).append((target, piece.chunk))
                needs[piece.number] = max(needs.get(piece.number, 0), grid.last_byte(piece))
        return copies, needs, whole

    def _from_cache(
        self,
        copies: dict[int, list[Copy]],
        needs: dict[int, int],
        jobs: list[Callable[[], None]],
        *,
        ahead: bool = False,
    ) -> None:
        again: dict[int, int] = {}
        taken = self._cache.take(needs.items())
        jobs += [self._load_job(entry, needs[entry.number], copies[entry.number]) for entry in taken.mine]
        try:
            # First of all: other threads may wait for the chunks that are ours to load.
            self._run(jobs)
            for entry in taken.ready:
                self._copy(entry.buffer, copies[entry.number])
            if taken.busy and ahead:
                # Requests of a scan that is cut finer than its chunks come in pairs: rather than watch another
                # thread decode this chunk, decode the one after it.
                self._decode_ahead(max(needs) + 1)
            for entry in taken.busy:
                self._cache.wait(entry)
                if entry.filled >= needs[entry.number]:
                    self._copy(entry.buffer, copies[entry.number])
                else:
                    again[entry.number] = needs[entry.number]
        finally:
            for entry in (*taken.ready, *taken.busy):
                self._cache.release(entry)
        if again:
            self._from_cache(copies, again, [])

    def _decode_ahead(self, number: int) -> None:
        if number >= math.prod(self._grid.counts):
            return
        taken = self._cache.take([(number, self._grid.chunk_nbytes)])
        for entry in taken.mine:
            # Who really needs it will meet the error again.
            with contextlib.suppress(Exception):
                self._load_job(entry, self._grid.chunk_nbytes, [])()
        for entry in (*taken.ready, *taken.busy):
            self._cache.release(entry)

    def _copy(self, buffer: Bytes | None, copies: list[Copy]) -> None:
        chunk = self._fill_chunk() if buffer is None else buffer.reshape(self._grid.chunks)
        for target, part in copies:
            target[...] = chunk[part]

    def _fill_chunk(self) -> Bytes:
        """Return a chunk of the fill value that takes no more memory than one row."""
        element, shape = self._fill_element, self._grid.chunks
        if len(set(element)) == 1:
            return np.broadcast_to(np.uint8(element[0]), shape)
        row = np.frombuffer(element * (shape[-1] // len(element)), np.uint8)
        return np.broadcast_to(row, shape)

    def _direct_job(self, number: int, target: Bytes) -> Callable[[], None]:
        def job() -> None:
            if self.read_chunk(number, target, len(target)) == 0:
                target.reshape(self._grid.chunks)[...] = self._fill_chunk()

        return job

    def _load_job(self, entry: CacheEntry, need: int, copies: list[Copy]) -> Callable[[], None]:
        def job() -> None:
            lent = self._cache.lend()
            buffer: Bytes | None = lent
            try:
                filled = self.read_chunk(entry.number, lent, need)
                if filled == 0:
                    self._cache.give_back(lent)
                    buffer, filled = None, self._grid.chunk_nbytes
            except BaseException as error:
                self._cache.fail(entry, error)
                raise
            self._cache.commit(entry, buffer, filled)
            try:
                self._copy(buffer, copies)
            finally:
                self._cache.release(entry)

        return job

    def read_chunk(self, number: int, out: Bytes, need: int) -> int:
        """Decode the chunk with this number; see `load_chunk`."""
        return self.load_chunk(self._place(number), out, need)

    def _place(self, number: int) -> tuple[int, ...]:
        place = self._grid.coordinates(number)
        if not self._shape:
            return ()
        return place[::-1] if self.order == "F" else place

    def _run(self, jobs: list[Callable[[], None]]) -> None:
        """Run all `jobs`, on several threads, this one among them.

        Raises:
            Exception: The first that a job raised, after all have run.
        """
        errors: list[BaseException] = []
        queue = deque(jobs)
        helpers: list[Future[None]] = []
        # No thread to be had is no reason to fail, and still less to leave jobs undone that others wait for.
        with contextlib.suppress(RuntimeError):
            for _ in range(min(len(jobs), self._threads) - 1):
                helpers.append(self._helpers().submit(_drain, queue, errors))  # noqa: PERF401 - see above
        _drain(queue, errors)
        for helper in helpers:
            # One that has not begun has nothing left to do.
            if not helper.cancel():
                helper.result()
        if errors:
            raise errors[0]

    def _helpers(self) -> ThreadPoolExecutor:
        with self._pool_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="uf-decode")
            return self._pool


def _drain(queue: deque[Callable[[], None]], errors: list[BaseException]) -> None:
    while True:
        try:
            job = queue.popleft()
        except IndexError:
            return
        try:
            job()
        except BaseException as error:
            errors.append(error)


def in_bytes(shape: tuple[int, ...], itemsize: int, order: Order) -> tuple[int, ...]:
    """Return a shape as `ChunkGrid` wants it: in memory order, the last axis in bytes."""
    axes = shape[::-1] if order == "F" else shape
    return (*axes[:-1], axes[-1] * itemsize) if axes else (itemsize,)
