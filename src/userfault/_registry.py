"""Which open memory holds an address."""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from userfault.memory import PagedMemory

__all__ = ["entries", "find", "register"]

_lock = threading.Lock()
# First byte, the one after the last, and the memory, by address. Changed in place only.
entries: list[tuple[int, int, weakref.ref[PagedMemory]]] = []


def find(address: int) -> PagedMemory | None:
    """Return the open memory that holds `address`, None if there is none."""
    with _lock:
        at = bisect.bisect_right(entries, address, key=lambda entry: entry[0]) - 1
        if at < 0:
            return None
        start, stop, reference = entries[at]
    memory = reference()
    return memory if memory is not None and not memory.closed and start <= address < stop else None


def register(memory: PagedMemory) -> None:
    """Have `find` know `memory` as long as it lives."""
    entry = (memory.address, memory.address + memory.nbytes, weakref.ref(memory, _forget))
    with _lock:
        # An entry of a memory that is gone may still stand at the same address.
        entries[:] = [old for old in entries if old[2]() is not None]
        bisect.insort(entries, entry, key=lambda e: e[0])


def _forget(reference: weakref.ref[PagedMemory]) -> None:
    # Runs wherever the last reference goes, perhaps inside one of the functions above: it must not wait for the lock.
    if _lock.acquire(blocking=False):
        try:
            entries[:] = [old for old in entries if old[2] is not reference]
        finally:
            _lock.release()


def _in_child() -> None:
    # Another thread, which is not here, may have been in one of the functions above.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_in_child)
