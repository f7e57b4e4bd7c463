"""Which memories are open, and what tells two of one name apart."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

from userfault import _registry

if TYPE_CHECKING:
    from userfault import _engine
    from userfault.memory import PagedMemory

__all__ = ["OpenMemory", "after_fork", "current_pager", "open_memories"]


class OpenMemory(NamedTuple):
    """An open memory.

    Attributes:
        memory: It.
        number: 1, or for a memory that is first seen while another one of its name is open, the smallest number that
            none of them has. A memory keeps it.
    """

    memory: PagedMemory
    number: int

    @property
    def id(self) -> str:
        """What to write behind the name: nothing for number 1."""
        return "" if self.number == 1 else str(self.number)


_lock = threading.Lock()
_numbers: weakref.WeakKeyDictionary[PagedMemory, int] = weakref.WeakKeyDictionary()


def open_memories() -> list[OpenMemory]:
    """Return the open memories of this process, by name and number."""
    # One step of the interpreter, and therefore without the registry's lock: this must not wait for anything, and a
    # finalizer that runs while a list is made may want that lock itself.
    entries = list(_registry.entries)
    memories = [memory for _, _, reference in entries if (memory := reference()) is not None]
    open_ones = [memory for memory in memories if not memory.closed]
    with _lock:
        found = [OpenMemory(memory, _number(memory, open_ones)) for memory in open_ones]
    return sorted(found, key=lambda entry: (entry.memory.name, entry.number))


def _number(memory: PagedMemory, others: list[PagedMemory]) -> int:
    known = _numbers.get(memory)
    if known is not None:
        return known
    taken = {_numbers.get(other) for other in others if other.name == memory.name}
    number = next(n for n in range(1, len(others) + 2) if n not in taken)
    _numbers[memory] = number
    return number


def current_pager() -> _engine.Pager | None:
    """Return the process's pager if it has one; asking does not make it."""
    # A program that only wants to be watched has not loaded the engine, and need not for this.
    module = sys.modules.get("userfault.pager")
    pager: _engine.Pager | None = None if module is None else module._pager
    return pager


def after_fork() -> None:
    """Make the lock new in a forked child."""
    # Another thread may have held it.
    global _lock
    _lock = threading.Lock()
