"""The memory of NumPy's large arrays, from birth to death."""

from __future__ import annotations

import bisect
import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault import _allocations
from userfault._allocations import HandlerError

if TYPE_CHECKING:
    from types import FrameType

    from numpy.typing import NDArray

    from userfault.cli._record.frames import Variable

__all__ = ["Allocated", "Block", "Brief", "Death", "HandlerError"]

# Arrays that died keep their pages until the recorder has looked at them, but not more than this.
_MOST_DEAD, _DEAD_SHARE = 1 << 30, 16


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """The memory of one array.

    Attributes:
        address: Its first byte.
        nbytes: Its size.
        born_ns: When it was made (CLOCK_MONOTONIC).
    """

    address: int
    nbytes: int
    born_ns: int

    def view(self, like: Variable | None = None) -> NDArray[Any]:
        """Return it as an array that does not own it, with type and shape of `like` where that has as many bytes.

        It is for its addresses: they stay reserved until the death of the array is released.
        """
        raw: Any = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        if like is None or like.nbytes != self.nbytes:
            return np.ndarray((self.nbytes,), np.uint8, raw)
        return np.ndarray(like.shape, like.dtype, raw, order=like.order)


@dataclass(frozen=True, eq=False, slots=True)
class Death:
    """That an array has died.

    Attributes:
        block: Its memory.
        died_ns: When (CLOCK_MONOTONIC).
        dropped: Its pages were given back already, so what the kernel says of them is void.
    """

    block: Block
    died_ns: int
    dropped: bool


@dataclass(frozen=True, slots=True)
class Brief:
    """Arrays that were too short-lived to be told of.

    Attributes:
        count: How many.
        nbytes: Their bytes in all.
        largest: Bytes of the largest.
    """

    count: int
    nbytes: int
    largest: int


class Allocated:
    """Has NumPy's large arrays made on pages of their own, and knows them.

    Only one at a time. `drain` and `release` are for one thread.
    """

    def __init__(self, threshold: int, huge: bool | None) -> None:
        """Begin, in this thread and in those that the program starts by `threading`.

        Args:
            threshold: Size in bytes from which on arrays are large.
            huge: Whether they shall have huge pages; None: as NumPy has it.

        Raises:
            HandlerError: This NumPy does not let itself be asked.
        """
        if huge is None:
            huge = os.environ.get("NUMPY_MADVISE_HUGEPAGE") != "0"
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        pages = _allocations.PAGES_HUGE if huge else _allocations.PAGES_SMALL
        _allocations.start(threshold, pages, min(_MOST_DEAD, memory // _DEAD_SHARE))
        self._starts: list[int] = []
        self._blocks: dict[int, Block] = {}
        _allocations.install()
        # NumPy's handler is a context variable, and a new thread begins with an empty context. A function for
        # profiling is the one thing that `threading` calls in a new thread before the program's own code.
        threading.setprofile(_enter_thread)

    def drain(self, min_age_ns: int) -> tuple[list[Block], list[Death]]:
        """Return the arrays that were born and those that died since the last call.

        Those that are younger than `min_age_ns` come with a later call, or never, if they die before.
        """
        born, died = [], []
        for kind, address, nbytes, born_ns, died_ns, dropped in _allocations.drain(min_age_ns):
            if kind == _allocations.BORN:
                block = self._blocks[address] = Block(address, nbytes, born_ns)
                bisect.insort(self._starts, address)
                born.append(block)
            elif address not in self._blocks:
                _allocations.release(address)  # of an earlier recording, which nobody tracks any more
            else:
                died.append(Death(self._blocks.pop(address), died_ns, dropped))
                del self._starts[bisect.bisect_left(self._starts, address)]
        return born, died

    def release(self, block: Block) -> None:
        """Give back the addresses of one that has died, when nothing is tracked there any more."""
        _allocations.release(block.address)

    def is_young(self, address: int) -> bool:
        """Return whether `address` belongs to a living array that `drain` has not told of yet."""
        return _allocations.is_young(address)

    def find(self, address: int) -> Block | None:
        """Return the living array that `address` belongs to, as far as `drain` has told of it."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        block = self._blocks[self._starts[at]]
        return block if address < block.address + block.nbytes else None

    @property
    def brief(self) -> Brief:
        """The arrays that died before `drain` told of them."""
        now = _allocations.stats()
        return Brief(now["brief"], now["brief_bytes"], now["brief_most"])

    def close(self) -> None:
        """End it. Call it when nothing is tracked any more."""
        if threading.getprofile() is _enter_thread:
            threading.setprofile(None)
        _allocations.uninstall()
        _allocations.stop()


def _enter_thread(frame: FrameType, event: str, argument: object) -> None:
    sys.setprofile(None)
    _allocations.install()
