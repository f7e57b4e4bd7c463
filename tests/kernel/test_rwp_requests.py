"""UFFDIO_RWPROTECT: what it takes, what it refuses, and that nothing is changed where it refuses."""

from __future__ import annotations

import errno

import pytest

from support.kernel import HUGE, PAGE, Link, Touch, make_area, next_event, subject, waiters
from support.kernel_facts import Job, ask, ask_at
from support.rwp import DIFFERENT_KINDS, SYNC, armed, protected_pages
from userfault.kernel import Feature, Mapping, RegisterMode, Remove, Userfaultfd
from userfault.kernel.abi import Request, RwprotectMode
from userfault.kernel.errors import (
    AgainError,
    InvalidRequestError,
    NotRegisteredError,
    TargetExitedError,
    UsageError,
)
from userfault.kernel.mapping import MemoryKind

pytestmark = [pytest.mark.fact("2.12"), pytest.mark.needs_feature("RWP", "RWP_ASYNC")]
kinds = pytest.mark.parametrize("kind", DIFFERENT_KINDS)


def _rwprotect(uffd: Userfaultfd, start: int, length: int, mode: int) -> int:
    return ask(uffd, Request.RWPROTECT, start, length, mode).errno


def test_what_is_no_range_or_mode_is_refused() -> None:
    with armed(MemoryKind.ANONYMOUS) as (area, uffd):
        start, length = area.start, area.length
        for where, size in (
            (start + 1, PAGE),
            (start, PAGE + 1),
            (start, 0),
            (2**64 - PAGE, 2 * PAGE),
            (2**63, PAGE),
        ):
            assert _rwprotect(uffd, where, size, 0) == errno.EINVAL
        for mode in (RwprotectMode.RWP | RwprotectMode.DONTWAKE, 1 << 2, 1 << 63, RwprotectMode.RWP | 1 << 2):
            assert _rwprotect(uffd, start, length, mode) == errno.EINVAL
        assert ask_at(uffd.fd, Request.RWPROTECT, 1) == errno.EFAULT
        assert protected_pages(area) == [True, True]
        for where, size in ((start + 1, PAGE), (start, PAGE + 1), (start, 0)):
            with pytest.raises(UsageError, match=r"multiple of the page size|not positive"):
                uffd.rwprotect(where, size, protect=False)


def test_it_waits_for_no_change_of_the_address_space() -> None:
    with (
        armed(MemoryKind.ANONYMOUS, SYNC | Feature.EVENT_REMOVE) as (area, uffd),
        Job(area.drop, 0, 1) as drop,
    ):
        assert uffd.poll(60)
        with pytest.raises(AgainError, match="read the waiting events"):
            uffd.rwprotect(area.memory, protect=False)
        # Before it looks at its argument.
        assert ask_at(uffd.fd, Request.RWPROTECT, 1) == errno.EAGAIN
        assert protected_pages(area)[1]
        # SET_MODE is not held up.
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        uffd.set_mode(disable=Feature.RWP_ASYNC)
        assert next_event(uffd) == Remove(area.start, area.page(1))
        drop.result()
        uffd.rwprotect(area.memory, protect=False)
        assert protected_pages(area) == [False, False]


def _arm_and_exit(link: Link) -> None:
    with armed(MemoryKind.ANONYMOUS) as (area, uffd):
        link.send(area.start, (uffd.fd,))
        link.receive()


def test_the_owner_has_exited() -> None:
    with subject(_arm_and_exit) as child:
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            uffd.rwprotect(start, PAGE)
            child.send("end")
            assert child.wait() == 0
            for protect in (True, False):
                with pytest.raises(TargetExitedError, match="has exited"):
                    uffd.rwprotect(start, PAGE, protect=protect)
            with pytest.raises(TargetExitedError, match="has exited"):
                uffd.set_mode(enable=Feature.RWP_ASYNC)


@kinds
def test_a_mapping_without_the_mode_refuses_all(kind: MemoryKind) -> None:
    """Unlike WRITEPROTECT, which changes what comes before it."""
    with make_area(kind, 2) as area, Userfaultfd(SYNC) as uffd:
        area.populate()
        for registered in (0, 1):
            uffd.register(area.page(registered), area.page_size, mode=RegisterMode.RWP)
            uffd.register(area.page(1 - registered), area.page_size, mode=RegisterMode.MISSING)
            with pytest.raises(NotRegisteredError, match="nothing was changed"):
                uffd.rwprotect(area.memory)
            assert protected_pages(area) == [False, False]
            uffd.unregister(area.memory)
            with pytest.raises(NotRegisteredError, match="nothing was changed"):
                uffd.rwprotect(area.memory)


def test_unmapped_ranges() -> None:
    """Holes are passed over; nothing but a hole is not registered."""
    with make_area(MemoryKind.ANONYMOUS, 5) as area, Userfaultfd(SYNC) as uffd:
        area.populate()
        uffd.register(area.memory, mode=RegisterMode.RWP)
        for hole in (0, 2, 4):
            area.memory.unmap(hole * PAGE, PAGE)
            with pytest.raises(NotRegisteredError):
                uffd.rwprotect(area.page(hole), PAGE)
        uffd.rwprotect(area.start, area.length)
        assert protected_pages(area) == [False, True, False, True, False]
        uffd.rwprotect(area.start, area.length, protect=False)
        assert protected_pages(area) == [False] * 5


@pytest.mark.parametrize("kind", [MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB])
def test_huge_pages_are_not_cut(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(SYNC) as uffd:
        area.populate()
        uffd.register(area.memory, mode=RegisterMode.RWP)
        for start, length in ((area.start, PAGE), (area.start, HUGE + PAGE), (area.start + PAGE, HUGE)):
            with pytest.raises(InvalidRequestError):
                uffd.rwprotect(start, length)
            assert protected_pages(area) == [False, False]


@kinds
def test_another_userfaultfd_of_the_process_may_protect(kind: MemoryKind) -> None:
    """One without the feature RWP even; but it wakes only those who wait on itself."""
    with armed(kind) as (area, uffd), Userfaultfd() as other:
        assert not other.features & Feature.RWP
        with Touch(area, 1) as touch:
            waiters(uffd, 1)
            other.rwprotect(area.memory, protect=False)
            assert protected_pages(area) == [False, False]
            assert uffd.fdinfo().total == 1
            uffd.wake(area.page(1), area.page_size)
            assert touch.result() == area.pattern(1)[:32]
        other.rwprotect(area.memory)
        assert protected_pages(area) == [True, True]


@kinds
def test_each_protection_wants_its_own_mode(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd), Userfaultfd() as other:
        for protect in (True, False):
            with pytest.raises(NotRegisteredError):
                uffd.writeprotect(area.memory, protect=protect)
        assert protected_pages(area) == [True, True]
        uffd.unregister(area.memory)
        other.register(area.memory, mode=RegisterMode.WP)
        other.writeprotect(area.memory)
        for protect in (True, False):
            with pytest.raises(NotRegisteredError):
                uffd.rwprotect(area.memory, protect=protect)
        assert protected_pages(area) == [True, True]


def test_objects_and_addresses_are_ranges() -> None:
    with armed(MemoryKind.SHMEM, pages=3) as (area, uffd):
        uffd.rwprotect(area.memory, PAGE, protect=False)
        assert protected_pages(area) == [False, True, True]
        uffd.rwprotect(area.page(2), PAGE, protect=False)
        assert protected_pages(area) == [False, True, False]
        with Mapping.anonymous(PAGE) as stranger, pytest.raises(NotRegisteredError):
            uffd.rwprotect(stranger)
