"""What tracking cannot see, where it can be told beforehand: notes of a result, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from userfault.kernel.pagemap import vm_flags
from userfault.track._vmas import vmas

if TYPE_CHECKING:
    from userfault.track._targets import Target

__all__ = ["limits_of"]

_SHARED: Final = (
    "shared memory: accesses through other mappings of it, by other processes, and by read() and write() on its file"
    " are not seen"
)
_MERGED: Final = (
    "KSM may merge these pages (MADV_MERGEABLE), which loses track of them: clean pages may be reported as written; use"
    " madvise MADV_UNMERGEABLE"
)
_PINNED: Final = (
    "this process has pinned memory (io_uring's buffers, RDMA, vfio): what devices and the kernel write through pins"
    " is not seen"
)


def limits_of(target: Target) -> tuple[str, ...]:
    """Return the notes on an object's memory; usually none."""
    if target.memory is not None:
        return ()
    notes = []
    if any(vma.shared for vma in vmas(target.start, target.end)):
        notes.append(_SHARED)
    if _merging() and any("mg" in vma.flags for vma in vm_flags(target.start, target.end - target.start)):
        notes.append(_MERGED)
    if _pinned():
        notes.append(_PINNED)
    return tuple(notes)


def _merging() -> bool:
    """Whether any of our memory may be merged: to find out which counts the pages of all mappings."""
    try:
        with open("/proc/self/ksm_stat") as text:
            found = dict(line.rsplit(maxsplit=1) for line in text)
    except OSError:
        return False
    if "ksm_mergeable:" in found:  # Linux 6.15
        return found["ksm_mergeable:"] == "yes" or found["ksm_merge_any:"] == "yes"
    try:
        with open("/sys/kernel/mm/ksm/run") as run:
            return run.read().strip() != "0"
    except OSError:
        return False


def _pinned() -> bool:
    with open("/proc/self/status", "rb") as text:
        for line in text:
            if line.startswith(b"VmPin:"):
                return line.split()[1] != b"0"
    return False
