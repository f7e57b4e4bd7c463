"""PAGEMAP_SCAN and read-write protection: which pages were accessed, and transparent huge pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from support.kernel import HUGE, PAGE, Area, Touch, make_area, next_event
from support.rwp import ASYNC, DIFFERENT_KINDS, SYNC, accessed, armed, present_pages, protected_pages
from userfault.kernel import Feature, Mapping, PageFault, RegisterMode, Userfaultfd, pagemap
from userfault.kernel.abi import FaultFlag, PageCategory
from userfault.kernel.errors import InvalidRequestError, UffdPermissionError
from userfault.kernel.mapping import Advice, MemoryKind

pytestmark = [
    pytest.mark.fact("2.12"),
    pytest.mark.needs_feature("RWP", "RWP_ASYNC"),
    pytest.mark.needs_linux("PAGEMAP_SCAN", "PAGE_IS_ACCESSED"),
]
kinds = pytest.mark.parametrize("kind", DIFFERENT_KINDS)
PAGES_OF_HUGE = HUGE // PAGE


@kinds
def test_what_counts_as_accessed(kind: MemoryKind) -> None:
    with make_area(kind, 3) as area, Userfaultfd(ASYNC) as uffd:
        area.memory.write(0, area.pattern(0))
        area.memory.write(area.page_size, area.pattern(1))
        assert accessed(area) == [False] * 3, "nothing counts where RWP is not registered"
        uffd.register(area.memory, mode=RegisterMode.RWP)
        assert accessed(area) == [True, True, False], "what is there counts, until it is protected first"
        uffd.rwprotect(area.memory)
        assert accessed(area) == [False] * 3
        area.head(1)
        area.head(2)
        assert accessed(area) == [False, True, True]
        uffd.rwprotect(area.start, area.page_size, protect=False)
        assert accessed(area) == [True] * 3, "not protected is as good as accessed"
        uffd.unregister(area.memory)
        assert accessed(area) == [False] * 3


@kinds
def test_a_scan_does_not_begin_the_next_interval(kind: MemoryKind) -> None:
    """There is no "get and protect" as there is for writes: what comes between scan and RWPROTECT is lost."""
    with armed(kind, ASYNC) as (area, uffd):
        area.head(1)
        for _ in range(2):
            assert accessed(area) == [False, True]
        found = pagemap.scan(area.memory, mask=PageCategory.ACCESSED, protect=True)
        assert found.ranges() == []  # not looked at: it is not for write tracking
        assert accessed(area) == [False, True]
        area.head(0)  # lost
        uffd.rwprotect(area.memory)
        assert accessed(area) == [False, False]


@pytest.mark.fact("2.10")
@pytest.mark.needs_feature("RWP", "WP_ASYNC")
@kinds
def test_write_tracking_passes_it_over(kind: MemoryKind) -> None:
    with armed(kind, ASYNC | Feature.WP_ASYNC) as (area, _):
        area.memory.write(area.page_size, b"x")
        assert pagemap.scan(area.memory, mask=PageCategory.WRITTEN).pages == 0
        assert pagemap.scan(area.memory, mask=PageCategory.WPALLOWED).pages == 0
        pagemap.write_protect(area.memory, check_wpasync=False)
        pagemap.scan(area.memory, mask=PageCategory.PRESENT, protect=True)
        assert protected_pages(area) == [True, False]
        with pytest.raises(UffdPermissionError):
            pagemap.scan(area.memory, mask=PageCategory.PRESENT, check_wpasync=True)


def test_a_scan_of_both_kinds_of_tracking() -> None:
    with (
        armed(MemoryKind.ANONYMOUS, ASYNC | Feature.WP_ASYNC) as (read, uffd),
        make_area(MemoryKind.SHMEM, 2) as written,
    ):
        written.populate()
        uffd.register(written.memory, mode=RegisterMode.WP)
        pagemap.write_protect(written.memory)
        for area in (read, written):
            area.head(0)
            area.memory.write(PAGE, b"x")
        either = PageCategory.ACCESSED | PageCategory.WRITTEN
        found = pagemap.scan(read.memory, anyof=either).regions
        assert found.tolist() == [(read.start, read.page(2), PageCategory.ACCESSED)]
        found = pagemap.scan(written.memory, anyof=either).regions
        assert found.tolist() == [(written.page(1), written.page(2), PageCategory.WRITTEN)]


@pytest.mark.fact("5")
def test_pages_around_a_fault_are_not_mapped() -> None:
    """So in shared memory the page that was touched is the one that counts."""
    with make_area(MemoryKind.SHMEM, 16) as area, Userfaultfd(ASYNC) as uffd:
        area.populate()
        area.drop()
        uffd.register(area.memory, mode=RegisterMode.RWP)
        area.head(7)
        assert present_pages(area) == [index == 7 for index in range(16)]
        assert accessed(area) == [index == 7 for index in range(16)]


# --- transparent huge pages ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _huge(features: Feature) -> Iterator[tuple[Area, Userfaultfd]]:
    """One transparent huge page, protected, as an area of small pages."""
    with Mapping.anonymous(HUGE, align=HUGE) as memory:
        memory.madvise(Advice.HUGEPAGE)
        memory.write(0, b"\1" * HUGE)
        if not _is_huge(memory):
            pytest.skip("needs transparent huge pages")
        with Userfaultfd(features) as uffd:
            uffd.register(memory, mode=RegisterMode.RWP)
            uffd.rwprotect(memory)
            yield Area(MemoryKind.ANONYMOUS, memory, PAGES_OF_HUGE), uffd


def _is_huge(memory: Mapping) -> bool:
    return pagemap.scan(memory, mask=PageCategory.HUGE).pages == PAGES_OF_HUGE


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_async_a_huge_page_counts_whole(write: bool) -> None:
    with _huge(ASYNC) as (area, _):
        assert _is_huge(area.memory)
        assert protected_pages(area) == [True] * PAGES_OF_HUGE
        assert accessed(area) == [False] * PAGES_OF_HUGE
        if write:
            area.memory.write(5 * PAGE, b"x")
        else:
            area.head(5)
        assert accessed(area) == [True] * PAGES_OF_HUGE
        assert _is_huge(area.memory)


def test_sync_a_huge_page_is_split_where_a_small_one_is_resolved() -> None:
    with _huge(SYNC) as (area, uffd):
        with Touch(area, 5) as touch:
            assert next_event(uffd) == PageFault(area.page(5), FaultFlag.RWP, 0)
            assert _is_huge(area.memory)
            uffd.rwprotect(area.page(5), PAGE, protect=False)
            assert touch.result() == b"\1" * 32
        assert not _is_huge(area.memory)
        assert protected_pages(area) == [index != 5 for index in range(PAGES_OF_HUGE)]


def test_a_huge_page_resolved_whole_stays_huge() -> None:
    with _huge(SYNC) as (area, uffd):
        with Touch(area, 5, data=b"x"):
            assert next_event(uffd) == PageFault(area.page(5), FaultFlag.RWP | FaultFlag.WRITE, 0)
            uffd.rwprotect(area.memory, protect=False)
        assert _is_huge(area.memory)
        assert protected_pages(area) == [False] * PAGES_OF_HUGE
        uffd.rwprotect(area.page(7), PAGE)
        assert not _is_huge(area.memory)
        assert protected_pages(area) == [index == 7 for index in range(PAGES_OF_HUGE)]


def test_protected_pages_are_not_collapsed() -> None:
    with _huge(ASYNC) as (area, uffd):
        uffd.rwprotect(area.page(5), PAGE, protect=False)
        assert not _is_huge(area.memory)
        with pytest.raises(InvalidRequestError):
            area.memory.madvise(Advice.COLLAPSE)
        assert protected_pages(area) == [index != 5 for index in range(PAGES_OF_HUGE)]
        uffd.rwprotect(area.memory, protect=False)
        area.memory.madvise(Advice.COLLAPSE)
        assert _is_huge(area.memory)
