"""What the tests of read-write protection (RWP, Linux 7.3) share."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from support.kernel import HUGE_KINDS, PAGE, Area, Touch, huge_pages, libc, make_area, next_event
from support.waiting import wait_until
from userfault.kernel import Feature, OpenWay, PageFault, RegisterMode, Userfaultfd, pagemap
from userfault.kernel.abi import FaultFlag, PageCategory, PagemapBit
from userfault.kernel.mapping import Advice, MemoryKind

SYNC = Feature.RWP
ASYNC = Feature.RWP | Feature.RWP_ASYNC
# Where the way through the kernel matters and the rest does not: of small pages, of a file's, of huge ones. The
# scenarios go through all kinds.
DIFFERENT_KINDS = (MemoryKind.ANONYMOUS, MemoryKind.SHMEM, MemoryKind.HUGETLB)


@contextlib.contextmanager
def armed(
    kind: MemoryKind,
    features: Feature = SYNC,
    *,
    pages: int = 2,
    mode: RegisterMode = RegisterMode.RWP,
    way: OpenWay = OpenWay.ANY,
) -> Iterator[tuple[Area, Userfaultfd]]:
    """Make an area whose pages are all there, registered and protected."""
    with make_area(kind, pages) as area:
        area.populate()
        with Userfaultfd(features, way=way) as uffd:
            uffd.register(area.memory, mode=mode)
            uffd.rwprotect(area.memory)
            yield area, uffd


def _entry(address: int) -> int:
    return int(pagemap.entries(address, PAGE)[0])


def entry(address: int) -> PagemapBit:
    """What the pagemap says of a page, but for whose it is and whether it is dirty."""
    told = PagemapBit.PRESENT | PagemapBit.SWAPPED | PagemapBit.UFFD_PROTECTED | PagemapBit.GUARD
    return PagemapBit(_entry(address) & told)


def frame(address: int) -> int:
    """The number of the page's frame, 0 for those who may not know it."""
    return _entry(address) & ((1 << 55) - 1)


def _of_pages(area: Area, flags: npt.NDArray[np.bool_]) -> list[bool]:
    """One flag for each page of the area, which may be huge."""
    parts = flags.reshape(area.pages, -1)
    assert (parts == parts[:, :1]).all(), "the kernel does not say the same of all parts of a huge page"
    found: list[bool] = parts[:, 0].tolist()
    return found


def protected_pages(area: Area) -> list[bool]:
    """For each page, whether the pagemap marks it as protected."""
    return _of_pages(area, pagemap.protected(area.memory))


def present_pages(area: Area) -> list[bool]:
    """For each page, whether it is there."""
    return _of_pages(area, pagemap.present(area.memory))


def accessed(area: Area) -> list[bool]:
    """For each page, whether it was accessed since it was protected."""
    return _of_pages(area, pagemap.scan(area.memory, mask=PageCategory.ACCESSED).mask())


def read_waits(area: Area, uffd: Userfaultfd, index: int) -> bool:
    """Read a page in another thread; if that waits for the handler, let it pass and return True."""
    with Touch(area, index) as touch:
        wait_until(lambda: touch.done or uffd.poll(0), "the read is through or reported")
        if waits := not touch.done:
            assert next_event(uffd) == PageFault(area.page(index), FaultFlag.RWP, 0)
            uffd.rwprotect(area.page(index), area.page_size, protect=False)
    return waits


@contextlib.contextmanager
def pool_kept(kind: MemoryKind) -> Iterator[None]:
    """Give back huge pages that a killed child reserved; skip where it could not reserve any."""
    with huge_pages(1) if kind in HUGE_KINDS else contextlib.nullcontext():
        yield


def needs_swap() -> None:
    """Skip where nothing can be swapped out."""
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("needs swap")


def swap_out(area: Area) -> None:
    """Have every page of anonymous memory written to the swap device."""

    def gone() -> bool:
        area.memory.madvise(Advice.PAGEOUT)
        return all(PagemapBit.SWAPPED in entry(area.page(index)) for index in range(area.pages))

    wait_until(gone, "the pages are swapped out")


# --- the kernel's own accesses to memory, each as (address) -> bytes read; OSError where they fail -----------


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def by_read(address: int) -> bytes:
    """read(2) into the page: the kernel writes to it."""
    with _pipe() as (reading, writing):
        os.write(writing, b"what read(2) put there, 32 bytes")
        done = libc.read(reading, ctypes.c_void_p(address), ctypes.c_size_t(32))
        assert _checked(done, "read") == 32
        return b"what read(2) put there, 32 bytes"


def by_write(address: int) -> bytes:
    """write(2) of the page: the kernel reads it."""
    with _pipe() as (reading, writing):
        done = libc.write(writing, ctypes.c_void_p(address), ctypes.c_size_t(32))
        assert _checked(done, "write") == 32
        return os.read(reading, 32)


def by_vmsplice(address: int) -> bytes:
    """vmsplice(2): the kernel takes hold of the page (GUP) and reads it later."""
    with _pipe() as (reading, writing):
        source = _Vector(address, 32)
        done = libc.vmsplice(writing, ctypes.byref(source), ctypes.c_size_t(1), 0)
        assert _checked(done, "vmsplice") == 32
        return os.read(reading, 32)


def by_process_vm_readv(address: int, pid: int | None = None) -> bytes:
    """process_vm_readv(2), as debuggers and other processes read."""
    copy = ctypes.create_string_buffer(32)
    target, source = _Vector(ctypes.addressof(copy), 32), _Vector(address, 32)
    one = ctypes.c_ulong(1)
    done = libc.process_vm_readv(
        pid or os.getpid(), ctypes.byref(target), one, ctypes.byref(source), one, ctypes.c_ulong(0)
    )
    assert _checked(done, "process_vm_readv") == 32
    return copy.raw


def by_populate_read(address: int) -> bytes:
    """MADV_POPULATE_READ, which reads without telling what."""
    _checked(
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), int(Advice.POPULATE_READ)), "madvise"
    )
    return b""


def by_mlock(address: int) -> bytes:
    """mlock(2), which has every page there first."""
    _checked(libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(PAGE)), "mlock")
    _checked(libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(PAGE)), "munlock")
    return b""


KERNEL_ACCESSES: dict[str, Callable[[int], bytes]] = {
    "read": by_read,
    "write": by_write,
    "vmsplice": by_vmsplice,
    "process_vm_readv": by_process_vm_readv,
    "MADV_POPULATE_READ": by_populate_read,
    "mlock": by_mlock,
}


def read_mem_file(address: int) -> bytes:
    """Read through /proc/self/mem, which cannot wait for a fault to be served."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), 32, address)


def write_mem_file(address: int, data: bytes) -> int:
    """Write through /proc/self/mem."""
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        return os.pwrite(memory.fileno(), data, address)
