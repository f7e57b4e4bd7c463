"""The memory calls of libc that Python has no function for, with their numbers on every architecture.

Each call releases the GIL (ctypes `CDLL`), so one that waits in the kernel (for a page fault, or until a
userfaultfd's event is read) blocks only its own thread. A failed call raises the `UffdError` of its errno.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from enum import IntEnum, IntFlag
from typing import Final

from userfault.kernel._architecture import architecture
from userfault.kernel.errors import UffdError, error_from_errno

__all__ = [
    "Advice",
    "MapFlag",
    "Protection",
    "RemapFlag",
    "copy_memory",
    "duplicate",
    "file_system_magic",
    "madvise",
    "memory_file",
    "mlock",
    "mmap",
    "mmap_exactly",
    "mprotect",
    "mremap",
    "munlock",
    "munmap",
    "punch_hole",
]

_ARCHITECTURE: Final = architecture()
_FAMILIES: Final = {"alpha": "alpha", "mips": "mips", "parisc": "parisc", "pp": "powerpc", "sparc": "sparc"}
_FAMILY: Final = next((name for start, name in _FAMILIES.items() if _ARCHITECTURE.startswith(start)), "")


def _number(generic: int, **others: int) -> int:
    """Choose the number of this machine's family: some chose theirs before there was a common header."""
    return others.get(_FAMILY, generic)


class Protection(IntFlag):
    """What the processor lets a program do with memory (PROT_*)."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


class MapFlag(IntFlag):
    """Flags of mmap(2) (MAP_*), with the values of this machine's architecture.

    The `Mapping` constructors set what they need; the others can be added by their argument `flags`.
    """

    SHARED = 0x1
    PRIVATE = 0x2
    SHARED_VALIDATE = 0x3
    DROPPABLE = 0x8  # Linux 6.11; in place of PRIVATE
    FIXED = _number(0x10, alpha=0x100, parisc=0x4)
    ANONYMOUS = _number(0x20, alpha=0x10, mips=0x800, parisc=0x10)
    GROWSDOWN = _number(0x100, alpha=0x1000, mips=0x1000, parisc=0x8000, sparc=0x200)
    LOCKED = _number(0x2000, alpha=0x8000, mips=0x8000, powerpc=0x80, sparc=0x100)
    NORESERVE = _number(0x4000, alpha=0x10000, mips=0x400, powerpc=0x40, sparc=0x40)
    POPULATE = _number(0x8000, alpha=0x20000, mips=0x10000, parisc=0x10000)
    NONBLOCK = _number(0x10000, alpha=0x40000, mips=0x20000, parisc=0x20000)
    STACK = _number(0x20000, alpha=0x80000, mips=0x40000, parisc=0x40000)
    HUGETLB = _number(0x40000, alpha=0x100000, mips=0x80000, parisc=0x80000)
    FIXED_NOREPLACE = _number(0x100000, alpha=0x200000)  # Linux 4.17


class Advice(IntEnum):
    """What madvise(2) can be told of a range (MADV_*); the release is the first that knows it."""

    NORMAL = 0
    RANDOM = 1
    SEQUENTIAL = 2
    WILLNEED = 3
    DONTNEED = _number(4, alpha=6)
    FREE = 8  # Linux 4.5
    REMOVE = 9
    DONTFORK = 10
    DOFORK = 11
    MERGEABLE = 12
    UNMERGEABLE = 13
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    DONTDUMP = 16
    DODUMP = 17
    WIPEONFORK = 18  # Linux 4.14
    KEEPONFORK = 19  # Linux 4.14
    COLD = 20  # Linux 5.4
    PAGEOUT = 21  # Linux 5.4
    POPULATE_READ = 22  # Linux 5.14
    POPULATE_WRITE = 23  # Linux 5.14
    DONTNEED_LOCKED = 24  # Linux 5.18
    COLLAPSE = 25  # Linux 6.1
    HWPOISON = 100  # CAP_SYS_ADMIN
    SOFT_OFFLINE = 101  # CAP_SYS_ADMIN
    GUARD_INSTALL = 102  # Linux 6.13
    GUARD_REMOVE = 103  # Linux 6.13


class RemapFlag(IntFlag):
    """Flags of mremap(2)."""

    MAYMOVE = 1
    FIXED = 2
    DONTUNMAP = 4  # Linux 5.7 for private anonymous memory, 5.13 for all


_MLOCK_ONFAULT: Final = 1
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_STATFS_BYTES: Final = 256  # struct statfs is at most 120 on any architecture

_REMEDIES: Final[dict[tuple[str, int], str]] = {
    ("mmap", errno.EEXIST): "something is mapped there already: choose another address, or unmap it first",
    ("mmap", errno.EACCES): "the file is not open for what the mapping wants, or is no regular file",
    ("mmap", errno.EPERM): "the address is below vm.mmap_min_addr, or the file may not be mapped like this",
    (
        "mmap",
        errno.EINVAL,
    ): "flags that do not go together, or a huge page size that this machine does not have",
    ("mmap", errno.ENODEV): "this file cannot be mapped",
    ("mmap", errno.ENOMEM): (
        "no room in the address space, over vm.overcommit_memory or vm.max_map_count, or (huge pages) too few are"
        " free: raise /sys/kernel/mm/hugepages/hugepages-*/nr_hugepages"
    ),
    ("mmap", errno.EAGAIN): "more than may be locked: raise RLIMIT_MEMLOCK (ulimit -l)",
    ("munmap", errno.EINVAL): "a huge page is cut",
    ("munmap", errno.ENOMEM): "splitting the mapping needs one more than vm.max_map_count",
    ("mprotect", errno.EACCES): "the file is not open for that",
    (
        "mprotect",
        errno.ENOMEM,
    ): "a part is not mapped, or splitting needs more mappings than vm.max_map_count",
    ("mremap", errno.EFAULT): "it is not one mapping any more (mprotect, madvise and mlock split mappings)",
    ("mremap", errno.EINVAL): (
        "the ranges overlap, or this kernel or memory does not know the flag (dontunmap: Linux 5.7, and 5.13 for"
        " shared memory), or huge pages cannot grow like this"
    ),
    ("mremap", errno.ENOMEM): "it cannot grow in place, or there is no room for it",
    ("mremap", errno.EAGAIN): "more than may be locked: raise RLIMIT_MEMLOCK (ulimit -l)",
    (
        "madvise",
        errno.EINVAL,
    ): "this kernel does not know the advice, or it does not go with this kind of memory",
    ("madvise", errno.ENOMEM): "a part is not mapped, or there is no memory for it",
    ("madvise", errno.EBADF): "the mapping is no file",
    ("madvise", errno.EBUSY): "a page is in use elsewhere just now, or (COLLAPSE) the range has holes",
    ("madvise", errno.EAGAIN): "something was short for a moment: try again",
    ("madvise", errno.EFAULT): (
        "a page is trapped by a userfaultfd that does not see the kernel's accesses, or lies beyond the file's end"
    ),
    ("madvise", errno.EPERM): "this advice needs CAP_SYS_ADMIN, or the memory is sealed",
    ("mlock", errno.ENOMEM): (
        "more than may be locked (raise RLIMIT_MEMLOCK, ulimit -l), a part is not mapped, or a page is trapped by a"
        " userfaultfd that does not see the kernel's accesses"
    ),
    ("mlock", errno.EPERM): "nothing may be locked: raise RLIMIT_MEMLOCK (ulimit -l)",
    ("mlock", errno.EAGAIN): "some pages could not be locked: try again",
    ("fallocate", errno.EPERM): "the file is sealed",
    ("fallocate", errno.EBADF): "the file is not open for writing",
    ("fallocate", errno.EOPNOTSUPP): "this file system cannot punch holes",
}


@functools.cache
def _libc() -> ctypes.CDLL:
    # Loaded at the first use: importing this package shall cost nothing.
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    # With a 64-bit offset also on 32-bit machines; musl, which lacks these names, has no other offsets.
    for name, fallback in (("mmap64", "mmap"), ("fallocate64", "fallocate")):
        if not hasattr(libc, name):
            setattr(libc, name, getattr(libc, fallback))
    libc.mmap64.argtypes = (pointer, size, number, number, number, ctypes.c_int64)
    libc.mmap64.restype = pointer
    libc.munmap.argtypes = (pointer, size)
    libc.mprotect.argtypes = (pointer, size, number)
    libc.madvise.argtypes = (pointer, size, number)
    libc.mremap.argtypes = (pointer, size, size, number, pointer)
    libc.mremap.restype = pointer
    libc.mlock.argtypes = (pointer, size)
    libc.munlock.argtypes = (pointer, size)
    libc.fallocate64.argtypes = (number, number, ctypes.c_int64, ctypes.c_int64)
    libc.fstatfs.argtypes = (number, pointer)
    libc.memmove.argtypes = (pointer, pointer, size)
    libc.memmove.restype = pointer
    return libc


def _failed(call: str, address: int | None, length: int | None, path: str | None = None) -> UffdError:
    number = ctypes.get_errno()
    remedy = _REMEDIES.get((call, number), "")
    return error_from_errno(number, call=call, address=address, length=length, remedy=remedy, path=path)


def _check(result: int, call: str, address: int, length: int, path: str | None = None) -> None:
    if result:
        raise _failed(call, address, length, path)


def _address(result: int | None, call: str, address: int, length: int) -> int:
    # MAP_FAILED is the address of all ones; NULL is a valid one.
    if result == ctypes.c_void_p(-1).value:
        raise _failed(call, address or None, length)
    return result or 0


def mmap(address: int, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map memory and return where it is."""
    result = _libc().mmap64(address, length, protection, flags, fd, offset)
    return _address(result, "mmap", address, length)


def mmap_exactly(
    address: int, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0
) -> int:
    """Map memory at this address and nowhere else; what is mapped there is never replaced.

    Raises:
        PageExistsError: Something is mapped there.
    """
    found = mmap(address, length, protection, flags | MapFlag.FIXED_NOREPLACE, fd, offset)
    if found != address:  # before Linux 4.17 the flag is unknown and the address a mere hint
        munmap(found, length)
        ctypes.set_errno(errno.EEXIST)
        raise _failed("mmap", address, length)
    return found


def munmap(address: int, length: int) -> None:
    """Unmap a range. With EVENT_UNMAP it returns only when the event was read."""
    _check(_libc().munmap(address, length), "munmap", address, length)


def mprotect(address: int, length: int, protection: int) -> None:
    """Change what the processor allows."""
    _check(_libc().mprotect(address, length, protection), "mprotect", address, length)


def madvise(address: int, length: int, advice: int) -> None:
    """Give advice. With EVENT_REMOVE some return only when the event was read."""
    name = f"({Advice(advice).name})" if advice in Advice.__members__.values() else f"({advice})"
    _check(_libc().madvise(address, length, advice), "madvise", address, length, name)


def mremap(address: int, length: int, new_length: int, flags: int, target: int = 0) -> int:
    """Resize or move a mapping and return where it is now."""
    return _address(_libc().mremap(address, length, new_length, flags, target), "mremap", address, length)


def mlock(address: int, length: int, *, on_fault: bool) -> None:
    """Lock pages into memory: all of them now, or each when it is first touched."""
    if on_fault:
        result = _libc().mlock2(ctypes.c_void_p(address), ctypes.c_size_t(length), _MLOCK_ONFAULT)
    else:
        result = _libc().mlock(address, length)
    _check(result, "mlock", address, length)


def munlock(address: int, length: int) -> None:
    """Undo `mlock`."""
    _check(_libc().munlock(address, length), "munlock", address, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a range of a file; its length stays."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _libc().fallocate64(fd, mode, offset, length):
        raise _failed("fallocate", None, length)


def memory_file(name: str, length: int, flags: int) -> int:
    """Make a file in memory of `length` bytes and return its descriptor, which no program started later inherits."""
    fd = -1
    try:
        fd = os.memfd_create(name, flags | os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        remedy = "no huge pages of this size, or an unknown flag" if error.errno == errno.EINVAL else ""
        number = error.errno or 0
        raise error_from_errno(number, call="memfd_create", length=length, remedy=remedy) from None
    return fd


def duplicate(fd: int) -> int:
    """Return another descriptor of the same file, which no program started later inherits."""
    try:
        return os.dup(fd)
    except OSError as error:
        raise error_from_errno(error.errno or 0, call="dup", remedy="") from None


def file_system_magic(fd: int) -> int:
    """Return what kind of file system a file is on, a number of `linux/magic.h`."""
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc().fstatfs(fd, answer):
        raise _failed("fstatfs", None, None)
    # The first member of struct statfs, a long but on s390.
    kind = ctypes.c_uint32 if _ARCHITECTURE.startswith("s390") else ctypes.c_ulong
    return int(kind.from_buffer(answer).value)


def copy_memory(target: int, source: int, length: int) -> None:
    """Copy bytes with the GIL released, so that another Python thread may serve the faults of it."""
    _libc().memmove(target, source, length)
