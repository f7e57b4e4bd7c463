"""What of a memory is resident: loaded before it is touched, kept, given back."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Literal

from userfault import _engine
from userfault._observed import ObservedMemory
from userfault._pin import Pin
from userfault._ranges import block_runs
from userfault.errors import BudgetError, ClosedError, KernelError, SourceError, UserfaultError
from userfault.sizes import format_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

__all__ = ["Advice", "ResidentMemory"]

Advice = Literal["normal", "random", "sequential"]

_ADVICE: dict[str, int] = {"normal": 0, "random": 1, "sequential": 2}


class ResidentMemory(ObservedMemory):
    """The part of `PagedMemory` that loads, pins and evicts."""

    def prefetch(self, where: object = None, *, wait: bool = True) -> None:
        """Load what `where` needs before it is touched.

        Args:
            where: Bytes as `(start, stop)`, a `slice` or a `range`; an array that is a view of this memory; or None for
                all of it.
            wait: Return when everything is resident. False: have it loaded in the background, as far as it goes; errors
                show in `stats()`.

        Raises:
            SourceError: The source failed, after retries; its `detail` says how. The blocks stay absent.
            BudgetError: More than the budget holds.
            RangeError: `where` is not inside the memory.
            ClosedError: The memory is, or was meanwhile, closed.
        """
        self._check_open()
        runs = block_runs(self, where)
        self._check_share(runs, "prefetch")
        for first, count in runs:
            try:
                self._prefetch(first, count, wait)
            except _engine.EngineError as error:
                raise self._source_error(error) from None

    def populate(self, where: object = None) -> None:
        """Make `where` resident, for a system call that cannot wait for faults.

        With `UFFD_USER_MODE_ONLY` (see `userfault doctor`) the kernel fails a `write(2)` or `send(2)` from a missing
        page with EFAULT. Nothing else should press on the same budget between this call and that one.

        Args:
            where: As in `prefetch`.

        Raises:
            BudgetError: It does not fit in the budget, or was evicted again by other accesses meanwhile.
            Exception: As `prefetch`.
        """
        runs = block_runs(self, where)
        for _ in range(3):
            self.prefetch(where)
            if all(self._resident(first, count) for first, count in runs):
                return
        raise BudgetError(f"populate of {self.name}: other accesses evicted it again; give it more memory")

    def evict(self, where: object = None) -> int:
        """Drop what is resident of the blocks that hold `where` (as in `prefetch`), and return how many bytes went.

        Blocks that were written to are written back first, to the source or in mode `"c"` to scratch; those that cannot
        be, and those that are pinned, stay.

        Raises:
            RangeError: `where` is not inside the memory.
            ClosedError: The memory is closed.
        """
        self._check_open()
        return sum(self._evict(first, count) for first, count in block_runs(self, where))

    def pin(self, where: object = None) -> Pin:
        """Make `where` resident and keep it there: never evicted, and not moved by the engine.

        For memory that a device reads or writes, or a system call that must not wait for faults: direct I/O, registered
        buffers of io_uring, CUDA. Pins nest.

        Args:
            where: As in `prefetch`.

        Returns:
            A handle and context manager; its `release()` ends it. So does the end of the memory, but not that of the
            handle.

        Raises:
            BudgetError: More than the budget holds.
            Exception: As `prefetch`.
        """
        self._check_open()
        runs = block_runs(self, where)
        self._check_share(runs, "pin")
        try:
            return Pin(self, runs)
        except _engine.EngineError as error:
            if error.errno in (errno.EBUSY, errno.ENOBUFS, errno.ENOMEM):
                raise BudgetError(
                    f"pin of {self.name}: its budget is full of pinned blocks, or there are too many pins "
                    f"({error.message or os.strerror(error.errno)})"
                ) from None
            raise self._source_error(error) from None

    def _begin_watch(self, accesses: bool) -> None:
        """Note which blocks are touched from now on; as many `_unwatch` end it. See engine/watch.c."""
        self._check_open()
        try:
            self._watch(accesses)
        except _engine.EngineError as error:
            raise self._watch_error(error) from None

    def _watched_blocks(self, rearm: bool) -> tuple[Mask, Mask, Mask]:
        """Return what was touched: `nblocks` booleans each, accessed, written, and blind (nobody can tell).

        `rearm` begins a new interval. Accesses tell nothing of reads unless they are watched.
        """
        import numpy as np

        bits = np.zeros((3, (self.nblocks + 63) // 64), np.uint64)
        self._check_open()
        try:
            self._watched(bits.data, rearm)
        except _engine.EngineError as error:
            raise self._watch_error(error) from None
        octets = bits.astype("<u8").view(np.uint8)
        masks = np.unpackbits(octets, axis=1, count=self.nblocks, bitorder="little").view(np.bool_)
        return masks[0], masks[1], masks[2]

    def _watch_error(self, error: _engine.EngineError) -> UserfaultError:
        if error.errno == errno.EBADF:
            return ClosedError(f"{self.name} was closed")
        return KernelError(
            f"{self.name} cannot be watched: {error.message or os.strerror(error.errno)}", errno=error.errno
        )

    def advise(self, advice: Advice) -> None:
        """Say how it will be read: `"random"` turns readahead off, `"sequential"` starts it at once.

        Raises:
            ValueError: `advice` is none of these.
            ClosedError: The memory is closed.
        """
        if advice not in _ADVICE:
            raise ValueError(f"advice {advice!r} is not one of {', '.join(map(repr, _ADVICE))}")
        self._check_open()
        self._advise(_ADVICE[advice])

    def _check_share(self, runs: list[tuple[int, int]], what: str) -> None:
        wanted, budget = sum(count for _, count in runs) * self.block, self.stats().budget
        if wanted > max(budget, self.block):
            raise BudgetError(
                f"{what} of {format_size(wanted)} of {self.name}: its budget holds {format_size(budget)}; ask for "
                "less at a time, or give it more memory"
            )

    def _source_error(self, error: _engine.EngineError) -> UserfaultError:
        if error.errno == errno.EBADF:
            return ClosedError(f"{self.name} was closed")
        offset = error.block * self.block
        length = min(self.block, self.nbytes - offset)
        return SourceError(
            f"{self.name}: bytes [{offset}, {offset + length}) cannot be read: "
            f"{error.message or os.strerror(error.errno)}",
            source_name=self.name,
            offset=offset,
            length=length,
            detail=error.message,
            errno=error.errno,
        )
