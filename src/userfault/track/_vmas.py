"""The mappings of this process in a range, without counting their pages (as /proc/PID/smaps does)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from userfault.kernel._address import PAGE_SIZE
from userfault.kernel._ioc import iowr
from userfault.kernel.pagemap import vm_flags

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Vma", "vmas"]

# struct procmap_query of linux/fs.h (Linux 6.11): size, flags, address; start, end, flags, page size, offset and inode
# of what was found; device (two), sizes and addresses of the buffers for its name and build id.
_QUERY: Final = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY: Final = iowr(ord("f"), 17, _QUERY.size)
_OR_NEXT: Final = 0x10
_SHARED: Final = 0x08


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping of this process.

    Attributes:
        start: Address of its first byte.
        end: Address behind its last.
        shared: Whether other mappings see what is written through this one.
        page_size: Bytes of its pages: those of hugetlb memory are larger.
        file: Whether it is of a file, as shared memory always is.
    """

    start: int
    end: int
    shared: bool
    page_size: int
    file: bool


def vmas(start: int, end: int) -> list[Vma]:
    """Return the mappings that have a byte in [start, end), in order of address."""
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return list(_queried(fd, start, end))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            raise
    finally:
        os.close(fd)
    return list(_read(start, end))


def _queried(fd: int, start: int, end: int) -> Iterator[Vma]:
    argument = bytearray(_QUERY.size)
    while start < end:
        _QUERY.pack_into(argument, 0, _QUERY.size, _OR_NEXT, start, *(0,) * 12)
        try:
            fcntl.ioctl(fd, _PROCMAP_QUERY, argument)
        except FileNotFoundError:  # nothing from here on
            return
        _, _, _, low, high, flags, page_size, _, inode, *_ = _QUERY.unpack(argument)
        if low >= end:
            return
        yield Vma(low, high, bool(flags & _SHARED), page_size, inode != 0)
        start = high


def _read(start: int, end: int) -> Iterator[Vma]:
    with open("/proc/self/maps", errors="surrogateescape") as text:
        for line in text:
            place, permissions, _, _, inode, *_ = line.split(maxsplit=5)
            low, high = (int(address, 16) for address in place.split("-"))
            if low >= end:
                return
            if high > start:
                file = inode != "0"
                # Huge pages of hugetlbfs are always of a file; only smaps tells their size here.
                size = next((v.page_size for v in vm_flags(low)), PAGE_SIZE) if file else PAGE_SIZE
                yield Vma(low, high, permissions[3] == "s", size, file)
