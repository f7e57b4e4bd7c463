"""Decoded chunks that the threads of a worker share, within a number of bytes.

A chunk that one thread decodes is waited for by the others, never decoded twice at once. Buffers are used
again: a new one costs a page fault for each of its pages, which is a large part of what decoding costs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["CacheEntry", "ChunkCache", "Taken"]

Bytes = npt.NDArray[np.uint8]

# What a chunk without a buffer counts: one that is not stored, and so has the fill value everywhere.
_EMPTY_NBYTES = 512
# While a pass over the array needs more chunks than fit, the least recently used chunk is the one needed
# next, and LRU never hits. Then only every N-th new chunk counts as recently used (bimodal insertion), so
# that most of the others stay.
_THRASH_KEEP_ONE_IN = 8


class CacheEntry:
    """A chunk in the cache.

    Attributes:
        number: Which chunk.
        buffer: Its decoded bytes; None while it is first loaded, and of a chunk that has the fill value
            everywhere.
        filled: How many of them are decoded: all, or a prefix.
        error: Why loading failed.
        gone: Whether the chunk was written since: only who has the entry already may use it.
        kept: Whether somebody else may keep its buffer, too: a store that took it, without copying it.
    """

    __slots__ = ("buffer", "error", "filled", "gone", "kept", "loading", "number", "pins")

    def __init__(self, number: int) -> None:
        self.number = number
        self.buffer: Bytes | None = None
        self.filled = 0
        self.loading = False
        self.gone = False
        self.kept = False
        self.pins = 0
        self.error: BaseException | None = None


class Taken:
    """Entries for one request, all pinned.

    Attributes:
        ready: They have the bytes that are needed.
        mine: The caller must load them and call `ChunkCache.commit` or `ChunkCache.fail`.
        busy: Another thread loads them; see `ChunkCache.wait`.
    """

    __slots__ = ("busy", "mine", "ready")

    def __init__(self) -> None:
        self.ready: list[CacheEntry] = []
        self.mine: list[CacheEntry] = []
        self.busy: list[CacheEntry] = []


class ChunkCache:
    """Decoded chunks of one size; any thread may call its methods.

    Args:
        chunk_nbytes: Size of a decoded chunk.
        capacity: Bytes to keep. Chunks in use are kept beyond it, until their users release them.
    """

    def __init__(self, chunk_nbytes: int, capacity: int = 0) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._capacity = capacity
        self._changed = threading.Condition(threading.Lock())
        self._waiting = 0
        # In order of use, the least recent first.
        self._entries: OrderedDict[int, CacheEntry] = OrderedDict()
        self._used = 0
        self._spare: list[Bytes] = []
        self._evicted: OrderedDict[int, None] = OrderedDict()
        self._since_kept = 0

    @property
    def capacity(self) -> int:
        """Bytes that may be kept."""
        return self._capacity

    @property
    def used(self) -> int:
        """Bytes kept now."""
        return self._used

    def resize(self, capacity: int) -> None:
        """Keep at most `capacity` bytes from now on."""
        with self._changed:
            self._capacity = capacity
            self._shrink()
            self._spare.clear()

    def take(self, wants: Iterable[tuple[int, int]]) -> Taken:
        """Pin chunks: pairs of a number and how many of its first bytes are needed."""
        taken = Taken()
        with self._changed:
            for number, need in wants:
                entry = self._entries.get(number)
                if entry is None:
                    entry = self._entries[number] = CacheEntry(number)
                    entry.loading = True
                    taken.mine.append(entry)
                elif entry.loading:
                    taken.busy.append(entry)
                elif entry.filled >= need:
                    self._entries.move_to_end(number)
                    taken.ready.append(entry)
                else:
                    entry.loading = True
                    taken.mine.append(entry)
                entry.pins += 1
        return taken

    def lend(self) -> Bytes:
        """Return a buffer to decode into; `commit` takes it."""
        with self._changed:
            if self._spare:
                return self._spare.pop()
        return np.empty(self._chunk_nbytes, np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """Return a buffer that was lent and holds nothing."""
        with self._changed:
            self._keep_spare(buffer)

    def commit(self, entry: CacheEntry, buffer: Bytes | None, filled: int) -> None:
        """Say that `entry`, which is the caller's to load, has its first `filled` bytes in `buffer`."""
        with self._changed:
            if entry.gone:
                entry.buffer, entry.filled, entry.loading = buffer, filled, False
                self._changed.notify_all()
                return
            if entry.buffer is not None:
                self._used -= self._chunk_nbytes
                # It is not written again while another thread may still copy from it.
                if entry.pins == 1:
                    self._keep_spare(entry.buffer)
            entry.buffer, entry.filled = buffer, filled
            entry.loading = False
            self._used += _EMPTY_NBYTES if buffer is None else self._chunk_nbytes
            self._place(entry.number)
            self._shrink()
            if self._waiting:
                self._changed.notify_all()

    def fail(self, entry: CacheEntry, error: BaseException) -> None:
        """Say that `entry`, which is the caller's to load, failed. Those who wait get `error` too."""
        with self._changed:
            entry.loading = False
            entry.error = error
            if not entry.gone:
                self._remove(entry)
            self._changed.notify_all()

    def replace(self, number: int, buffer: Bytes) -> None:
        """Say that a chunk was written, and has the bytes of `buffer`, which nobody writes again.

        Who took the chunk before keeps what it was then, and so do those who load it at this moment; who takes it from
        now on gets the new bytes.
        """
        with self._changed:
            self._forget(number)
            entry = self._entries[number] = CacheEntry(number)
            entry.buffer, entry.filled, entry.kept = buffer, self._chunk_nbytes, True
            self._used += self._chunk_nbytes
            self._evicted.pop(number, None)
            self._shrink()

    def drop(self, number: int) -> None:
        """Say that a chunk was written: who takes it from now on must load it."""
        with self._changed:
            self._forget(number)

    def drop_all(self) -> None:
        """Say that any chunk may have been written."""
        with self._changed:
            for number in tuple(self._entries):
                self._forget(number)

    def wait(self, entry: CacheEntry) -> None:
        """Wait until another thread has loaded `entry`, one of `Taken.busy`.

        Raises:
            Exception: What that thread met.
        """
        with self._changed:
            self._waiting += 1
            try:
                while entry.loading:
                    self._changed.wait()
            finally:
                self._waiting -= 1
        if entry.error is not None:
            raise entry.error

    def release(self, entry: CacheEntry) -> None:
        """Unpin an entry of `take`, after its last use by the caller."""
        with self._changed:
            entry.pins -= 1
            if self._used > self._capacity:
                self._shrink()

    def clear(self) -> None:
        """Forget everything that is not in use."""
        self.resize(0)

    def _forget(self, number: int) -> None:
        entry = self._entries.get(number)
        if entry is not None:
            self._remove(entry)
            entry.gone = True

    def _remove(self, entry: CacheEntry) -> None:
        del self._entries[entry.number]
        # While it is first loaded it has no buffer, and counts nothing yet.
        if entry.buffer is not None:
            self._used -= self._chunk_nbytes
        elif entry.filled:
            self._used -= _EMPTY_NBYTES

    def _place(self, number: int) -> None:
        """Put a chunk that was just loaded where the order of eviction wants it."""
        if number in self._evicted:
            del self._evicted[number]
            self._since_kept += 1
            if self._since_kept < _THRASH_KEEP_ONE_IN:
                self._entries.move_to_end(number, last=False)
                return
            self._since_kept = 0
        self._entries.move_to_end(number)

    def _shrink(self) -> None:
        victims = []
        for entry in self._entries.values():
            if self._used <= self._capacity:
                break
            # One that is loading is pinned by the thread that loads it.
            if entry.pins == 0:
                victims.append(entry)
                self._used -= _EMPTY_NBYTES if entry.buffer is None else self._chunk_nbytes
        for entry in victims:
            del self._entries[entry.number]
            self._remember(entry.number)
            if entry.buffer is not None and not entry.kept:
                self._keep_spare(entry.buffer)

    def _remember(self, number: int) -> None:
        self._evicted[number] = None
        # As many as could be kept twice over: a chunk needed again after more than that was no near miss.
        if len(self._evicted) > 2 * (self._capacity // self._chunk_nbytes) + 16:
            self._evicted.popitem(last=False)

    def _keep_spare(self, buffer: Bytes) -> None:
        if len(self._spare) < 4:
            self._spare.append(buffer)
