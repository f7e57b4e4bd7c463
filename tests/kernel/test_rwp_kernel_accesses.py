"""Accesses by the kernel itself to read-write-protected pages: system calls, get_user_pages, /proc/PID/mem, ptrace."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable

import pytest

from support.kernel import PAGE, Link, Touch, libc, next_event, subject, waiters
from support.kernel_facts import Job, tell_signals
from support.rwp import (
    ASYNC,
    DIFFERENT_KINDS,
    KERNEL_ACCESSES,
    SYNC,
    accessed,
    armed,
    by_process_vm_readv,
    pool_kept,
    protected_pages,
    read_mem_file,
    write_mem_file,
)
from userfault.kernel import Feature, OpenWay, PageFault, Userfaultfd
from userfault.kernel.abi import FaultFlag
from userfault.kernel.mapping import Advice, MemoryKind

pytestmark = [pytest.mark.fact("2.12"), pytest.mark.needs_feature("RWP", "RWP_ASYNC")]
kinds = pytest.mark.parametrize("kind", DIFFERENT_KINDS)
_BUS_ADRERR = 2


def _error_of(access: Callable[[int], bytes], address: int) -> int | None:
    try:
        access(address)
    except OSError as failure:
        return failure.errno
    return None


def _writes(name: str, *, shared: bool) -> bool:
    """Whether an access counts as a write: mlock has private pages ready to be written."""
    return name == "read" or (name == "mlock" and not shared)


@pytest.mark.needs_kernel_faults
@kinds
def test_sync_the_kernel_waits(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd):
        for name, access in KERNEL_ACCESSES.items():
            before = area.pattern(1)[:32]
            with Job(access, area.page(1)) as call:
                write = _writes(name, shared=area.shared)
                flags = FaultFlag.RWP | FaultFlag.WRITE if write else FaultFlag.RWP
                assert (name, next_event(uffd)) == (name, PageFault(area.page(1), flags, 0))
                assert not call.done
                uffd.rwprotect(area.memory, protect=False)
            if name == "read":
                assert area.head(1) == call.result()
                area.memory.write(area.page_size, before)
            else:
                assert call.result() in (before, b"")
            assert uffd.read_events() == []
            uffd.rwprotect(area.memory)


@pytest.mark.needs_kernel_faults
@kinds
def test_async_the_kernel_counts(kind: MemoryKind) -> None:
    with armed(kind, ASYNC) as (area, uffd):
        for name, access in KERNEL_ACCESSES.items():
            read = access(area.page(1))
            assert (name, accessed(area)) == (name, [False, True])
            assert (name, protected_pages(area)) == (name, [True, False])
            assert read in (area.head(1), b"")
            uffd.rwprotect(area.memory)
        assert uffd.read_events() == []


@kinds
def test_cold_is_no_access(kind: MemoryKind) -> None:
    with armed(kind, ASYNC) as (area, _):
        if kind in (MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB):
            with pytest.raises(ValueError, match="EINVAL"):
                area.memory.madvise(Advice.COLD)
        else:
            area.memory.madvise(Advice.COLD)
        assert protected_pages(area) == [True, True]
        assert accessed(area) == [False, False]


@kinds
def test_user_mode_only_the_kernel_fails(kind: MemoryKind) -> None:
    with armed(kind, way=OpenWay.USER_MODE_ONLY) as (area, uffd):
        for name, access in KERNEL_ACCESSES.items():
            expected = errno.ENOMEM if name == "mlock" else errno.EFAULT
            assert (name, _error_of(access, area.page(1))) == (name, expected)
        assert uffd.read_events() == []
        assert protected_pages(area) == [True, True]
        with Touch(area, 1) as touch:  # and the program's own accesses are trapped
            waiters(uffd, 1)
            uffd.rwprotect(area.memory, protect=False)
            assert touch.result() == area.pattern(1)[:32]


def _sigbus(link: Link, kind: MemoryKind) -> None:
    with armed(kind, SYNC | Feature.SIGBUS) as (area, uffd):
        link.send(None, (uffd.fd,))
        link.send({name: _error_of(access, area.page(1)) for name, access in KERNEL_ACCESSES.items()})
        kept = tell_signals(link)
        area.head(1)
        del kept


@kinds
def test_with_the_feature_sigbus_accesses_fail(kind: MemoryKind) -> None:
    with pool_kept(kind), subject(_sigbus, kind) as child, child.receive_uffd() as uffd:
        assert child.receive() == {
            name: errno.ENOMEM if name == "mlock" else errno.EFAULT for name in KERNEL_ACCESSES
        }
        told = child.receive()
        assert (told.number, told.code) == (signal.SIGBUS, _BUS_ADRERR)
        assert uffd.read_events() == []


@kinds
def test_proc_mem_cannot_wait(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd):
        content = area.pattern(1)[:32]
        assert _error_of(read_mem_file, area.page(1)) == errno.EIO
        with pytest.raises(OSError, match="Input/output error"):
            write_mem_file(area.page(1), b"x")
        assert uffd.read_events() == []
        assert protected_pages(area) == [True, True]
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert read_mem_file(area.page(1)) == content
        assert accessed(area) == [False, True]
        assert write_mem_file(area.start, b"x") == 1
        assert accessed(area) == [True, True]
        assert uffd.read_events() == []
        assert area.head(0, 2) == b"x" + area.pattern(0)[1:2]


_PTRACE_TRACEME, _PTRACE_PEEKDATA = 0, 2


def _be_traced(link: Link) -> None:
    with armed(MemoryKind.ANONYMOUS) as (area, uffd):
        link.send(area.start, (uffd.fd,))
        libc.ptrace(_PTRACE_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_debugger_cannot_wait() -> None:
    def peek(pid: int, address: int) -> tuple[int, int]:
        ctypes.set_errno(0)
        word = libc.ptrace(_PTRACE_PEEKDATA, pid, ctypes.c_void_p(address), None)
        return word, ctypes.get_errno()

    with subject(_be_traced) as child:
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            pid, status = os.waitpid(child.pid, os.WUNTRACED)
            assert pid == child.pid
            assert os.WIFSTOPPED(status)
            assert peek(pid, start) == (-1, errno.EIO)
            assert uffd.read_events() == []
            uffd.set_mode(enable=Feature.RWP_ASYNC)
            word, error = peek(pid, start)
            assert (word.to_bytes(4, "little"), error) == (b"page", 0)


def _be_read(link: Link) -> None:
    with armed(MemoryKind.ANONYMOUS) as (area, uffd):
        link.send(area.page(1), (uffd.fd,))
        link.receive()


@pytest.mark.needs_kernel_faults
def test_another_process_that_reads_waits() -> None:
    with subject(_be_read) as child:
        address, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd, Job(by_process_vm_readv, address, child.pid) as call:
            assert next_event(uffd) == PageFault(address, FaultFlag.RWP, 0)
            uffd.rwprotect(address, PAGE, protect=False)
            assert call.result() == b"page      1 of this area. ".ljust(32, b".")
        child.send("end")
        assert child.wait() == 0
