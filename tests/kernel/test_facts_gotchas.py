"""What surprises handlers (docs/kernel-api.md, 5).

Point 1 (the GIL) is in test_gil.py, and of forks in test_facts_events.py; 4 (duplicates; "exists" must be followed by
a wake) in test_facts_object_model.py and test_facts_register.py; 7 to 14 in test_facts_page_states.py; 16 (splits) in
test_facts_copy.py; 20 (releases) in all files, by `documented`.

Unchecked: 2 (what a handler must not touch: a matter of its own design), 5 for KVM (needs nested virtualisation), 6 for
core dumps (they go where the machine's settings say), 19 (page sizes: these tests use the machine's), 21 (times), 22
(that no time-out exists).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
from collections.abc import Callable, Iterator

import pytest

from support.kernel import (
    PAGE,
    Area,
    Link,
    Touch,
    in_child,
    make_area,
    next_event,
    protected,
    subject,
)
from support.kernel_facts import (
    Job,
    entry,
    kernel_call,
    kernel_reads,
    kernel_writes,
    registered,
)
from support.ring import ASYNC, READ, Ring, needs_io_uring
from support.rwp import read_mem_file, write_mem_file
from userfault.kernel import (
    FaultKind,
    OpenWay,
    PageFault,
    RegisterMode,
    Userfaultfd,
    pagemap,
    serving,
)
from userfault.kernel.abi import PagemapBit
from userfault.kernel.mapping import Advice, Mapping, MemoryKind

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR


def point(number: int) -> pytest.MarkDecorator:
    return pytest.mark.fact(f"5.{number}")


@contextlib.contextmanager
def harmless_signal() -> Iterator[int]:
    """A signal that has a handler, which does nothing."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        yield signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)


# --- 3: signals -----------------------------------------------------------------------------------------------


@point(3)
def test_a_signal_makes_a_second_message_of_one_access() -> None:
    with harmless_signal() as number, registered() as (area, uffd), Job(area.head, 0) as job:
        first = next_event(uffd)
        signal.pthread_kill(job.ident, number)
        assert next_event(uffd) == first
        assert uffd.fdinfo().total == 1
        uffd.zeropage(area.start, PAGE)


@point(3)
@pytest.mark.needs_kernel_faults
def test_a_signal_makes_a_system_call_ask_again_and_again() -> None:
    with harmless_signal() as number, registered() as (area, uffd), Job(kernel_reads, area.start) as job:
        first = next_event(uffd)
        signal.pthread_kill(job.ident, number)
        for _ in range(5):
            assert next_event(uffd) == first
        assert not job.done
        # The message may be there and gone: what was polled is not always to be read.
        serving.zero_all(uffd, area.start, PAGE)
        assert job.result() == 0


@point(3)
@pytest.mark.needs_kernel_faults
@pytest.mark.parametrize("call", ["MADV_POPULATE", "process_vm_readv"])
def test_a_signal_does_not_disturb_who_takes_hold_of_pages(call: str) -> None:
    with harmless_signal() as number, registered() as (area, uffd):
        job = Job(KERNEL_ACCESSES[call], area.start)
        first = next_event(uffd)
        signal.pthread_kill(job.ident, number)
        job.blocks()
        assert uffd.read_events() == []
        assert uffd.fdinfo().total == 1
        assert isinstance(first, PageFault)
        uffd.zeropage(area.start, PAGE)
        assert job.result() == 0


# --- 5 and 6: who cannot wait ---------------------------------------------------------------------------------


def _vector(address: int, length: int) -> ctypes.Array[ctypes.c_ulong]:
    return (ctypes.c_ulong * 2)(address, length)


def _with_pipe(name: str, address: int) -> int:
    reading, writing = os.pipe()
    try:
        return kernel_call(name, writing, _vector(address, 1), 1, 0)
    finally:
        os.close(reading)
        os.close(writing)


def _process_vm_readv(address: int) -> int:
    target = ctypes.create_string_buffer(1)
    here, there = _vector(ctypes.addressof(target), 1), _vector(address, 1)
    return kernel_call("process_vm_readv", os.getpid(), here, 1, there, 1, 0)


def _stat(address: int) -> int:
    return kernel_call("stat", b"/", address)


def _open(address: int) -> int:
    return kernel_call("open", address, 0)


def _futex(address: int, private: int = 0) -> int:
    number = {"x86_64": 202}.get(platform.machine(), 98)
    return kernel_call("syscall", number, address, private, 1, None)  # FUTEX_WAIT, if there is a 1


def _private_futex(address: int) -> int:
    return _futex(address, 128)


def _populate(address: int) -> int:
    return kernel_call("madvise", address, PAGE, int(Advice.POPULATE_READ))


def _mlock(address: int) -> int:
    return kernel_call("mlock", address, PAGE)


KERNEL_ACCESSES: dict[str, Callable[[int], int]] = {
    "read": kernel_writes,
    "write": kernel_reads,
    "open": _open,
    "stat": _stat,
    "futex": _futex,
    "private futex": _private_futex,
    "vmsplice": lambda address: _with_pipe("vmsplice", address),
    "MADV_POPULATE": _populate,
    "process_vm_readv": _process_vm_readv,
    "mlock": _mlock,
}


@point(5)
def test_user_mode_only_fails_all_system_calls_at_once() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(way=OpenWay.USER_MODE_ONLY) as uffd:
        uffd.register(area.memory)
        answers = {name: call(area.start) for name, call in KERNEL_ACCESSES.items()}
        expected = dict.fromkeys(KERNEL_ACCESSES, errno.EFAULT) | {"mlock": errno.ENOMEM}
        assert answers == expected
        assert uffd.read_events() == []
        assert uffd.fdinfo().total == 0
        assert PagemapBit.PRESENT not in entry(area.start)


@point(5)
@pytest.mark.needs_kernel_faults
@pytest.mark.parametrize("name", KERNEL_ACCESSES)
def test_otherwise_they_wait_as_others_do(name: str) -> None:
    # A futex that processes share is found by its page, which is taken as if to write.
    writes = name in ("read", "stat", "mlock", "futex")
    with registered() as (area, uffd), Job(KERNEL_ACCESSES[name], area.start) as job:
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert (event.address, event.write) == (area.start, writes)
        uffd.copy(area.start, bytes(PAGE))
        # What is there now is no path, and not the number to wait for.
        other = {"open": errno.ENOENT, "futex": errno.EAGAIN, "private futex": errno.EAGAIN}
        assert job.result() == other.get(name, 0)
        assert uffd.read_events() == []
        if name == "mlock":
            area.memory.munlock()


@point(5)
def test_user_mode_only_fails_io_uring() -> None:
    needs_io_uring()

    def run() -> list[int]:
        with make_area(ANONYMOUS) as area, Userfaultfd(way=OpenWay.USER_MODE_ONLY) as uffd, Ring() as ring:
            uffd.register(area.memory)
            with Mapping.memfd(PAGE) as file:
                assert file.fd is not None
                found = [ring.submit(READ, file.fd, area.start, 1, flags=flags) for flags in (0, ASYNC)]
            try:
                ring.register(area.start, PAGE)
            except OSError as refusal:
                found.append(-(refusal.errno or 0))
            return found

    assert in_child(run) == [-errno.EFAULT] * 3


@point(6)
def test_the_file_of_the_memory_fails_without_a_message() -> None:
    with registered() as (area, uffd):
        uffd.copy(area.page(1), area.pattern(1))
        uffd.register(area.memory, mode=MISSING | WP)
        uffd.writeprotect(area.page(1), PAGE)
        for call in (lambda: read_mem_file(area.start), lambda: write_mem_file(area.start, b"x")):
            with pytest.raises(OSError, match="Input/output error"):
                call()
        assert read_mem_file(area.page(1)) == area.pattern(1)[:32]
        with pytest.raises(OSError, match="Input/output error"):
            write_mem_file(area.page(1), b"x")
        assert uffd.read_events() == []


@point(6)
def test_debuggers_fail_without_a_message() -> None:
    seize, detach, peek, interrupt = 0x4206, 17, 2, 0x4207

    def run(link: Link) -> None:
        with registered() as (area, uffd):
            link.send(area.start, (uffd.fd,))
            link.receive()

    with subject(run) as child:
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            if kernel_call("ptrace", seize, child.pid, None, None):
                pytest.skip("needs ptrace")
            assert kernel_call("ptrace", interrupt, child.pid, None, None) == 0
            os.waitpid(child.pid, 0)
            word = ctypes.c_long(0)
            assert kernel_call("ptrace", peek, child.pid, start, ctypes.byref(word)) == errno.EIO
            assert uffd.read_events() == []
            other = os.open(f"/proc/{child.pid}/mem", os.O_RDONLY)
            try:
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(other, 1, start)
            finally:
                os.close(other)
            assert kernel_call("ptrace", detach, child.pid, None, None) == 0
            assert uffd.read_events() == []
            child.send("end")
            child.receive()


# --- 15, 17, 18 -----------------------------------------------------------------------------------------------


@point(15)
def test_only_the_registered_mapping_of_a_file_is_trapped() -> None:
    with registered(SHMEM, mode=MISSING | MINOR) as (area, uffd):
        assert area.memory.fd is not None
        with area.memory.alias() as second:
            second.write(0, b"through another mapping")
            assert second.read(PAGE, 32) == bytes(32)
        assert os.pread(area.memory.fd, 7, 0) == b"through"
        os.pwrite(area.memory.fd, b"through the file", 2 * PAGE)
        assert uffd.read_events() == []
        with Touch(area, 2) as touch:
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.kind is FaultKind.MINOR
            uffd.continue_(area.page(2), PAGE)
            assert touch.result()[:16] == b"through the file"


@point(17)
def test_protecting_an_empty_anonymous_page_is_ignored_and_its_write_unnoticed() -> None:
    with registered(mode=WP) as (area, uffd):
        uffd.writeprotect(area.memory)
        area.memory.write(0, b"nobody is told")
        assert uffd.read_events() == []
        assert not protected(area.start)


@point(18)
@pytest.mark.parametrize("mode", [MISSING, WP, MINOR], ids=["MISSING", "WP", "MINOR"])
def test_pages_around_a_fault_are_mapped_too_unless_each_is_to_be_seen(mode: RegisterMode) -> None:
    with Mapping.memfd(16 * PAGE, align=16 * PAGE) as memory, Userfaultfd() as uffd:
        area = Area(SHMEM, memory, 16)
        assert memory.fd is not None
        os.pwrite(memory.fd, bytes(16 * PAGE), 0)
        uffd.register(memory, mode=mode)
        with Touch(area, 5):
            if mode == MINOR:
                next_event(uffd)
                uffd.continue_(area.page(5), PAGE)
        present = int(pagemap.present(memory).sum())
        assert (present == 1) is (mode != MISSING)
        assert uffd.read_events() == []
