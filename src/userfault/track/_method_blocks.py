"""Paged memories: the engine notes itself which of their blocks are touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.errors import UntrackableError
from userfault.memory import find
from userfault.track import _runs
from userfault.track._ledger import Collected

if TYPE_CHECKING:
    from userfault.memory import PagedMemory
    from userfault.track._runs import Runs

__all__ = ["Blocks", "blocks", "blocks_read"]


class Blocks:
    """The method "blocks".

    Args:
        accesses: Whether reads are noted too, which costs more: every block is faulted in anew.
    """

    name = "blocks"
    tells_writes = True

    def __init__(self, accesses: bool) -> None:
        self.tells_reads = accesses
        self._memories: dict[int, PagedMemory] = {}

    def granularity(self, start: int) -> int:
        """Return the size of the memory's blocks."""
        return _memory_at(start).block

    def begin(self, runs: Runs) -> None:
        """Have the engine watch all memories that begin in the runs."""
        done: list[PagedMemory] = []
        try:
            for start, end in runs.tolist():
                while start < end:
                    memory = _memory_at(start)
                    memory._begin_watch(self.tells_reads)
                    done.append(memory)
                    start = memory.address + memory.nbytes
        except BaseException:
            for memory in done:
                memory._unwatch(self.tells_reads)
            raise
        self._memories.update((memory.address, memory) for memory in done)

    def collect(self, runs: Runs, rearm: bool) -> Collected:
        """Ask the engine."""
        accessed, written, blind = _runs.EMPTY, _runs.EMPTY, _runs.EMPTY
        for memory in self._in(runs):
            address, unit = memory.address, memory.block
            if memory.closed:
                blind = _runs.union(blind, _runs.runs_of([(address, address + memory.nbytes)]))
                continue
            touched, changed, unseen = memory._watched_blocks(rearm)
            accessed = _runs.union(accessed, _runs.from_mask(touched, address, unit))
            written = _runs.union(written, _runs.from_mask(changed, address, unit))
            blind = _runs.union(blind, _runs.from_mask(unseen, address, unit))
        return Collected(accessed if self.tells_reads else None, written, blind)

    def end(self, runs: Runs) -> None:
        """Have the engine watch them no more."""
        for memory in self._in(runs):
            self._memories.pop(memory.address)
            memory._unwatch(self.tells_reads)

    def forked(self, runs: Runs) -> None:
        """Watch anew: after a fork all that is resident may be written without a trap."""
        for memory in self._in(runs):
            memory._unwatch(self.tells_reads)
            memory._begin_watch(self.tells_reads)

    def abandon(self) -> None:
        """Forget all."""
        self._memories.clear()

    def _in(self, runs: Runs) -> list[PagedMemory]:
        found = []
        for start, end in runs.tolist():
            found += [memory for address, memory in self._memories.items() if start <= address < end]
        return found


def _memory_at(address: int) -> PagedMemory:
    memory = find(address)
    if memory is None:
        raise UntrackableError("its memory is closed")
    return memory


blocks = Blocks(accesses=False)
blocks_read = Blocks(accesses=True)
