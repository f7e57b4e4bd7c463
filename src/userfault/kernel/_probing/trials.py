"""One small experiment per ability of the kernel, on a throw-away userfaultfd and one page of memory.

A feature bit says that the kernel knows a thing, not that it works here (emulators, sandboxes and back-ports
lie now and then), so each trial does the thing and looks at the bytes.

**No trial can hang.** The userfaultfd is opened `USER_MODE_ONLY`, or on kernels before 5.11 with the SIGBUS
feature; with either, a system call that meets a trapped page returns EFAULT at once, and system calls are all that
touches memory here (`areas`). The trials that need a thread to wait are in `message_trials`.

Every trial closes its userfaultfd *before* it unmaps its memory. The other order would wait for a reader of the
unmap event.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from userfault.kernel import abi
from userfault.kernel._kinds import MemoryKind
from userfault.kernel._probing.areas import HUGE, PATTERN, Area, TrialError, UntriedError, area, filled
from userfault.kernel._syscalls import ioctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "EHWPOISON",
    "Lab",
    "access_tracking",
    "category",
    "copy",
    "move",
    "negotiated",
    "poison",
    "protected_scan",
    "register",
    "rw_protect",
    "scan",
    "set_mode",
    "trap_minor",
    "write_protect",
    "write_protect_empty",
    "write_tracking",
    "zeropage",
]

EHWPOISON: Final = 133  # not in Python's errno module before 3.14
_MADV_POPULATE_READ: Final = 22  # Linux 5.14
_MADV_GUARD_INSTALL: Final = 102  # Linux 6.13
_WP: Final = abi.WriteprotectMode.WP
_RWP: Final = abi.RwprotectMode.RWP
_NOTHING: Final = abi.Feature(0)
_NO_FLAG: Final = abi.ScanFlag(0)


@dataclass(frozen=True, slots=True)
class Lab:
    """Where the trials get their userfaultfds from.

    Attributes:
        opener: Opens a userfaultfd with these flags.
        user_mode_only: Whether it knows that flag; else system calls are kept from waiting by the SIGBUS feature.
    """

    opener: Callable[[int], int]
    user_mode_only: bool

    @contextmanager
    def userfaultfd(self, features: abi.Feature = _NOTHING) -> Iterator[int]:
        """Open one and initialise it with these features, for as long as the context lasts."""
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        if self.user_mode_only:
            flags |= abi.OpenFlag.USER_MODE_ONLY
        else:
            features |= abi.Feature.SIGBUS
        fd = self.opener(flags)
        try:
            ioctl(fd, abi.Request.API, abi.API.pack(abi.UFFD_API, features, 0))
            yield fd
        finally:
            os.close(fd)


@contextmanager
def _registered(
    lab: Lab, memory: MemoryKind, features: abi.Feature, mode: abi.RegisterMode, *, fill: bool = True
) -> Iterator[tuple[int, Area]]:
    """Register one page that begins with `PATTERN`, or an untouched one."""
    with lab.userfaultfd(features):
        pass  # a kernel without the feature is to say so even where there is no such memory to try it on
    with (filled if fill else area)(memory) as pages, lab.userfaultfd(features) as fd:
        register(fd, pages, mode)
        yield fd, pages


def register(fd: int, pages: Area, mode: abi.RegisterMode) -> None:
    """Register the whole area."""
    ioctl(fd, abi.Request.REGISTER, abi.REGISTER.pack(pages.address, pages.size, mode, 0))


def _protect(fd: int, pages: Area, mode: abi.WriteprotectMode) -> None:
    ioctl(fd, abi.Request.WRITEPROTECT, abi.WRITEPROTECT.pack(pages.address, pages.size, mode))


def _rw_protect(fd: int, pages: Area, mode: abi.RwprotectMode) -> None:
    ioctl(fd, abi.Request.RWPROTECT, abi.RWPROTECT.pack(pages.address, pages.size, mode))


def _expect_trapped(touch: Callable[[], object], what: str) -> None:
    if not Area.is_trapped(touch):
        raise TrialError(f"{what} was not trapped")


def _features_of(memory: MemoryKind, shmem: abi.Feature, hugetlb: abi.Feature) -> abi.Feature:
    """Ask for the bit of this type of memory, so that a kernel without it says so at once."""
    if memory is MemoryKind.ANONYMOUS:
        return abi.Feature(0)
    return hugetlb if memory in HUGE else shmem


def copy(lab: Lab, memory: MemoryKind) -> str:
    """Trap a missing page and fill it."""
    features = _features_of(memory, abi.Feature.MISSING_SHMEM, abi.Feature.MISSING_HUGETLBFS)
    with (
        _registered(lab, memory, features, abi.RegisterMode.MISSING, fill=False) as (fd, target),
        filled(size=target.size) as source,
    ):
        _expect_trapped(target.read, "a missing page")
        ioctl(fd, abi.Request.COPY, abi.COPY.pack(target.address, source.address, target.size, 0, 0))
        target.expect()
    return "a missing page was trapped, then filled by COPY"


def zeropage(lab: Lab, memory: MemoryKind) -> str:
    """Fill a missing page with zeros."""
    features = _features_of(memory, abi.Feature.MISSING_SHMEM, abi.Feature.MISSING_HUGETLBFS)
    with _registered(lab, memory, features, abi.RegisterMode.MISSING, fill=False) as (fd, target):
        ioctl(fd, abi.Request.ZEROPAGE, abi.ZEROPAGE.pack(target.address, target.size, 0, 0))
        target.expect(bytes(len(PATTERN)))
    return "a missing page was filled by ZEROPAGE"


def poison(lab: Lab, memory: MemoryKind) -> str:
    """Make a missing page an error."""
    with _registered(lab, memory, abi.Feature.POISON, abi.RegisterMode.MISSING, fill=False) as (fd, target):
        ioctl(fd, abi.Request.POISON, abi.POISON.pack(target.address, target.size, 0, 0))
        try:
            target.memory.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            # EHWPOISON is for poison alone: a page that is merely missing gives EFAULT here.
            if error.errno != EHWPOISON:
                raise TrialError(f"a poisoned page gave {error.strerror}") from error
        else:
            raise TrialError("a poisoned page could be read")
    return "a poisoned page refused to be read"


def move(lab: Lab, memory: MemoryKind) -> str:
    """Move a page from another address."""
    with (
        _registered(lab, memory, abi.Feature.MOVE, abi.RegisterMode.MISSING, fill=False) as (fd, target),
        filled(memory) as source,
    ):
        ioctl(fd, abi.Request.MOVE, abi.MOVE.pack(target.address, source.address, target.size, 0, 0))
        target.expect()
        source.expect(bytes(len(PATTERN)))
    return "a page was moved to another address"


def trap_minor(lab: Lab, memory: MemoryKind) -> str:
    """Trap a page that is in the page cache and not mapped here, and map it."""
    features = _features_of(memory, abi.Feature.MINOR_SHMEM, abi.Feature.MINOR_HUGETLBFS)
    with _registered(lab, memory, features, abi.RegisterMode.MINOR, fill=False) as (fd, target):
        assert target.alias is not None, memory
        target.alias.write()
        _expect_trapped(target.read, "a cached but unmapped page")
        ioctl(fd, abi.Request.CONTINUE, abi.CONTINUE.pack(target.address, target.size, 0, 0))
        target.expect()
    return "a cached page was trapped, then mapped by CONTINUE"


def write_protect(lab: Lab, memory: MemoryKind) -> str:
    """Trap a write to a protected page, then let it through."""
    features = abi.Feature.PAGEFAULT_FLAG_WP
    features |= _features_of(memory, abi.Feature.WP_HUGETLBFS_SHMEM, abi.Feature.WP_HUGETLBFS_SHMEM)
    with _registered(lab, memory, features, abi.RegisterMode.WP) as (fd, target):
        _protect(fd, target, _WP)
        _expect_trapped(target.write, "a write to a protected page")
        _protect(fd, target, abi.WriteprotectMode(0))
        target.write(PATTERN[::-1])
        target.expect(PATTERN[::-1])
    return "a write to a protected page was trapped, then let through"


def write_protect_empty(lab: Lab, memory: MemoryKind = MemoryKind.ANONYMOUS) -> str:
    """Trap a write to a protected page that was never touched."""
    feature, mode = abi.Feature.WP_UNPOPULATED, abi.RegisterMode.WP
    with _registered(lab, memory, feature, mode, fill=False) as (fd, target):
        _protect(fd, target, _WP)
        _expect_trapped(target.write, "a write to a protected empty page")
    return "a write to a protected empty page was trapped"


def rw_protect(lab: Lab, memory: MemoryKind) -> str:
    """Trap a read of a protected page, then let it through."""
    with _registered(lab, memory, abi.Feature.RWP, abi.RegisterMode.RWP) as (fd, target):
        _rw_protect(fd, target, _RWP)
        _expect_trapped(target.read, "a read of a protected page")
        _rw_protect(fd, target, abi.RwprotectMode(0))
        target.expect()
    return "a read of a protected page was trapped, then let through"


def set_mode(lab: Lab, memory: MemoryKind = MemoryKind.ANONYMOUS) -> str:
    """Switch access traps to access tracking and back."""
    with _registered(lab, memory, abi.Feature.RWP, abi.RegisterMode.RWP) as (fd, target):
        _rw_protect(fd, target, _RWP)
        _expect_trapped(target.read, "a read of a protected page")
        ioctl(fd, abi.Request.SET_MODE, abi.SET_MODE.pack(abi.Feature.RWP_ASYNC, 0))
        target.expect()
        _rw_protect(fd, target, _RWP)
        ioctl(fd, abi.Request.SET_MODE, abi.SET_MODE.pack(0, abi.Feature.RWP_ASYNC))
        _expect_trapped(target.read, "a read after RWP_ASYNC was switched off")
        _rw_protect(fd, target, abi.RwprotectMode(0))
    return "traps were switched to recording and back"


def scan(pages: Area, wanted: abi.PageCategory, flags: abi.ScanFlag = _NO_FLAG) -> bool:
    """Ask PAGEMAP_SCAN whether the page is in a category."""
    region = ctypes.create_string_buffer(abi.PAGE_REGION.size)
    argument = bytearray(
        abi.SCAN_ARGUMENT.pack(
            abi.SCAN_ARGUMENT.size, flags, pages.address, pages.address + pages.size, 0,
            ctypes.addressof(region), 1, 0, 0, wanted, 0, wanted,
        )
    )  # fmt: skip
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        regions: int = fcntl.ioctl(fd, abi.Request.PAGEMAP_SCAN, argument)
    finally:
        os.close(fd)
    if not regions:
        return False
    start, _, categories = abi.PAGE_REGION.unpack(region.raw)
    return start == pages.address and bool(categories & wanted)


def _refuse_shared_memory(fd: int, target: Area) -> None:
    """A file on a tmpfs is shared memory, and would prove nothing about files. That can be registered for more."""
    try:
        register(fd, target, abi.RegisterMode.MISSING)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        raise UntriedError(
            "the only files at hand are on a tmpfs",
            "run it where Python is installed on a disk's file system",
        )


def write_tracking(lab: Lab, memory: MemoryKind) -> str:
    """Have a write recorded without a handler, and find it."""
    features = abi.Feature.WP_ASYNC | abi.Feature.WP_UNPOPULATED
    with lab.userfaultfd(features):
        pass
    with area(memory) as target, lab.userfaultfd(features) as fd:
        if memory is MemoryKind.FILE:
            _refuse_shared_memory(fd, target)
            target.read()
        else:
            target.write()
        register(fd, target, abi.RegisterMode.WP)
        _protect(fd, target, _WP)
        if scan(target, abi.PageCategory.WRITTEN):
            raise TrialError("a protected page reads as written")
        target.write()
        if not scan(target, abi.PageCategory.WRITTEN):
            raise TrialError("a write was not recorded")
    return "a write was recorded without a handler, and found by PAGEMAP_SCAN"


def access_tracking(lab: Lab, memory: MemoryKind) -> str:
    """Have a read recorded without a handler, and find it."""
    features = abi.Feature.RWP | abi.Feature.RWP_ASYNC
    with _registered(lab, memory, features, abi.RegisterMode.RWP) as (fd, target):
        _rw_protect(fd, target, _RWP)
        if scan(target, abi.PageCategory.ACCESSED):
            raise TrialError("a protected page reads as accessed")
        target.expect()
        if not scan(target, abi.PageCategory.ACCESSED):
            raise TrialError("a read was not recorded")
    return "a read was recorded without a handler, and found by PAGEMAP_SCAN"


def protected_scan(lab: Lab) -> str:
    """Find a written page and protect it again in the same call, and have an unregistered page refused."""
    written, flags = abi.PageCategory.WRITTEN, abi.ScanFlag.WP_MATCHING | abi.ScanFlag.CHECK_WPASYNC
    feature, mode = abi.Feature.WP_ASYNC, abi.RegisterMode.WP
    with _registered(lab, MemoryKind.ANONYMOUS, feature, mode) as (_, target), filled() as other:
        if not scan(target, written, flags):
            raise TrialError("a written page was not found")
        if scan(target, written):
            raise TrialError("a written page was found, and not protected")
        try:
            scan(other, written, flags)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
        else:
            raise TrialError("CHECK_WPASYNC let an unregistered page pass")
    return "a written page was found and protected again in one call"


def category(wanted: abi.PageCategory) -> Callable[[Lab], str]:
    """Make the trial of one category: have a page that is in it, where that is cheap, and look for it."""
    return lambda lab: _category(lab, wanted)


def _category(lab: Lab, wanted: abi.PageCategory) -> str:
    known = abi.PageCategory
    if wanted is known.ACCESSED:
        return access_tracking(lab, MemoryKind.ANONYMOUS)
    if wanted is known.WRITTEN:
        return write_tracking(lab, MemoryKind.ANONYMOUS)
    if wanted is known.WPALLOWED:
        feature, mode = abi.Feature.WP_ASYNC, abi.RegisterMode.WP
        with _registered(lab, MemoryKind.ANONYMOUS, feature, mode) as (_, target):
            return _found(target, wanted)
    if wanted in (known.SWAPPED, known.HUGE):
        with filled() as target:
            scan(target, wanted)
        return "the kernel knows it; no such page was made to look for"
    memory = MemoryKind.SHMEM if wanted is known.FILE else MemoryKind.ANONYMOUS
    with area(memory) as target:
        if wanted is known.GUARD:
            target.memory.madvise(_MADV_GUARD_INSTALL)
        elif wanted is known.PFNZERO:
            target.read()
        else:
            target.write()
        return _found(target, wanted)


def _found(target: Area, wanted: abi.PageCategory) -> str:
    if not scan(target, wanted):
        raise TrialError("a page that is in it was not found")
    return "a page that is in it was found"


def negotiated(*features: abi.Feature) -> Callable[[Lab], str]:
    """Make the trial of features that change nothing that could be seen from here: only ask for them."""

    def trial(lab: Lab) -> str:
        for feature in features:
            with lab.userfaultfd(feature):
                pass
        return "granted by UFFDIO_API"

    return trial
