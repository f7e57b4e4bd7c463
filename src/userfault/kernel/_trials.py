"""One small experiment per feature, on a throw-away userfaultfd and a page or two of memory.

A feature bit says that the kernel knows a thing, not that it works here (emulators, sandboxes and back-ports
lie now and then), so each trial does the thing and looks at the bytes.

**No trial can hang.** Python never reads or writes trapped memory itself: it would wait in the kernel with
the GIL held. All touching goes through system calls (`write` and `read` on a pipe), and the userfaultfd is
opened `USER_MODE_ONLY`, or on kernels before 5.11 with the SIGBUS feature; with either, a system call that
meets a trapped page returns EFAULT at once.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from userfault.kernel import abi
from userfault.kernel._syscalls import ioctl, madvise_self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["NewFd", "TrialError", "sigbus_guarded", "trials", "user_mode_only"]

PAGE: Final = mmap.PAGESIZE
_MADV_DONTNEED: Final = 4
_MADV_POPULATE_READ: Final = 22  # Linux 5.14
_EHWPOISON: Final = 133
_PATTERN: Final = b"userfault probe."


class TrialError(Exception):
    """The feature did not do what it is for; the message says what happened instead."""


class NewFd(Protocol):
    """Open a userfaultfd and initialise it with these features, for as long as the context lasts."""

    def __call__(self, features: abi.Feature) -> AbstractContextManager[int]: ...


@contextmanager
def _initialised(fd: int, features: abi.Feature) -> Iterator[int]:
    try:
        ioctl(fd, abi.Request.API, abi.API.pack(abi.UFFD_API, features, 0))
        yield fd
    finally:
        os.close(fd)


def user_mode_only(opener: Callable[[int], int]) -> NewFd:
    """Make trial descriptors with USER_MODE_ONLY, which anybody may have."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | abi.OpenFlag.USER_MODE_ONLY
    return lambda features: _initialised(opener(flags), features)


def sigbus_guarded(opener: Callable[[int], int]) -> NewFd:
    """Make trial descriptors for kernels that do not know USER_MODE_ONLY."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    return lambda features: _initialised(opener(flags), features | abi.Feature.SIGBUS)


class _Pages:
    """Some pages of memory, touched by system calls only."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory: Final = memory
        anchor = ctypes.c_char.from_buffer(memory)  # takes the address, touches nothing
        self.address: Final = ctypes.addressof(anchor)

    def read(self) -> bytes:
        """Let the kernel read the first bytes. EFAULT means that the page is trapped."""
        receiver, sender = os.pipe()
        try:
            with memoryview(self.memory) as view, view[: len(_PATTERN)] as piece:
                os.write(sender, piece)
            return os.read(receiver, len(_PATTERN))
        finally:
            os.close(receiver)
            os.close(sender)

    def write(self, data: bytes = _PATTERN) -> None:
        """Let the kernel write the first bytes."""
        receiver, sender = os.pipe()
        try:
            os.write(sender, data)
            with memoryview(self.memory) as view, view[: len(data)] as piece:
                os.readv(receiver, [piece])
        finally:
            os.close(receiver)
            os.close(sender)

    def is_trapped(self, touch: Callable[[], object]) -> bool:
        try:
            touch()
        except OSError as error:
            if error.errno == errno.EFAULT:
                return True
            raise
        return False

    def register(self, fd: int, mode: abi.RegisterMode) -> None:
        ioctl(fd, abi.Request.REGISTER, abi.REGISTER.pack(self.address, len(self.memory), mode, 0))

    def fill_from(self, fd: int, source: _Pages) -> None:
        ioctl(fd, abi.Request.COPY, abi.COPY.pack(self.address, source.address, PAGE, 0, 0))

    def expect(self, data: bytes = _PATTERN) -> None:
        if self.read() != data:
            raise TrialError("the page holds other bytes than it should")


@contextmanager
def _anonymous() -> Iterator[_Pages]:
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        yield _Pages(memory)


@contextmanager
def _filled() -> Iterator[_Pages]:
    with _anonymous() as pages:
        pages.write()
        yield pages


@contextmanager
def _shared_twice() -> Iterator[tuple[_Pages, _Pages]]:
    """Two mappings of one page of shared memory."""
    with ExitStack() as stack:
        fd = os.memfd_create("userfault-probe", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, PAGE)
        first, second = (_Pages(stack.enter_context(mmap.mmap(fd, PAGE))) for _ in range(2))
        yield first, second


def _missing(new: NewFd) -> str:
    with new(abi.Feature(0)) as fd, _filled() as source, _anonymous() as target:
        target.register(fd, abi.RegisterMode.MISSING)
        if not target.is_trapped(target.read):
            raise TrialError("a missing page was not trapped")
        target.fill_from(fd, source)
        target.expect()
    return "a missing page was trapped, then filled by COPY"


def _zeropage(new: NewFd) -> str:
    with new(abi.Feature(0)) as fd, _anonymous() as target:
        target.register(fd, abi.RegisterMode.MISSING)
        ioctl(fd, abi.Request.ZEROPAGE, abi.ZEROPAGE.pack(target.address, PAGE, 0, 0))
        target.expect(bytes(len(_PATTERN)))
    return "a missing page was filled by ZEROPAGE"


def _missing_shared(new: NewFd) -> str:
    with new(abi.Feature.MISSING_SHMEM) as fd, _filled() as source, _shared_twice() as (target, _):
        target.register(fd, abi.RegisterMode.MISSING)
        target.fill_from(fd, source)
        target.expect()
    return "a page of a memfd was filled by COPY"


def _minor_shared(new: NewFd) -> str:
    with new(abi.Feature.MINOR_SHMEM) as fd, _shared_twice() as (target, alias):
        target.register(fd, abi.RegisterMode.MINOR)
        alias.write()
        if not target.is_trapped(target.read):
            raise TrialError("a cached but unmapped page was not trapped")
        ioctl(fd, abi.Request.CONTINUE, abi.CONTINUE.pack(target.address, PAGE, 0, 0))
        target.expect()
    return "a cached page of a memfd was trapped, then mapped by CONTINUE"


def _sigbus(new: NewFd) -> str:
    with new(abi.Feature.SIGBUS) as fd, _anonymous() as target:
        target.register(fd, abi.RegisterMode.MISSING)
        if not target.is_trapped(target.read):
            raise TrialError("a missing page was not trapped")
    return "a missing page gave an error instead of a message"


def _poison(new: NewFd) -> str:
    with new(abi.Feature.POISON) as fd, _anonymous() as target:
        target.register(fd, abi.RegisterMode.MISSING)
        ioctl(fd, abi.Request.POISON, abi.POISON.pack(target.address, PAGE, 0, 0))
        try:
            target.memory.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            # EHWPOISON is for poison alone: a page that is merely missing gives EFAULT here.
            if error.errno != _EHWPOISON:
                raise TrialError(f"a poisoned page gave {error.strerror}") from error
        else:
            raise TrialError("a poisoned page could be read")
    return "a poisoned page refused to be read"


def _move(new: NewFd) -> str:
    with new(abi.Feature.MOVE) as fd, _filled() as source, _anonymous() as target:
        target.register(fd, abi.RegisterMode.MISSING)
        ioctl(fd, abi.Request.MOVE, abi.MOVE.pack(target.address, source.address, PAGE, 0, 0))
        target.expect()
        source.expect(bytes(len(_PATTERN)))
    return "a page was moved to another address"


def _protect(fd: int, pages: _Pages, mode: abi.WriteprotectMode) -> None:
    ioctl(fd, abi.Request.WRITEPROTECT, abi.WRITEPROTECT.pack(pages.address, PAGE, mode))


def _write_protect(new: NewFd) -> str:
    with new(abi.Feature.PAGEFAULT_FLAG_WP) as fd, _filled() as target:
        target.register(fd, abi.RegisterMode.WP)
        _protect(fd, target, abi.WriteprotectMode.WP)
        if not target.is_trapped(target.write):
            raise TrialError("a write to a protected page was not trapped")
        _protect(fd, target, abi.WriteprotectMode(0))
        target.write(_PATTERN[::-1])
        target.expect(_PATTERN[::-1])
    return "a write to a protected page was trapped, then let through"


def _write_protect_empty(new: NewFd) -> str:
    with new(abi.Feature.WP_UNPOPULATED) as fd, _anonymous() as target:
        target.register(fd, abi.RegisterMode.WP)
        _protect(fd, target, abi.WriteprotectMode.WP)
        if not target.is_trapped(target.write):
            raise TrialError("a write to a protected empty page was not trapped")
    return "a write to a protected empty page was trapped"


def _scan(pages: _Pages, category: abi.PageCategory) -> bool:
    """Ask PAGEMAP_SCAN whether the page is of a category."""
    region = ctypes.create_string_buffer(abi.PAGE_REGION.size)
    start, end = pages.address, pages.address + PAGE
    size, one_region = abi.SCAN_ARGUMENT.size, ctypes.addressof(region)
    argument = bytearray(
        abi.SCAN_ARGUMENT.pack(size, 0, start, end, 0, one_region, 1, 0, 0, category, 0, category)
    )
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        regions: int = fcntl.ioctl(fd, abi.Request.PAGEMAP_SCAN, argument)
    finally:
        os.close(fd)
    return regions > 0


def _write_tracking(new: NewFd) -> str:
    with new(abi.Feature.WP_ASYNC | abi.Feature.WP_UNPOPULATED) as fd, _filled() as target:
        target.register(fd, abi.RegisterMode.WP)
        _protect(fd, target, abi.WriteprotectMode.WP)
        if _scan(target, abi.PageCategory.WRITTEN):
            raise TrialError("a protected page reads as written")
        target.write()
        if not _scan(target, abi.PageCategory.WRITTEN):
            raise TrialError("a write was not recorded")
    return "a write was recorded without a handler, and found by PAGEMAP_SCAN"


def _access_tracking(new: NewFd) -> str:
    with new(abi.Feature.RWP | abi.Feature.RWP_ASYNC) as fd, _filled() as target:
        target.register(fd, abi.RegisterMode.RWP)
        ioctl(fd, abi.Request.RWPROTECT, abi.RWPROTECT.pack(target.address, PAGE, abi.RwprotectMode.RWP))
        if _scan(target, abi.PageCategory.ACCESSED):
            raise TrialError("a protected page reads as accessed")
        target.expect()
        if not _scan(target, abi.PageCategory.ACCESSED):
            raise TrialError("a read was not recorded")
    return "a read was recorded without a handler, and found by PAGEMAP_SCAN"


def _access_trap(new: NewFd) -> str:
    with new(abi.Feature.RWP) as fd, _filled() as target:
        target.register(fd, abi.RegisterMode.RWP)
        ioctl(fd, abi.Request.RWPROTECT, abi.RWPROTECT.pack(target.address, PAGE, abi.RwprotectMode.RWP))
        if not target.is_trapped(target.read):
            raise TrialError("a read of a protected page was not trapped")
        ioctl(fd, abi.Request.RWPROTECT, abi.RWPROTECT.pack(target.address, PAGE, abi.RwprotectMode(0)))
        target.expect()
    return "a read of a protected page was trapped, then let through"


def _negotiated(*features: abi.Feature) -> Callable[[NewFd], str]:
    """For features whose use could block this process (events wait for a reader): only ask for them."""

    def trial(new: NewFd) -> str:
        for feature in features:
            with new(feature):
                pass
        return "granted by UFFDIO_API"

    return trial


def _batched_advice(_: NewFd) -> str:
    with _filled() as first, _filled() as second:
        madvise_self([(first.address, PAGE), (second.address, PAGE)], _MADV_DONTNEED)
        for pages in (first, second):
            pages.expect(bytes(len(_PATTERN)))
    return "two areas were dropped in one call"


def trials() -> dict[str, Callable[[NewFd], str]]:
    """Return the experiments by the name of their finding.

    Each returns what it saw, or raises TrialError or OSError.
    """
    return {
        "missing pages": _missing,
        "zero pages": _zeropage,
        "poison": _poison,
        "move": _move,
        "write protection": _write_protect,
        "write protection of empty pages": _write_protect_empty,
        "write tracking": _write_tracking,
        "access tracking": _access_tracking,
        "access traps": _access_trap,
        "shared memory, missing": _missing_shared,
        "shared memory, minor": _minor_shared,
        "sigbus delivery": _sigbus,
        "exact addresses": _negotiated(abi.Feature.EXACT_ADDRESS),
        "thread ids": _negotiated(abi.Feature.THREAD_ID),
        "events": _negotiated(abi.Feature.EVENT_REMAP, abi.Feature.EVENT_REMOVE, abi.Feature.EVENT_UNMAP),
        "fork events": _negotiated(abi.Feature.EVENT_FORK),
        "batched eviction": _batched_advice,
    }
