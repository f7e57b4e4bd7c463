"""Reads and writes of private anonymous memory, by moving its pages away: the engine's mirror.

The first access of a page is a fault that a native thread serves, without Python: a page that is read comes back
protected from writes, one that is written comes back plain. Pages are taken away again in the step that reports them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from userfault import _mirror
from userfault.errors import PrivilegeError, TrackError, UntrackableError
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel.pagemap import vm_flags
from userfault.track import _runs
from userfault.track._ledger import Collected

if TYPE_CHECKING:
    from userfault.track._runs import Runs

__all__ = ["StashMethod"]

_ELSE = "use track_writes, or have the data in memory of userfault.track.shared_array"
_WHY = {
    errno.ENOSYS: f"to track reads of private memory needs Linux 6.8 or newer (UFFDIO_MOVE): {_ELSE}",
    errno.EBUSY: "another userfaultfd of this process is registered for this memory: end what uses it first",
    errno.EEXIST: "this memory is tracked already, outside of this ledger",
    errno.EINVAL: (
        "to track reads, memory must be private and anonymous, readable and writable, not locked (mlock, mlockall),"
        f" and of small or transparent huge pages: unlock it, or {_ELSE}"
    ),
    errno.ENOMEM: (
        "a part of this memory is not mapped, or there is no address space left for its mirror, which is as large"
        " (ulimit -v, vm.overcommit_memory=2, vm.max_map_count)"
    ),
}


class StashMethod:
    """The method "stash" of the ledger: exact, by page, for what the program allocated itself (Linux 6.8)."""

    name = "stash"
    tells_reads = True
    tells_writes = True

    def granularity(self, start: int) -> int:
        """Return the size of a page: huge pages are told apart by their small ones."""
        return PAGE_SIZE

    def begin(self, runs: Runs) -> None:
        """Take all pages away.

        Raises:
            PrivilegeError: System calls on such memory would fail, as this user gets no faults of the kernel.
            UntrackableError: The memory is not of the kind that can be moved.
        """
        for start, end in runs.tolist() if _may_merge() else ():
            if any("mg" in vma.flags for vma in vm_flags(start, end - start)):
                raise UntrackableError(
                    "KSM may merge these pages (MADV_MERGEABLE, PR_SET_MEMORY_MERGE), and then writes go unnoticed:"
                    " call madvise with MADV_UNMERGEABLE first"
                )
        try:
            _mirror.begin(np.ascontiguousarray(runs))
        except _mirror.MirrorError as error:
            raise _error(error.errno) from None

    def collect(self, runs: Runs, rearm: bool) -> Collected:
        """Return what was touched; with `rearm`, what is returned is taken away again, in the same step."""
        try:
            told = _mirror.collect(np.ascontiguousarray(runs), rearm)
        except _mirror.MirrorError as error:
            raise _error(error.errno) from None
        found = np.frombuffer(told, np.uint64).reshape(-1, 3)
        what = found[:, 2]

        def of(kind: int) -> Runs:
            return _runs.runs_of(found[(what & np.uint64(kind)) != 0, :2])

        return Collected(of(_mirror.ACCESSED), of(_mirror.WRITTEN), of(_mirror.BLIND))

    def end(self, runs: Runs) -> None:
        """Bring everything back."""
        _mirror.end(np.ascontiguousarray(runs))

    def forked(self, runs: Runs) -> None:
        """Begin anew: the engine has made it plain memory in the child, with all its bytes, before fork returned."""
        self.begin(runs)


def _may_merge() -> bool:
    # Which memory KSM may merge is known by smaps only, which counts pages: not where nothing may be (Linux 6.15).
    try:
        with open("/proc/self/ksm_stat") as text:
            return "ksm_mergeable: no" not in text.read()
    except OSError:
        return False


def _error(number: int) -> Exception:
    if number == errno.EPERM:
        return PrivilegeError(
            "to track reads of private memory, this user needs faults of the kernel, too, else system calls on such"
            f" memory fail: see docs/privileges.md, or {_ELSE}",
            call="userfaultfd",
            errno=number,
        )
    if number in _WHY:
        return UntrackableError(_WHY[number])
    return TrackError(f"tracking by moving pages failed (errno {number}, {errno.errorcode.get(number, '?')})")
