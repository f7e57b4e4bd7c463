"""Accesses by userfaultfd's asynchronous read-write protection (Linux 7.3): the kernel notes them itself.

Armed pages are protected from reads and writes; the first access of a page takes the protection away, in the kernel,
and a scan finds the pages that have none. It does not tell reads from writes.
"""

from __future__ import annotations

import contextlib
import fcntl
from typing import TYPE_CHECKING, Final

import numpy as np

from userfault.kernel import abi
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel.abi import Feature, RegisterMode
from userfault.kernel.errors import RangeBusyError, UffdError
from userfault.kernel.pagemap import PageCategory
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.track import _runs
from userfault.track._ledger import Collected
from userfault.track._registering import Registering
from userfault.track._vmas import vmas

if TYPE_CHECKING:
    from userfault.track._runs import Runs

__all__ = ["ReadWriteProtection", "read_write_protection"]

_REQUEST: Final = int(abi.Request.RWPROTECT)
_pack: Final = abi.WRITEPROTECT.pack
_HUGE: Final = np.uint64(int(PageCategory.HUGE))
_TABLE: Final = PAGE_SIZE * (PAGE_SIZE // 8)  # bytes that one page table, or one transparent huge page, maps


class ReadWriteProtection(Registering):
    """The method "rwp-async"."""

    name = "rwp-async"
    tells_reads = True
    tells_writes = False
    _features = Feature.RWP | Feature.RWP_ASYNC
    _mode = RegisterMode.RWP
    _needs = "Linux 7.3 or newer on a 64-bit machine (userfaultfd's RWP and RWP_ASYNC)"

    def takes(self, start: int, end: int) -> bool:
        """Return whether the kernel registers this memory so, found out by trying."""
        # Not by the kind of memory: which kinds there are, only the kernel knows for sure.
        try:
            with Userfaultfd(self._features) as uffd:
                for vma in vmas(start, end):
                    unit = vma.page_size
                    uffd.register(max(vma.start, start // unit * unit), unit, mode=self._mode)
        except RangeBusyError:
            return True  # `begin` says by whom
        except UffdError:
            return False
        return True

    def _arm(self, uffd: Userfaultfd, start: int, end: int) -> None:
        assert self._scanner is not None
        found = self._scanner.scan(
            start, end - start, mask=PageCategory.HUGE, returns=PageCategory.HUGE
        ).regions
        self._cut(_runs.joined(found["start"], found["end"]))
        # Pages that are not there yet need nothing: the first access makes them present without protection.
        uffd.rwprotect(start, end - start)

    def collect(self, runs: Runs, rearm: bool) -> Collected:
        """Return the pages without protection; with `rearm`, protect exactly these again.

        The kernel has no request that does both in one step. An access in the gap between the two is to a page that
        was reported, and belongs to the interval that ends; or to one that was not, which is left as it is and reported
        next time.
        """
        assert self._scanner is not None
        found = []
        for start, end in runs.tolist():
            told = PageCategory.ACCESSED | PageCategory.HUGE
            found.append(
                self._scanner.scan(start, end - start, mask=PageCategory.ACCESSED, returns=told).regions
            )
        regions = found[0] if len(found) == 1 else np.concatenate(found)
        accessed = _runs.joined(regions["start"], regions["end"])
        if not rearm:
            return Collected(accessed, None, _runs.EMPTY)
        huge = regions[(regions["categories"] & _HUGE) != 0]
        self._cut(_runs.joined(huge["start"], huge["end"]))
        return Collected(accessed, None, self._protect(accessed))

    def _cut(self, runs: Runs) -> None:
        """Have transparent huge pages mapped as small ones: one is protected as a whole, and so is its access told.

        To protect a part of one does it. Those of hugetlb are units and stay so.
        """
        assert self._uffd is not None
        for start, end in runs.tolist():
            for vma in vmas(start, end):
                if vma.page_size != PAGE_SIZE:
                    continue
                for first in range(max(start, vma.start), min(end, vma.end), _TABLE):
                    with contextlib.suppress(UffdError):  # `_protect` tells
                        self._uffd.rwprotect(first, PAGE_SIZE)

    def _protect(self, runs: Runs) -> Runs:
        """Protect what was reported, and return where that is not possible any more."""
        assert self._uffd is not None
        fd, lost = self._uffd.fileno(), _runs.EMPTY
        for start, end in runs.tolist():
            try:
                fcntl.ioctl(fd, _REQUEST, _pack(start, end - start, 1))
            except OSError:  # a part was unmapped, or mapped anew
                run = _runs.runs_of([(start, end)])
                gone = self._lost(run)
                for low, high in _runs.subtract(run, gone).tolist():
                    self._uffd.rwprotect(low, high - low)
                lost = _runs.union(lost, gone)
        return lost


read_write_protection = ReadWriteProtection()
