"""One page of each type of memory for the probe's trials, touched by system calls only.

Python never reads or writes trapped memory itself: it would wait in the kernel with the GIL held. `Area.read` and
`Area.write` let the kernel do it (`write` from and `readv` into the page, through a pipe); see `trials` for why
these return at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from userfault.kernel._kinds import MemoryKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["HUGE", "PATTERN", "Area", "TrialError", "UntriedError", "area", "filled", "regular_file"]

HUGE: Final = (MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB)  # pages from the pool of huge pages
PATTERN: Final = b"userfault probe."
_MFD_HUGETLB: Final = 4
_MFD_NOEXEC_SEAL: Final = (
    8  # Linux 6.3; without it a kernel may refuse (vm.memfd_noexec=2) or complain in its log
)
_MFD_HUGE_SHIFT: Final = 26
_LARGEST_TRIAL: Final = 64 << 20  # a trial copies a whole page: not one of 1 GiB
_HUGE_PAGES: Final = "/sys/kernel/mm/hugepages"
_abandoned: list[Area] = []


class TrialError(Exception):
    """The feature did not do what it is for; the message says what happened instead."""


class UntriedError(Exception):
    """It could not be tried: what for, and what would have to be done first."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


class Area:
    """One page, mapped; and mapped a second time, shared, where it is part of a memfd."""

    def __init__(self, memory: mmap.mmap, alias: Area | None = None) -> None:
        self.memory: Final = memory
        self.alias: Final = alias
        self.size: Final = len(memory)
        self.abandoned = False  # a thread may still touch it: never unmap it
        anchor = ctypes.c_char.from_buffer(memory)  # takes the address, touches nothing
        self.address: Final = ctypes.addressof(anchor)

    def read(self) -> bytes:
        """Let the kernel read the first bytes. EFAULT means that the page is trapped."""
        receiver, sender = os.pipe()
        try:
            with memoryview(self.memory) as view, view[: len(PATTERN)] as piece:
                os.write(sender, piece)
            return os.read(receiver, len(PATTERN))
        finally:
            os.close(receiver)
            os.close(sender)

    def write(self, data: bytes = PATTERN) -> None:
        """Let the kernel write the first bytes."""
        receiver, sender = os.pipe()
        try:
            os.write(sender, data)
            with memoryview(self.memory) as view, view[: len(data)] as piece:
                os.readv(receiver, [piece])
        finally:
            os.close(receiver)
            os.close(sender)

    def expect(self, data: bytes = PATTERN) -> None:
        """Check the first bytes."""
        if self.read() != data:
            raise TrialError("the page holds other bytes than it should")

    @staticmethod
    def is_trapped(touch: Callable[[], object]) -> bool:
        """Tell whether touching gives EFAULT."""
        try:
            touch()
        except OSError as error:
            if error.errno == errno.EFAULT:
                return True
            raise
        return False


def _free_huge_page_size(root: str = _HUGE_PAGES) -> int:
    """Return the smallest huge page size of which two pages are free and not promised to others.

    Raises:
        UntriedError: There are none.
    """
    known = []
    for folder in Path(root).glob("hugepages-*kB"):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        try:
            free, promised = (int((folder / f"{kind}_hugepages").read_text()) for kind in ("free", "resv"))
        except (OSError, ValueError):
            continue
        known.append((size, free - promised))
    if not known:
        raise UntriedError("this kernel has no pool of huge pages", "a kernel built with CONFIG_HUGETLBFS=y")
    free_sizes = [size for size, free in known if free >= 2 and size <= _LARGEST_TRIAL]
    if not free_sizes:
        raise UntriedError(
            "no two huge pages are free", "sudo sysctl -w vm.nr_hugepages=16   (takes memory from other uses)"
        )
    return min(free_sizes)


def _memfd(page_size: int | None) -> int:
    flags = os.MFD_CLOEXEC
    if page_size is not None:
        flags |= _MFD_HUGETLB | (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
    try:
        return os.memfd_create("userfault-probe", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("userfault-probe", flags)


def regular_file() -> str:
    """Return the path of some file that is there and can be read."""
    for path in (__file__, sys.executable, "/proc/self/exe"):
        if path and os.access(path, os.R_OK) and os.path.getsize(path) >= mmap.PAGESIZE:
            return path
    raise UntriedError("no file was found to try it on", "a readable file: this module's or Python's own")


@contextmanager
def _shared(memory: MemoryKind) -> Iterator[Area]:
    private = memory in (MemoryKind.PRIVATE_SHMEM, MemoryKind.PRIVATE_HUGETLB)
    with ExitStack() as stack:
        page_size = _free_huge_page_size() if memory in HUGE else None
        fd = _memfd(page_size)
        stack.callback(os.close, fd)
        size = page_size or mmap.PAGESIZE
        os.ftruncate(fd, size)
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        try:
            alias = stack.enter_context(mmap.mmap(fd, size))
            target = stack.enter_context(mmap.mmap(fd, size, flags=flags))
        except OSError as error:
            if memory in HUGE and error.errno == errno.ENOMEM:
                raise UntriedError(
                    "the huge pages that were free were taken", "run it again, or raise vm.nr_hugepages"
                ) from None
            raise
        yield Area(target, Area(alias))


@contextmanager
def _anonymous(size: int) -> Iterator[Area]:
    pages = Area(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    # The kernel merges neighbouring mappings, and a huge page there could cover ours before it is touched.
    with suppress(OSError):
        pages.memory.madvise(mmap.MADV_NOHUGEPAGE)
    try:
        yield pages
    finally:
        if pages.abandoned:
            _abandoned.append(pages)
        else:
            pages.memory.close()


@contextmanager
def area(memory: MemoryKind, size: int = mmap.PAGESIZE) -> Iterator[Area]:
    """Map one untouched page; `size` bytes if it is anonymous.

    Raises:
        UntriedError: There is no such memory at the moment.
    """
    if memory is MemoryKind.ANONYMOUS:
        with _anonymous(size) as pages:
            yield pages
    elif memory is MemoryKind.FILE:
        # Private and writable: nothing that is written goes to the file, which need not be ours to write.
        with (
            open(regular_file(), "rb") as file,
            mmap.mmap(file.fileno(), mmap.PAGESIZE, flags=mmap.MAP_PRIVATE) as pages,
        ):
            yield Area(pages)
    else:
        with _shared(memory) as both:
            yield both


@contextmanager
def filled(memory: MemoryKind = MemoryKind.ANONYMOUS, size: int = mmap.PAGESIZE) -> Iterator[Area]:
    """Map one page that begins with `PATTERN`."""
    with area(memory, size) as pages:
        pages.write()
        yield pages
