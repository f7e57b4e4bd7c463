"""What messages say: flags, addresses and threads of page faults, and the ranges of the other events.

Beside the kernel's own unit scenarios, which look at some of it only.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.kernel import KINDS, PAGE, Area, Touch, in_child, libc, make_area, next_event, subject, waiters
from support.kernel_facts import Job
from support.kernel_scenarios import Handler, for_kinds
from userfault.kernel import (
    FaultKind,
    Feature,
    Fork,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
)
from userfault.kernel.abi import FaultFlag
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import Mapping, MemoryKind

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
NONE, WRITE = FaultFlag(0), FaultFlag.WRITE

# What a thread does to a page, by its number: None is a read.
_ACCESSES = (None, b"written")


def _fault_of(uffd: Userfaultfd, address: int, flags: FaultFlag, kind: FaultKind) -> PageFault:
    """The next message, which is to be of this fault."""
    fault = next_event(uffd)
    assert fault == PageFault(address, flags, 0)
    assert isinstance(fault, PageFault)
    assert fault.kind is kind
    assert fault.write is bool(flags & WRITE)
    return fault


# --- page faults ----------------------------------------------------------------------------------------------


@for_kinds(*KINDS)
def test_missing(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd() as uffd:
        uffd.register(area.memory, mode=MISSING)
        for page, data in enumerate(_ACCESSES):
            # In the middle of the page: the message tells the page.
            with Touch(area, page, data=data, offset=100) as touch:
                _fault_of(uffd, area.page(page), NONE if data is None else WRITE, FaultKind.MISSING)
                uffd.copy(area.page(page), area.pattern(page))
            assert touch.result() == (area.pattern(page)[100:132] if data is None else data)
        assert uffd.read_events() == []


@pytest.mark.needs_feature("PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM")
@for_kinds(*KINDS)
def test_write_protected(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        with Touch(area, 1) as touch:
            assert touch.result() == area.pattern(1)[:32]
        assert uffd.read_events() == []
        with Touch(area, 1, data=b"written", offset=100):
            _fault_of(uffd, area.page(1), WRITE | FaultFlag.WP, FaultKind.WRITE_PROTECT)
            uffd.writeprotect(area.page(1), area.page_size, protect=False)
        assert area.head(1, 107)[100:] == b"written"
        assert uffd.read_events() == []


@pytest.mark.needs_feature("MINOR_SHMEM", "MINOR_HUGETLBFS")
@for_kinds(MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM, MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB)
def test_minor(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd() as uffd:
        assert area.memory.fd is not None
        # The pages are in the file, and not mapped here.
        with Mapping.of_file(area.memory.fd, area.length) as other:
            for page in range(area.pages):
                other.write(page * area.page_size, area.pattern(page))
        uffd.register(area.memory, mode=MINOR)
        for page, data in enumerate(_ACCESSES):
            with Touch(area, page, data=data, offset=100) as touch:
                flags = FaultFlag.MINOR if data is None else FaultFlag.MINOR | WRITE
                _fault_of(uffd, area.page(page), flags, FaultKind.MINOR)
                uffd.continue_(area.page(page), area.page_size)
            assert touch.result() == (area.pattern(page)[100:132] if data is None else data)
        assert uffd.read_events() == []


@pytest.mark.needs_feature("PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM")
@for_kinds(*KINDS)
def test_missing_comes_before_write_protected(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory, mode=MISSING | WP)
        uffd.writeprotect(area.memory)
        with Touch(area, 0, data=b"written"):
            _fault_of(uffd, area.start, WRITE, FaultKind.MISSING)
            uffd.copy(area.memory, area.pattern(0), write_protect=True)
            _fault_of(uffd, area.start, WRITE | FaultFlag.WP, FaultKind.WRITE_PROTECT)
            uffd.writeprotect(area.memory, protect=False)
        assert uffd.read_events() == []


def _mlock(area: Area) -> None:
    area.memory.mlock()


def _futex(area: Area) -> None:
    # FUTEX_WAKE of a futex that processes share: the kernel looks for the page, and wakes nobody.
    futex_wake = 1
    number = {"x86_64": 202, "aarch64": 98, "riscv64": 98}[platform.machine()]
    assert libc.syscall(number, ctypes.c_void_p(area.start), futex_wake, 1, None, None, 0) == 0


@pytest.mark.needs_kernel_faults
@pytest.mark.parametrize("access", [_mlock, _futex], ids=["mlock", "futex"])
def test_mlock_and_futexes_write(access: Callable[[Area], None]) -> None:
    with make_area(MemoryKind.ANONYMOUS, 1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        with Job(access, area):
            _fault_of(uffd, area.start, WRITE, FaultKind.MISSING)
            uffd.zeropage(area.memory)
        assert uffd.read_events() == []


@pytest.mark.needs_feature("THREAD_ID")
def test_threads_are_told_on_request() -> None:
    with make_area(MemoryKind.ANONYMOUS, 1) as area, Userfaultfd(Feature.THREAD_ID) as uffd:
        uffd.register(area.memory)
        with Job(area.head, 0) as job:
            fault = next_event(uffd)
            assert fault == PageFault(area.start, NONE, job.thread_id)
            assert job.thread_id != threading.get_native_id()
            uffd.zeropage(area.memory)


@pytest.mark.needs_feature("EXACT_ADDRESS")
@for_kinds(*KINDS)
def test_addresses_are_exact_on_request(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(Feature.EXACT_ADDRESS) as uffd:
        uffd.register(area.memory)
        place = area.page_size - 7 - 1000
        # One byte: where a longer copy begins is its own affair.
        with Touch(area, 1, data=b"x", offset=place):
            _fault_of(uffd, area.page(1) + place, WRITE, FaultKind.MISSING)
            uffd.copy(area.page(1), area.pattern(1))


# --- other events ---------------------------------------------------------------------------------------------


def _remove(area: Area, _: Area) -> AnyEvent:
    expected = Remove(area.page(1), area.page(3))
    area.drop(1, 2)
    return expected


def _unmap(area: Area, _: Area) -> AnyEvent:
    expected = Unmap(area.page(1), area.page(3))
    area.memory.unmap(area.page_size, 2 * area.page_size)
    return expected


def _remap(area: Area, target: Area) -> AnyEvent:
    expected = Remap(area.start, target.start, area.length)
    area.memory.remap(to=target.memory)
    return expected


_OPERATIONS: list[tuple[Feature, Callable[[Area, Area], AnyEvent]]] = [
    (Feature.EVENT_REMOVE, _remove),
    (Feature.EVENT_UNMAP, _unmap),
    (Feature.EVENT_REMAP, _remap),
]


@for_kinds(*KINDS)
def test_events_are_told_on_request(kind: MemoryKind) -> None:
    for feature, operation in _OPERATIONS:
        with make_area(kind, 4) as area, make_area(kind, 4) as target, Userfaultfd(feature) as uffd:
            uffd.register(area.memory)
            with Job(operation, area, target) as job:
                event = next_event(uffd)
            assert event == job.result()
            assert uffd.read_events() == []


def test_events_are_not_told_unasked() -> None:
    every = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP
    kind = MemoryKind.ANONYMOUS
    for feature, operation in _OPERATIONS:
        others = every & ~feature
        with make_area(kind, 4) as area, make_area(kind, 4) as target, Userfaultfd(others) as uffd:
            # An untouched mapping that is moved next to itself is one with it, and loses its registration before the
            # old place is unmapped: then there is no event. With a page of its own it stays apart.
            area.populate()
            uffd.register(area.memory)
            start, length = area.start, area.length
            with Handler(uffd, lambda *_: None) as handler:
                operation(area, target)
            # What was moved away is unmapped.
            moved = [Unmap(start, start + length)] if feature is Feature.EVENT_REMAP else []
            assert handler.events == moved


@pytest.mark.needs_privilege("EVENT_FORK")
def test_forks_are_told_on_request_with_a_userfaultfd_of_the_child() -> None:
    def run(link: Any, area: Area) -> bytes:
        with Userfaultfd(Feature.EVENT_FORK) as uffd:
            uffd.register(area.memory)
            link.send("registered", (uffd.fd,))
            link.receive()
            found = in_child(area.head, 0)
            assert isinstance(found, bytes)
            return found

    with (
        make_area(MemoryKind.ANONYMOUS, 1) as area,
        subject(run, area) as process,
        process.receive_uffd() as uffd,
    ):
        process.send("go on")
        fork = next_event(uffd)
        assert isinstance(fork, Fork)
        with fork.child as child:
            assert child.initialised
            assert child.features == uffd.features == child.fdinfo().features
            # The child's faults come through it alone.
            waiters(child, 1)
            assert uffd.read_events() == []
            _fault_of(child, area.start, NONE, FaultKind.MISSING)
            assert child.copy(area.memory, area.pattern(0)) == PAGE
            assert process.receive() == area.pattern(0)[:32]
