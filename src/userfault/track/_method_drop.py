"""Reads and writes of shared memory, by dropping what the page tables say of it: the kernel fills them in again.

The pages of a shared mapping belong to its file (a memfd, /dev/shm, the page cache of any file): this process's page
table only points to them. MADV_DONTNEED forgets the pointers, no data, and no other process notices. Whatever is
accessed afterwards, by the processor or by the kernel, is PRESENT again: that tells accesses. That the mapping is
registered for asynchronous write protection (Linux 6.7) tells the writes among them, and makes the kernel fill in
single pages: without it, one access brings its neighbours along (fault-around, huge pages).

States of a page, as PAGEMAP_SCAN tells it:

==========  =========  =====================================================================================
PRESENT     WRITTEN    meaning
==========  =========  =====================================================================================
no          no         armed: a mark in the page table remembers the protection; untouched
yes         no         read
yes         yes        written
no          yes        written, and then dropped: by us in the gap described below, or by the kernel for want of memory
==========  =========  =====================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from userfault.errors import UntrackableError
from userfault.kernel import _mman, _syscalls
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel.abi import Feature, RegisterMode
from userfault.kernel.errors import NoMemoryError
from userfault.kernel.pagemap import PageCategory
from userfault.track import _runs
from userfault.track._ledger import Collected
from userfault.track._registering import Registering
from userfault.track._vmas import vmas

if TYPE_CHECKING:
    from userfault.kernel.pagemap import Regions
    from userfault.kernel.userfaultfd import Userfaultfd
    from userfault.track._runs import Runs

__all__ = ["Drop", "drop"]

_TOUCHED: Final = PageCategory.PRESENT | PageCategory.WRITTEN
_TOLD: Final = _TOUCHED | PageCategory.HUGE
_WRITTEN: Final = np.uint64(int(PageCategory.WRITTEN))
_HUGE: Final = np.uint64(int(PageCategory.HUGE))
_LONG: Final = 1 << 20  # a range so long pays a system call of its own
_VECTOR: Final = 1024  # UIO_MAXIOV
_IOVEC_IS_RUN: Final = (
    struct.calcsize("P") == 8
)  # struct iovec is then two numbers of eight bytes, as a run is


class Drop(Registering):
    """The method "drop"."""

    name = "drop"
    tells_reads = True
    tells_writes = True
    _features = Feature.WP_ASYNC
    _mode = RegisterMode.WP
    _needs = "Linux 6.7 or newer (userfaultfd's WP_ASYNC and PAGEMAP_SCAN)"

    def __init__(self) -> None:
        super().__init__()
        self._pidfd: int | None = None
        self._many = _IOVEC_IS_RUN

    def begin(self, runs: Runs) -> None:
        """Register, drop and protect. Only shared mappings: in private ones a drop would destroy what was written."""
        for start, end in runs.tolist():
            for vma in vmas(start, end):
                if not vma.shared or vma.page_size != PAGE_SIZE:
                    raise UntrackableError(
                        "the method 'drop' is for shared memory in small pages: memory of a memfd, of /dev/shm, of"
                        " mmap with MAP_SHARED, of a file mapped for reading and writing"
                    )
        super().begin(runs)

    def _arm(self, uffd: Userfaultfd, start: int, end: int) -> None:
        # First the drop, so that nothing is there but marks; what a thread touches in between counts as touched. Not
        # by a scan: where a huge page is mapped as one, that protects it as one, and the next drop forgets it all.
        self._drop(np.array([[start, end]], np.uint64))
        uffd.writeprotect(start, end - start)

    def collect(self, runs: Runs, rearm: bool) -> Collected:
        """Return what was touched; with `rearm`, make it as if it had not been.

        The scan protects what it reports as written in the same step. Then exactly what was reported is dropped, all
        else stays as it is. So for a thread that meets us in the gap between the two:

        * A page that was not reported is touched: it stays, and is reported next time.
        * A reported page is read: that belongs to the interval that ends, where it counts as accessed anyway.
        * A reported page is written: the fault takes its protection away, and the drop, which makes a mark of a
          protected page, leaves nothing of this one. A page without a mark is WRITTEN: reported next time.

        The drop moves the processor's note that the page is dirty to the file's page, so no data is lost either.
        """
        found, blind = self._looked(runs, lambda start, end: self._scan(start, end, rearm))
        if not found:
            return Collected(_runs.EMPTY, _runs.EMPTY, blind)
        regions = found[0] if len(found) == 1 else np.concatenate(found)
        accessed = _runs.joined(regions["start"], regions["end"])
        if rearm:
            # A huge page that is mapped as one was reported as written; to drop it would leave no marks. It comes about
            # where a whole table of marks went in the gap. This cuts it.
            for start, end in regions[["start", "end"]][(regions["categories"] & _HUGE) != 0].tolist():
                assert self._uffd is not None
                self._uffd.writeprotect(start, end - start)
            self._drop(accessed)
        regions = regions[(regions["categories"] & _WRITTEN) != 0]
        return Collected(accessed, _runs.joined(regions["start"], regions["end"]), blind)

    def _scan(self, start: int, end: int, rearm: bool) -> Regions:
        assert self._scanner is not None
        return self._scanner.scan(
            start, end - start, anyof=_TOUCHED, returns=_TOLD, protect=rearm, check_wpasync=True
        ).regions

    def _drop(self, runs: Runs) -> None:
        """Forget the pointers to pages, in one system call for many short ranges where the kernel has that."""
        vector = runs.copy()
        vector[:, 1] -= vector[:, 0]
        if self._many and len(vector) > 1:
            short = vector[:, 1] < _LONG
            if short.all():
                self._drop_many(vector)
                return
            self._drop_many(vector[short])
            vector = vector[~short]
        for start, length in vector.tolist():
            _drop_one(start, length)

    def _drop_many(self, vector: Runs) -> None:
        """Drop (address, length) pairs: at most 1 MiB each, so that one call's sum is not beyond what it takes."""
        if self._pidfd is None:
            self._pidfd = os.pidfd_open(os.getpid())
        for first in range(0, len(vector), _VECTOR):
            part = vector[first : first + _VECTOR]
            while len(part):
                done = 0
                if self._many:
                    try:
                        done = _syscalls.process_madvise(
                            self._pidfd, part.ctypes.data, len(part), _mman.Advice.DONTNEED_LOCKED
                        )
                    except OSError as error:
                        # This advice is for the calling process only from Linux 6.13 on.
                        self._many = error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EPERM)
                if done == int(part[:, 1].sum()):
                    break
                # Never twice: what was touched since the first time would be lost.
                part = part[int(np.searchsorted(np.cumsum(part[:, 1]), np.uint64(done), side="right")) :]
                _drop_one(*part[0].tolist())
                part = part[1:]

    def _close_unused(self) -> None:
        super()._close_unused()
        if self._pidfd is not None and self._uffd is None:
            os.close(self._pidfd)
            self._pidfd = None


def _drop_one(start: int, length: int) -> None:
    # LOCKED: the kernel drops no locked pages otherwise. NoMemoryError: a part is gone, the rest is done.
    with contextlib.suppress(NoMemoryError):
        _mman.madvise(start, length, _mman.Advice.DONTNEED_LOCKED)


drop = Drop()
