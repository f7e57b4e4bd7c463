"""What read-write protection does to the pages of a range, and what the fill requests do there."""

from __future__ import annotations

import errno

import pytest

from support.kernel import PAGE, Touch, make_area, next_event
from support.kernel_facts import Job
from support.rwp import (
    DIFFERENT_KINDS,
    SYNC,
    armed,
    entry,
    frame,
    present_pages,
    protected_pages,
    read_waits,
)
from userfault.kernel import Outcome, PageFault, RegisterMode, Userfaultfd, pagemap
from userfault.kernel.abi import FaultFlag, PageCategory, PagemapBit
from userfault.kernel.errors import NotRegisteredError
from userfault.kernel.mapping import MemoryKind

pytestmark = [pytest.mark.fact("2.12"), pytest.mark.needs_feature("RWP", "RWP_ASYNC")]
kinds = pytest.mark.parametrize("kind", DIFFERENT_KINDS)
PROTECTED = PagemapBit.PRESENT | PagemapBit.UFFD_PROTECTED


@kinds
def test_a_page_stays_where_it_is(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(SYNC) as uffd:
        area.populate()
        uffd.register(area.memory, mode=RegisterMode.RWP)
        before = frame(area.start)
        assert entry(area.start) == PagemapBit.PRESENT
        for _ in range(2):  # protecting twice is as good as once
            uffd.rwprotect(area.start, area.page_size)
            assert entry(area.start) == PROTECTED
            assert frame(area.start) == before
            assert protected_pages(area) == [True, False]
        for _ in range(2):
            uffd.rwprotect(area.memory, protect=False)
            assert entry(area.start) == PagemapBit.PRESENT
            assert frame(area.start) == before
        assert area.head(0) == area.pattern(0)[:32]


@kinds
def test_an_empty_page_is_not_marked(kind: MemoryKind) -> None:
    """So what comes there later is not protected."""
    with make_area(kind, 2) as area, Userfaultfd(SYNC) as uffd:
        uffd.register(area.memory, mode=RegisterMode.RWP)
        if area.shared:  # there, but not mapped
            with area.memory.alias() as other:
                other.write(0, area.pattern(0))
                other.write(area.page_size, area.pattern(1))
        uffd.rwprotect(area.memory)
        assert [entry(area.page(index)) for index in range(2)] == [PagemapBit(0)] * 2
        with Touch(area, 0) as read, Touch(area, 1, data=b"x") as write:
            assert read.result() == (area.pattern(0)[:32] if area.shared else bytes(32))
            assert write.result() == b"x"
        assert uffd.read_events() == []
        assert [entry(area.page(index)) for index in range(2)] == [PagemapBit.PRESENT] * 2


@pytest.mark.parametrize("kind", [MemoryKind.ANONYMOUS, MemoryKind.PRIVATE_SHMEM])
def test_the_zero_page_is_protected(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd(SYNC) as uffd:
        uffd.register(area.memory, mode=RegisterMode.RWP | RegisterMode.MISSING)
        uffd.zeropage(area.memory)
        assert pagemap.scan(area.memory, mask=PageCategory.PFNZERO).pages == 1
        uffd.rwprotect(area.memory)
        assert entry(area.start) == PROTECTED
        with Touch(area, data=b"not zero") as touch:
            assert next_event(uffd) == PageFault(area.start, FaultFlag.RWP | FaultFlag.WRITE, 0)
            uffd.rwprotect(area.memory, protect=False)
            touch.result()
        assert area.head(0) == b"not zero".ljust(32, b"\0")
        assert pagemap.scan(area.memory, mask=PageCategory.PFNZERO).pages == 0


@kinds
def test_the_mappings_own_protection_comes_back(kind: MemoryKind) -> None:
    """A page that a read has resolved can be written without another message."""
    with armed(kind) as (area, uffd):
        assert read_waits(area, uffd, 0)
        with Touch(area, 0, data=b"written after it was read") as touch:
            touch.result()
        assert uffd.read_events() == []
        assert area.head(0).startswith(b"written after it was read")


@kinds
def test_filled_pages_come_unprotected(kind: MemoryKind) -> None:
    """There is no mode that installs a page protected: protect it afterwards, and what comes between is lost."""
    modes = RegisterMode.RWP | RegisterMode.MISSING
    content = bytes(reversed(range(256))) * 16
    with make_area(kind, 3) as area, Userfaultfd(SYNC) as uffd:
        operations = uffd.register(area.memory, mode=modes).operations
        uffd.rwprotect(area.memory)
        uffd.copy(area.start, content * (area.page_size // PAGE))
        filled = [0]
        if operations & operations.ZEROPAGE:
            uffd.zeropage(area.page(1), area.page_size)
            filled.append(1)
        if area.shared:
            with area.memory.alias() as other:
                other.write(2 * area.page_size, area.pattern(2))
            uffd.continue_(area.page(2), area.page_size)
            filled.append(2)
        assert present_pages(area) == [index in filled for index in range(3)]
        assert protected_pages(area) == [False] * 3
        for index in filled:
            assert not read_waits(area, uffd, index)
        uffd.rwprotect(area.memory)
        assert protected_pages(area) == [index in filled for index in range(3)]
        for index in filled:
            assert read_waits(area, uffd, index)
        assert area.head(0) == content[:32]


@kinds
def test_fills_with_the_mode_of_write_protection_are_refused(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd(SYNC) as uffd:
        uffd.register(area.memory, mode=RegisterMode.RWP | RegisterMode.MISSING)
        source = bytes(area.page_size)
        assert uffd.try_copy(area.start, source, write_protect=True) == Outcome(0, errno.EINVAL)
        if area.shared:
            with area.memory.alias() as other:
                other.write(0, b"x")
            assert uffd.try_continue(area.memory, write_protect=True) == Outcome(0, errno.EINVAL)
        assert present_pages(area) == [False]


@kinds
def test_a_protected_page_exists(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd):
        exists = Outcome(0, errno.EEXIST)
        assert uffd.try_copy(area.start, bytes(area.page_size)) == exists
        assert uffd.try_poison(area.start, area.page_size) == exists
        if area.page_size == PAGE:
            assert uffd.try_zeropage(area.start, PAGE) == exists
        if area.shared:
            assert uffd.try_continue(area.start, area.page_size) == exists
        assert protected_pages(area) == [True, True]
        uffd.rwprotect(area.memory, protect=False)
        assert area.head(0) == area.pattern(0)[:32]


@pytest.mark.needs_feature("RWP", "MOVE")
def test_a_page_that_is_moved_in_is_protected() -> None:
    with make_area(MemoryKind.ANONYMOUS, 1) as source, armed(MemoryKind.ANONYMOUS) as (area, uffd):
        source.populate()
        area.drop(1, 1)
        assert entry(area.page(1)) == PagemapBit(0)
        uffd.move(area.page(1), source.start, PAGE)
        assert protected_pages(area) == [True, True]
        assert read_waits(area, uffd, 1)
        assert area.head(1) == source.pattern(0)[:32]


@pytest.mark.needs_feature("RWP", "MOVE")
def test_a_protected_page_is_moved_out_accessible() -> None:
    """The way to evict: nobody can touch it while it goes."""
    with make_area(MemoryKind.ANONYMOUS, 2) as stash, armed(MemoryKind.ANONYMOUS) as (area, uffd):
        uffd.register(stash.memory, mode=RegisterMode.MISSING)
        uffd.move(stash.memory, area.memory)
        assert present_pages(area) == [False, False]
        assert protected_pages(stash) == [False, False]
        assert [stash.head(index) for index in range(2)] == [area.pattern(index)[:32] for index in range(2)]
        with Job(area.head, 0) as read:  # an empty page without MISSING: zeros
            assert read.result() == bytes(32)


@pytest.mark.needs_feature("RWP", "POISON")
@kinds
def test_poison_is_not_protected(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(SYNC) as uffd:
        uffd.register(area.memory, mode=RegisterMode.RWP)
        uffd.poison(area.start, area.page_size)
        uffd.copy(area.page(1), bytes(area.page_size))
        poison = entry(area.start)
        for protect in (True, False):
            uffd.rwprotect(area.memory, protect=protect)
            assert protected_pages(area) == [False, protect]
            assert entry(area.start) == poison
            assert uffd.try_poison(area.start, area.page_size) == Outcome(0, errno.EEXIST)
        uffd.copy(area.start, area.pattern(0))  # which takes the poison away
        assert area.head(0) == area.pattern(0)[:32]


def test_a_protected_range_that_is_no_longer_registered() -> None:
    with armed(MemoryKind.ANONYMOUS) as (area, uffd):
        uffd.unregister(area.page(1), PAGE)
        with pytest.raises(NotRegisteredError):
            uffd.rwprotect(area.memory, protect=False)
        assert protected_pages(area) == [True, False]
        assert area.head(1) == area.pattern(1)[:32]
