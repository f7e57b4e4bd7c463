"""`pagemap`: scans, entries and flags of this process's memory and of another's."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from support.kernel import HUGE, PAGE, Link, huge_pages, in_child, subject
from support.processes import run_python
from support.waiting import wait_until
from userfault.errors import ClosedError
from userfault.kernel import Feature, Mapping, RegisterMode, Userfaultfd, abi, pagemap
from userfault.kernel.errors import (
    BadAddressError,
    InvalidRequestError,
    NotSupportedError,
    TargetExitedError,
    UffdError,
    UffdPermissionError,
    UsageError,
)
from userfault.kernel.mapping import Advice
from userfault.kernel.pagemap import PageCategory, PagemapBit, Scanner

NONE = PageCategory(0)
PRESENT, WRITTEN, HUGE_PAGE = PageCategory.PRESENT, PageCategory.WRITTEN, PageCategory.HUGE
FILE, PFNZERO, WPALLOWED = PageCategory.FILE, PageCategory.PFNZERO, PageCategory.WPALLOWED

scans = pytest.mark.needs_linux("PAGEMAP_SCAN")
tracks = pytest.mark.needs_feature("WP_ASYNC")


def small_pages(pages: int, **options: Any) -> Mapping:
    """Anonymous memory that never has huge pages."""
    memory = Mapping.anonymous(pages * PAGE, **options)
    memory.madvise(Advice.NOHUGEPAGE)
    return memory


@pytest.fixture
def memory() -> Iterator[Mapping]:
    """64 pages of anonymous memory; the even ones are present."""
    with small_pages(64) as made:
        for page in range(0, 64, 2):
            made.write(page * PAGE, b"x")
        yield made


@pytest.fixture
def tracked() -> Iterator[Mapping]:
    """64 pages whose writes are tracked; none of them was written."""
    with Userfaultfd(Feature.WP_ASYNC) as uffd, small_pages(64, populate=True) as made:
        uffd.register(made, mode=RegisterMode.WP)
        uffd.writeprotect(made)
        yield made


def pages_of(found: pagemap.Scan, memory: Mapping) -> list[int]:
    """The numbers of the pages that were found."""
    assert found.start == memory.address
    return np.flatnonzero(found.mask()).tolist()


def write(memory: Mapping, *pages: int) -> None:
    for page in pages:
        memory.write(page * PAGE, b"w")


# --- what matches --------------------------------------------------------------------------------------------------


@scans
def test_regions(memory: Mapping) -> None:
    found = pagemap.scan(memory, mask=PRESENT)
    assert found.regions.dtype == np.dtype([("start", "u8"), ("end", "u8"), ("categories", "u8")])
    assert found.regions.shape == (32,)
    assert (found.regions["start"] - memory.address).tolist() == list(range(0, 64 * PAGE, 2 * PAGE))
    assert (found.regions["end"] - found.regions["start"] == PAGE).all()
    assert (found.regions["categories"] == PRESENT).all()
    assert (found.start, found.end, found.walk_end) == (memory.address, *[memory.address + memory.length] * 2)
    assert found.complete
    assert found.pages == 32


@scans
def test_masks(memory: Mapping) -> None:
    memory.read(PAGE, 1)  # page 1 becomes the zero page
    even, odd = list(range(0, 64, 2)), list(range(3, 64, 2))

    def matching(**masks: PageCategory) -> list[int]:
        return pages_of(pagemap.scan(memory, **masks), memory)

    assert matching(mask=PRESENT) == sorted([*even, 1])
    assert matching(mask=PRESENT | PFNZERO) == [1]
    assert matching(mask=PRESENT | PFNZERO, inverted=PFNZERO) == even
    assert matching(mask=PRESENT, inverted=PRESENT) == odd
    assert matching(anyof=PFNZERO) == [1]
    assert matching(anyof=PFNZERO | PRESENT) == sorted([*even, 1])
    assert matching(anyof=PRESENT | PFNZERO, inverted=PRESENT) == sorted([*odd, 1])
    assert matching(mask=PRESENT, anyof=PFNZERO | FILE) == [1]
    assert matching(mask=PRESENT, anyof=PFNZERO, inverted=PFNZERO) == even
    assert matching(mask=FILE) == []
    assert matching() == list(range(64))  # all of the mapping, present or not


@scans
def test_what_is_told_of_the_pages(memory: Mapping) -> None:
    memory.read(PAGE, 1)

    def told(**arguments: Any) -> set[int]:
        return set(pagemap.scan(memory, mask=PRESENT, **arguments).regions["categories"].tolist())

    assert told() == {PRESENT}  # what was asked for
    assert told(returns=PRESENT | PFNZERO) == {PRESENT, PRESENT | PFNZERO}
    assert told(returns=PFNZERO) == {0, PFNZERO}
    assert told(anyof=PFNZERO | PRESENT) == {PRESENT, PRESENT | PFNZERO}
    everything = pagemap.scan(memory)  # nothing was asked for
    assert {int(found) & PRESENT for found in everything.regions["categories"]} == {0, PRESENT}


@scans
def test_neighbours_of_one_sort_are_one_region(memory: Mapping) -> None:
    write(memory, *range(10, 20))
    found = pagemap.scan(memory, mask=PRESENT)
    (row,) = [row for row in found.regions if row["start"] == memory.address + 10 * PAGE]
    assert row["end"] == memory.address + 21 * PAGE
    # What is not told does not part them.
    memory.read(31 * PAGE, 1)
    merged = pagemap.scan(memory, 34 * PAGE, mask=PRESENT, returns=NONE)
    parted = pagemap.scan(memory, 34 * PAGE, mask=PRESENT, returns=PFNZERO)
    assert merged.pages == parted.pages
    assert len(parted.regions) == len(merged.regions) + 2


@scans
def test_known_categories() -> None:
    known = pagemap.known_categories()
    assert (
        known & (PRESENT | WRITTEN | FILE | HUGE_PAGE | PFNZERO)
        == PRESENT | WRITTEN | FILE | HUGE_PAGE | PFNZERO
    )
    assert known & ~PageCategory(sum(PageCategory)) == 0


@scans
def test_files_and_shared_memory() -> None:
    with Mapping.memfd(4 * PAGE) as shared, Mapping.memfd(4 * PAGE, shared=False) as private:
        write(shared, 1)
        assert pages_of(pagemap.scan(shared, mask=FILE), shared) == [1]
        private.read(0, 1)
        write(private, 1)
        found = pagemap.scan(private, 2 * PAGE, mask=PRESENT, returns=FILE)
        assert found.regions["categories"].tolist() == [FILE, 0]  # the file's page, and a copy of our own


@scans
@pytest.mark.needs_linux("PAGE_IS_GUARD")
def test_guard_pages(memory: Mapping) -> None:
    memory.madvise(Advice.GUARD_INSTALL, 7 * PAGE, 2 * PAGE)
    assert pages_of(pagemap.scan(memory, mask=PageCategory.GUARD), memory) == [7, 8]
    assert pages_of(pagemap.scan(memory, mask=PRESENT), memory)[3:5] == [6, 10]
    assert np.flatnonzero(pagemap.has(pagemap.entries(memory), PagemapBit.GUARD)).tolist() == [7, 8]


@scans
def test_transparent_huge_pages() -> None:
    with Mapping.anonymous(2 * HUGE, align=HUGE) as memory:
        try:
            memory.madvise(Advice.HUGEPAGE)
            memory.write(0, bytes([1]) * HUGE)
            memory.write(HUGE, bytes([1]) * PAGE)
            memory.madvise(Advice.COLLAPSE, 0, HUGE)  # where they are switched off, too
        except UffdError:
            pytest.skip("needs transparent huge pages")
        memory.madvise(Advice.NOHUGEPAGE, HUGE, HUGE)
        found = pagemap.scan(memory, HUGE, mask=PRESENT, returns=HUGE_PAGE)
        assert found.regions["categories"].tolist() == [HUGE_PAGE]
        assert found.pages == HUGE // PAGE
        # A part of it, and a limit within it.
        part = pagemap.scan(memory.address + 5 * PAGE, 7 * PAGE, mask=HUGE_PAGE)
        assert part.ranges() == [(memory.address + 5 * PAGE, memory.address + 12 * PAGE)]
        part = pagemap.scan(memory, mask=HUGE_PAGE, max_pages=3)
        assert (part.pages, part.walk_end) == (3, memory.address + 3 * PAGE)


@scans
@tracks
def test_protecting_a_part_splits_a_huge_page() -> None:
    with Userfaultfd(Feature.WP_ASYNC) as uffd, Mapping.anonymous(HUGE, align=HUGE) as memory:
        try:
            memory.madvise(Advice.HUGEPAGE)
            memory.write(0, bytes([1]) * HUGE)
            memory.madvise(Advice.COLLAPSE)
        except UffdError:
            pytest.skip("needs transparent huge pages")
        uffd.register(memory, mode=RegisterMode.WP)
        half = HUGE // 2
        assert pagemap.scan(memory, mask=WRITTEN | HUGE_PAGE).pages == HUGE // PAGE
        found = pagemap.scan(memory, half, mask=WRITTEN, protect=True)
        assert (found.pages, found.complete) == (half // PAGE, True)
        assert pagemap.scan(memory, mask=HUGE_PAGE).pages == 0
        assert pagemap.scan(memory, mask=WRITTEN).ranges() == [(memory.address + half, memory.address + HUGE)]


@scans
@pytest.mark.needs_privilege("huge pages")
def test_huge_pages() -> None:
    with huge_pages(2), Mapping.memfd(2 * HUGE, huge_page_size=HUGE) as memory:
        memory.write(HUGE, b"x")
        found = pagemap.scan(memory, mask=HUGE_PAGE | PRESENT, returns=HUGE_PAGE | PRESENT | FILE)
        assert found.ranges() == [(memory.address + HUGE, memory.address + 2 * HUGE)]
        assert found.regions["categories"].tolist() == [HUGE_PAGE | PRESENT | FILE]


@scans
@tracks
@pytest.mark.needs_privilege("huge pages")
def test_a_huge_page_that_is_cut_is_not_protected() -> None:
    with (
        huge_pages(3),
        Userfaultfd(Feature.WP_ASYNC) as uffd,
        Mapping.memfd(3 * HUGE, huge_page_size=HUGE, populate=True) as memory,
    ):
        uffd.register(memory, mode=RegisterMode.WP)
        cut = pagemap.scan(memory.address, 2 * HUGE + PAGE, mask=WRITTEN, protect=True)
        assert cut.ranges() == [(memory.address, memory.address + 2 * HUGE)]
        assert not cut.complete
        assert cut.walk_end == memory.address + 2 * HUGE
        pagemap.scan(memory, mask=WRITTEN, protect=True)
        write_all = memory.address + HUGE // 2
        for page in range(3):
            memory.write(page * HUGE, b"w")
        # Cut at its beginning: the kernel says that it stopped there, though it went on.
        for mask in (WRITTEN, NONE):
            cut = pagemap.scan(write_all, 2 * HUGE + HUGE // 2, mask=mask, returns=WRITTEN, protect=True)
            assert cut.ranges() == [(memory.address + HUGE, memory.address + 3 * HUGE)]
            assert (cut.complete, cut.walk_end) == (False, write_all)
            for page in range(3):
                memory.write(page * HUGE, b"w")


# --- continuation --------------------------------------------------------------------------------------------------


@scans
@pytest.mark.parametrize("max_regions", [1, 2, 7, 31, 32, 33, 10_000])
def test_any_vector_gives_the_same(memory: Mapping, max_regions: int) -> None:
    write(memory, 1, 33, 35)  # some longer regions
    whole = pagemap.scan(memory, mask=PRESENT)
    found = pagemap.scan(memory, mask=PRESENT, max_regions=max_regions)
    assert found.regions.tolist() == whole.regions.tolist()
    assert (found.walk_end, found.complete) == (whole.walk_end, True)


@scans
def test_more_regions_than_one_block_of_ours(memory: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pagemap.scan(memory, mask=PRESENT)
    monkeypatch.setattr(pagemap, "_VECTOR", 5)
    monkeypatch.setattr(pagemap, "_COPIED", 3)
    monkeypatch.setattr(pagemap, "_spare", [])
    for max_regions in (None, 2, 5):
        found = pagemap.scan(memory, mask=PRESENT, max_regions=max_regions)
        assert found.regions.tolist() == whole.regions.tolist()
    few = pagemap.scan(memory, 8 * PAGE, mask=PRESENT)  # more than are copied, fewer than a block
    again = pagemap.scan(memory, 8 * PAGE, mask=PRESENT)
    assert few.regions.tolist() == again.regions.tolist() == whole.regions[:4].tolist()
    assert not np.shares_memory(few.regions, again.regions)


@scans
@pytest.mark.parametrize("max_regions", [None, 511, 512, 513, 1024, 1537])
def test_more_regions_than_the_kernels_own_buffer(max_regions: int | None) -> None:
    # After 512 regions Linux (6.18) leaves in walk_end where it was then, though it goes on to the end.
    with small_pages(4096) as memory:
        for page in range(0, 4096, 2):
            memory.write(page * PAGE, b"x")
        for pages in (1022, 1024, 1026, 2048, 4096):
            found = pagemap.scan(memory, pages * PAGE, mask=PRESENT, max_regions=max_regions)
            assert pages_of(found, memory) == list(range(0, pages, 2))
            assert len(found.regions) == pages // 2
            assert (found.walk_end, found.complete) == (memory.address + pages * PAGE, True)
        found = pagemap.scan(memory, mask=PRESENT, max_regions=max_regions, max_pages=1200)
        assert pages_of(found, memory) == list(range(0, 2400, 2))
        assert not found.complete


@scans
@tracks
def test_protecting_more_regions_than_the_kernels_own_buffer() -> None:
    with Userfaultfd(Feature.WP_ASYNC) as uffd, small_pages(4096, populate=True) as memory:
        uffd.register(memory, mode=RegisterMode.WP)
        pagemap.write_protect(memory)
        for page in range(0, 4096, 2):
            memory.write(page * PAGE, b"x")
        found = pagemap.scan(memory, mask=WRITTEN, protect=True)
        assert pages_of(found, memory) == list(range(0, 4096, 2))
        assert found.complete
        assert pagemap.scan(memory, mask=WRITTEN).pages == 0


@scans
def test_results_are_the_callers(memory: Mapping) -> None:
    with Scanner() as scanner:
        first = scanner.scan(memory, mask=PRESENT)
        before = first.regions.tolist()
        scanner.scan(memory, mask=PRESENT, inverted=PRESENT)
        assert first.regions.tolist() == before


@scans
@pytest.mark.parametrize("max_regions", [None, 1, 3])
def test_a_limit_of_pages(memory: Mapping, max_regions: int | None) -> None:
    write(memory, 1, 3, 5)  # pages 0 to 6 are one region now
    start, end, found = memory.address, memory.address + memory.length, []
    with Scanner() as scanner:
        for _ in range(100):
            part = scanner.scan(start, end - start, mask=PRESENT, max_pages=5, max_regions=max_regions)
            assert part.pages <= 5
            assert part.complete is (part.walk_end == end)
            found += np.flatnonzero(part.mask(memory.address, memory.length)).tolist()
            start = part.walk_end
            if part.complete:
                break
    assert found == pages_of(pagemap.scan(memory, mask=PRESENT), memory)
    assert pagemap.scan(memory, mask=PRESENT, max_pages=35).pages == 35  # all of them


@scans
def test_holes_are_nothing(memory: Mapping) -> None:
    address = memory.address
    memory.unmap(16 * PAGE, 16 * PAGE)
    found = pagemap.scan(address, 64 * PAGE)
    assert found.ranges() == [(address, address + 16 * PAGE), (address + 32 * PAGE, address + 64 * PAGE)]
    hole = pagemap.scan(address + 16 * PAGE, 16 * PAGE)
    assert (hole.pages, hole.complete, hole.ranges()) == (0, True, [])
    assert not hole.mask().any()
    assert hole.mask().shape == (16,)


@scans
def test_a_terabyte_of_nothing_is_quick() -> None:
    # Linear in its pages this would take minutes, and the test's time limit would end it.
    with Mapping.anonymous(1 << 40, noreserve=True) as memory:
        memory.madvise(Advice.NOHUGEPAGE)
        places = [0, 123 << 30, (1 << 40) - PAGE]
        for place in places:
            memory.write(place, b"x")
        found = pagemap.scan(memory, mask=PRESENT)
        assert found.ranges() == [(memory.address + place, memory.address + place + PAGE) for place in places]
        assert found.mask(memory.address + places[1] - PAGE, 3 * PAGE).tolist() == [False, True, False]


# --- helpers of the result -----------------------------------------------------------------------------------------


@scans
def test_masks_of_a_part(memory: Mapping) -> None:
    write(memory, 9)  # 8 to 10 are one region
    found = pagemap.scan(memory, mask=PRESENT)
    expected = np.array([page % 2 == 0 or page == 9 for page in range(64)])
    assert found.mask().dtype == np.bool_
    assert (found.mask() == expected).all()
    for first, count in [(9, 1), (8, 3), (7, 5), (9, 3), (0, 64), (60, 4)]:
        part = found.mask(memory.address + first * PAGE, count * PAGE)
        assert part.tolist() == expected[first : first + count].tolist()
    assert found.mask(memory.address + 60 * PAGE).tolist() == expected[60:].tolist()
    assert not found.mask(memory.address - 8 * PAGE, 8 * PAGE).any()
    assert found.mask(memory.address + 62 * PAGE, 8 * PAGE).tolist() == [True] + [False] * 7
    with pytest.raises(UsageError):
        found.mask(memory.address + 1, PAGE)
    with pytest.raises(UsageError):
        found.mask(memory.address, 0)


@scans
def test_a_part_by_categories(memory: Mapping) -> None:
    memory.read(PAGE, 1)
    found = pagemap.scan(memory, mask=PRESENT, returns=PRESENT | PFNZERO)
    assert pages_of(found.where(PFNZERO), memory) == [1]
    assert found.where(PFNZERO | FILE).pages == 0
    assert found.where(NONE).pages == found.where(PRESENT).pages == 33
    assert len(found.regions) > len(found.ranges())  # 0, 1 and 2 are neighbours of two sorts
    assert found.ranges()[0] == (memory.address, memory.address + 3 * PAGE)


# --- ranges --------------------------------------------------------------------------------------------------------


@scans
def test_a_range_is_an_address_or_an_object(memory: Mapping) -> None:
    whole = pagemap.scan(memory, mask=PRESENT).regions.tolist()
    with memory.view() as view:
        array = np.frombuffer(view, "f8").reshape(64, -1)
        assert pagemap.scan(array, mask=PRESENT).regions.tolist() == whole
        assert pagemap.scan(view, mask=PRESENT).regions.tolist() == whole
        assert pagemap.scan(array[10:20], mask=PRESENT).pages == 5
        assert pagemap.scan(array, 10 * PAGE, mask=PRESENT).pages == 5
        del array
    assert pagemap.scan(memory.address, 64 * PAGE, mask=PRESENT).regions.tolist() == whole
    # An address that NumPy calculated is an address, not a buffer of eight bytes.
    address = np.uint64(memory.address)
    assert pagemap.scan(address, 64 * PAGE, mask=PRESENT).regions.tolist() == whole


@scans
def test_an_object_within_pages_means_these_pages(memory: Mapping) -> None:
    with memory.view() as view:
        found = pagemap.scan(view[3 * PAGE + 100 : 4 * PAGE + 1])
        assert (found.start, found.end) == (memory.address + 3 * PAGE, memory.address + 5 * PAGE)
        assert pagemap.present(view[3 * PAGE + 100 : 4 * PAGE + 1]).tolist() == [False, True]
        found = pagemap.scan(view[10:], PAGE)
        assert (found.start, found.end) == (memory.address, memory.address + 2 * PAGE)
        # But nothing outside of it is protected.
        with pytest.raises(UsageError, match="not a multiple of the page size"):
            pagemap.scan(view[10:], mask=WRITTEN, protect=True)
        with pytest.raises(UsageError, match="not a multiple of the page size"):
            pagemap.write_protect(view[: PAGE + 1])


# --- wrong use, and each error of the kernel -----------------------------------------------------------------------

_WRONG: dict[str, tuple[Callable[[Mapping], object], str]] = {
    "no length": (lambda m: pagemap.scan(m.address), "needs a length"),
    "within a page": (lambda m: pagemap.scan(m.address + 1, PAGE), "not a multiple"),
    "a part of a page": (lambda m: pagemap.scan(m.address, 1), "not a multiple"),
    "empty": (lambda m: pagemap.scan(m.address, 0), "not positive"),
    "more than the object": (lambda m: pagemap.scan(m, 65 * PAGE), "65|266240"),
    "an empty object": (lambda m: pagemap.entries(b""), "not in the object's 0 bytes"),
    "no range": (lambda m: pagemap.scan(None), "is no range"),
    "the end of all": (lambda m: pagemap.entries((1 << 64) - PAGE, PAGE), "outside of the address space"),
    "beyond it": (lambda m: pagemap.scan((1 << 64) - PAGE, 2 * PAGE), "outside of the address space"),
    "negative limit": (lambda m: pagemap.scan(m, max_pages=-1), "max_pages -1"),
    "no regions": (lambda m: pagemap.scan(m, max_regions=0), "max_regions 0"),
    "two processes": (lambda m: pagemap.scan(m, pid=1, fd=2), "not both"),
}


@pytest.mark.parametrize(("use", "message"), _WRONG.values(), ids=_WRONG)
def test_wrong_use(memory: Mapping, use: Callable[[Mapping], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        use(memory)


@scans
def test_einval_for_what_this_kernel_does_not_know(memory: Mapping) -> None:
    unknown = PageCategory(1 << 40)
    for name in ("mask", "anyof", "inverted", "returns"):
        with pytest.raises(InvalidRequestError, match=r"PAGEMAP_SCAN .*EINVAL") as caught:
            pagemap.scan(memory, **{name: unknown})
        assert (caught.value.call, caught.value.address) == ("PAGEMAP_SCAN", memory.address)
        assert caught.value.length == memory.length


@scans
def test_efault_outside_of_the_address_space() -> None:
    with pytest.raises(BadAddressError, match="EFAULT"):
        pagemap.scan(1 << 62, PAGE)
    with pytest.raises(BadAddressError, match=r"0x4000000000000000 is outside of the address space"):
        pagemap.entries(1 << 62, PAGE)


def test_enotty_where_there_is_no_such_call(memory: Mapping) -> None:
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    try:
        with pytest.raises(NotSupportedError, match=r"came with Linux 6\.7") as caught:
            pagemap.scan(memory, fd=fd, mask=PRESENT)
        assert caught.value.errno == errno.ENOTTY
    finally:
        os.close(fd)
    with pytest.raises(UffdError, match="EBADF"):
        Scanner(fd=fd)


@scans
@tracks
@pytest.mark.parametrize("mode", ["unregistered", "sync"])
def test_eperm_where_writes_are_not_tracked(tracked: Mapping, mode: str) -> None:
    with ExitStack() as stack:
        address = tracked.address + 32 * PAGE
        tracked.unmap(32 * PAGE, 32 * PAGE)
        second = stack.enter_context(small_pages(32, address=address, populate=True))
        if mode == "sync":
            uffd = stack.enter_context(Userfaultfd())
            uffd.register(second, mode=RegisterMode.WP)
        write(tracked, 5)
        for check in (
            lambda: pagemap.scan(tracked.address, 64 * PAGE, mask=WRITTEN, check_wpasync=True),
            lambda: pagemap.scan(tracked.address, 64 * PAGE, mask=WRITTEN, protect=True, check_wpasync=True),
            lambda: pagemap.write_protect(tracked.address, 64 * PAGE),
        ):
            with pytest.raises(UffdPermissionError, match="not registered for WP with WP_ASYNC"):
                check()
        # Nothing was lost: page 5 is written still.
        half = pagemap.scan(tracked.address, 32 * PAGE, mask=WRITTEN, protect=True, check_wpasync=True)
        assert half.ranges() == [(tracked.address + 5 * PAGE, tracked.address + 6 * PAGE)]
        # Without the check, mappings that are not tracked are passed over.
        write(tracked, 6)
        found = pagemap.scan(tracked.address, 64 * PAGE, mask=WRITTEN, protect=True)
        assert found.ranges() == [(tracked.address + 6 * PAGE, tracked.address + 7 * PAGE)]
        assert not pagemap.protected(second).any()


@scans
def test_holes_do_not_matter_to_the_check(tracked: Mapping) -> None:
    address = tracked.address
    tracked.unmap(8 * PAGE, 8 * PAGE)
    write(tracked, 1)
    found = pagemap.scan(address, 64 * PAGE, mask=WRITTEN, protect=True, check_wpasync=True)
    assert (found.pages, found.complete) == (1, True)


_ARGUMENT = {"size": 96, "flags": 0, "start": 0, "end": PAGE, "walk_end": 0, "vec": 0, "vec_len": 0, "max_pages": 0,
             "category_inverted": 0, "category_mask": 0, "category_anyof_mask": 0, "return_mask": 0}  # fmt: skip
_REFUSED = {
    "size": ({"size": 88}, errno.EINVAL),
    "flag": ({"flags": 4}, errno.EINVAL),
    "category": ({"category_mask": 1 << 30}, errno.EINVAL),
    "start within a page": ({"start": 1}, errno.EINVAL),
    "no vector of some length": ({"vec_len": 1}, errno.EINVAL),
    "range": ({"start": 1 << 62, "end": (1 << 62) + PAGE}, errno.EFAULT),
    "vector": ({"vec": 1 << 62, "vec_len": 1}, errno.EFAULT),
}


@scans
@pytest.mark.parametrize(("change", "number"), _REFUSED.values(), ids=_REFUSED)
def test_how_the_kernel_refuses(change: dict[str, int], number: int) -> None:
    argument = bytearray(abi.SCAN_ARGUMENT.pack(*{**_ARGUMENT, **change}.values()))
    with Scanner() as scanner, pytest.raises(OSError) as caught:  # noqa: PT011 - its number counts
        fcntl.ioctl(scanner.fileno(), abi.Request.PAGEMAP_SCAN, argument)
    assert caught.value.errno == number


# --- write tracking ------------------------------------------------------------------------------------------------


@scans
@tracks
def test_written_pages(tracked: Mapping) -> None:
    assert pagemap.scan(tracked, mask=WRITTEN).pages == 0
    write(tracked, 3, 4, 40)
    tracked.read(10 * PAGE, 1)
    for _ in range(2):  # looking changes nothing
        assert pages_of(pagemap.scan(tracked, mask=WRITTEN), tracked) == [3, 4, 40]
    assert pages_of(pagemap.scan(tracked, mask=WRITTEN, protect=True), tracked) == [3, 4, 40]
    assert pagemap.scan(tracked, mask=WRITTEN).pages == 0
    write(tracked, 4)
    found = pagemap.scan(tracked, mask=WPALLOWED, returns=WRITTEN)
    assert pages_of(found, tracked) == list(range(64))
    assert pages_of(found.where(WRITTEN), tracked) == [4]


@scans
@tracks
@pytest.mark.parametrize("max_regions", [1, 2, None])
def test_protecting_stops_where_the_report_does(tracked: Mapping, max_regions: int | None) -> None:
    write(tracked, *range(0, 64, 2))
    found = pagemap.scan(tracked, mask=WRITTEN, max_pages=10, max_regions=max_regions, protect=True)
    assert pages_of(found, tracked) == list(range(0, 20, 2))
    assert pages_of(pagemap.scan(tracked, mask=WRITTEN), tracked) == list(range(20, 64, 2))
    rest = pagemap.scan(tracked, mask=WRITTEN, max_regions=max_regions, protect=True)
    assert rest.pages == 22
    assert pagemap.scan(tracked, mask=WRITTEN).pages == 0


@scans
@tracks
def test_only_what_matches_is_protected(tracked: Mapping) -> None:
    write(tracked, 1, 2, 3)
    tracked.madvise(Advice.DONTNEED, 2 * PAGE, PAGE)
    found = pagemap.scan(tracked, mask=WRITTEN | PRESENT, protect=True)
    assert pages_of(found, tracked) == [1, 3]
    # A page that was dropped counts as written: its bytes are others.
    assert pages_of(pagemap.scan(tracked, mask=WRITTEN), tracked) == [2]


@scans
@tracks
@pytest.mark.parametrize("kind", ["anonymous", "memfd", "private memfd"])
def test_protecting_everything(kind: str) -> None:
    make = {
        "anonymous": lambda: small_pages(64),
        "memfd": lambda: Mapping.memfd(64 * PAGE),
        "private memfd": lambda: Mapping.memfd(64 * PAGE, shared=False),
    }[kind]
    with Userfaultfd(Feature.WP_ASYNC) as uffd, make() as memory:
        uffd.register(memory, mode=RegisterMode.WP)
        write(memory, *range(0, 64, 3))
        pagemap.write_protect(memory)
        assert pagemap.protected(memory).all()  # also what is not there yet
        assert pagemap.scan(memory, mask=WRITTEN).pages == 0
        write(memory, 0, 1, 63)
        assert pages_of(pagemap.scan(memory, mask=WRITTEN), memory) == [0, 1, 63]
        pagemap.write_protect(memory.address, 2 * PAGE)
        assert pages_of(pagemap.scan(memory, mask=WRITTEN), memory) == [63]


@scans
@tracks
def test_what_is_not_tracked_can_be_passed_over(tracked: Mapping) -> None:
    with small_pages(4, populate=True) as plain:
        pagemap.write_protect(plain, check_wpasync=False)
        assert not pagemap.protected(plain).any()
        plain.write(0, b"x")


@scans
@tracks
def test_writes_of_system_calls_count(tracked: Mapping) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"data")
        with tracked.view(7 * PAGE, 4) as view:
            os.readv(reader, [view])
    finally:
        os.close(reader)
        os.close(writer)
    assert pages_of(pagemap.scan(tracked, mask=WRITTEN), tracked) == [7]


@scans
@tracks
def test_six_writers_lose_nothing(tracked: Mapping) -> None:
    """Copy what each scan reports: in the end the copy is the memory, or a write went unseen."""
    stop = threading.Event()
    pages = tracked.length // PAGE
    written = [0] * 6

    def work(number: int) -> None:
        choose = random.Random(number)
        while not stop.is_set():
            written[number] += 1
            # Each writer has words of its own on every page.
            data = written[number].to_bytes(8, "little")
            tracked.write(choose.randrange(pages) * PAGE + 64 * number, data)

    shadow = bytearray(tracked.read(0, tracked.length))

    def copy_written(scanner: Scanner, max_regions: int | None) -> int:
        found = scanner.scan(tracked, mask=WRITTEN, protect=True, max_regions=max_regions)
        for start, end in found.ranges():
            offset = start - tracked.address
            shadow[offset : offset + end - start] = tracked.read(offset, end - start)
        return found.pages

    writers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    reported, rounds = 0, 0
    with Scanner() as scanner:
        for writer in writers:
            writer.start()
        try:
            # Until each has written every page ten times or so, and was caught at it.
            while min(written) < 10 * pages or reported < 10 * pages:
                reported += copy_written(scanner, (None, 1, 5)[rounds % 3])
                rounds += 1
        finally:
            stop.set()
            for writer in writers:
                writer.join()
        copy_written(scanner, None)
        assert shadow == tracked.read(0, tracked.length)
        assert copy_written(scanner, None) == 0
    assert rounds > 1


@scans
@pytest.mark.needs_feature("RWP_ASYNC")
@pytest.mark.needs_linux("PAGE_IS_ACCESSED")
def test_accessed_pages() -> None:
    with Userfaultfd(Feature.RWP | Feature.RWP_ASYNC) as uffd, small_pages(16, populate=True) as memory:
        uffd.register(memory, mode=RegisterMode.RWP)
        (flags,) = [found for found in pagemap.vm_flags(memory) if found.read_write_protect]
        assert (flags.write_protect, flags.registered) == (False, True)
        uffd.rwprotect(memory)
        assert pagemap.scan(memory, mask=PageCategory.ACCESSED).pages == 0
        assert pagemap.protected(memory).all()
        memory.read(3 * PAGE, 1)
        memory.write(5 * PAGE, b"x")
        assert pages_of(pagemap.scan(memory, mask=PageCategory.ACCESSED), memory) == [3, 5]


# --- several threads, other processes ------------------------------------------------------------------------------


@scans
def test_one_scanner_in_several_threads(memory: Mapping) -> None:
    expected = pagemap.scan(memory, mask=PRESENT).regions.tolist()
    wrong: list[object] = []

    def look() -> None:
        for _ in range(50):
            found = scanner.scan(memory, mask=PRESENT, max_regions=5).regions.tolist()
            if found != expected:
                wrong.append(found)

    with Scanner() as scanner:
        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def _track(link: Link) -> None:
    """In a child: track the writes to some memory, and write a page when told to."""
    with Userfaultfd(Feature.WP_ASYNC) as uffd, small_pages(16, populate=True) as memory:
        uffd.register(memory, mode=RegisterMode.WP)
        link.send(memory.address)
        while (page := link.receive()) is not None:
            memory.write(page * PAGE, b"w")
            link.send(page)


@scans
@tracks
def test_the_memory_of_another_process() -> None:
    with subject(_track) as child:
        address = child.receive()

        def written(**options: Any) -> list[int]:
            found = pagemap.scan(address, 16 * PAGE, pid=child.pid, mask=WRITTEN, **options)
            return np.flatnonzero(found.mask()).tolist()

        pagemap.write_protect(address, 16 * PAGE, pid=child.pid)
        assert written() == []
        assert pagemap.protected(address, 16 * PAGE, pid=child.pid).all()
        assert pagemap.present(address, 16 * PAGE, pid=child.pid).all()
        for page in (3, 9):
            child.send(page)
            child.receive()
        assert written(protect=True, check_wpasync=True) == [3, 9]
        assert written() == []
        (flags,) = pagemap.vm_flags(address, pid=child.pid)
        assert (flags.write_protect, flags.missing) == (True, False)
        child.send(None)
        assert child.wait() == 0


def _sleep(link: Link) -> None:
    with small_pages(4, populate=True) as memory:
        link.send(memory.address)
        link.receive()


@scans
def test_a_process_that_exits_is_not_taken_for_an_empty_one() -> None:
    with subject(_sleep) as child:
        address = child.receive()
        with Scanner(child.pid) as scanner:
            assert scanner.scan(address, 4 * PAGE, mask=PRESENT).pages == 4
            assert pagemap.has(scanner.entries(address, 4 * PAGE), PagemapBit.PRESENT).all()
            os.kill(child.pid, 9)
            wait_until(lambda: _state(child.pid) == "Z", "the child is a zombie")
            for use in (
                scanner.scan,
                scanner.entries,
                lambda *r: scanner.write_protect(*r, check_wpasync=False),
            ):
                with pytest.raises(TargetExitedError, match=r"the process .*has exited"):
                    use(address, 4 * PAGE)
        # Nobody has waited for it, so that its number is there; without memory it may crash older kernels to ask.
        for name in (pagemap.scan, pagemap.entries, pagemap.vm_flags):
            with pytest.raises(TargetExitedError):
                name(address, 4 * PAGE, pid=child.pid)
        child.wait()
        for name in (pagemap.scan, pagemap.entries, pagemap.vm_flags):
            with pytest.raises(TargetExitedError) as caught:
                name(address, 4 * PAGE, pid=child.pid)
            assert isinstance(caught.value, ProcessLookupError)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(") ")[2].split()[0]


@pytest.mark.needs_privilege("to become another user")
def test_a_process_that_may_not_be_looked_at() -> None:
    def look(pid: int) -> list[str]:
        faulthandler.disable()
        os.setuid(65534)
        return [_refusal(lambda: Scanner(pid)), _refusal(lambda: pagemap.vm_flags(0, PAGE, pid=pid))]

    for message in in_child(look, os.getpid()):
        assert message.startswith("UffdPermissionError")
        assert "CAP_SYS_PTRACE" in message


def _refusal(use: Callable[[], object]) -> str:
    try:
        use()
    except UffdError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@scans
def test_a_forked_child_inherits_a_scanner_of_its_parent(memory: Mapping) -> None:
    with Scanner() as scanner:

        def look() -> tuple[int, int, int]:
            write(memory, 1)  # a copy of the child's own
            with Scanner() as own:
                return (
                    os.getpid(),
                    scanner.scan(memory, mask=PRESENT).pages,
                    own.scan(memory, mask=PRESENT).pages,
                )

        assert in_child(look)[1:] == (32, 33)


def test_use_after_close(memory: Mapping) -> None:
    scanner = Scanner()
    assert not scanner.closed
    scanner.close()
    scanner.close()
    assert scanner.closed
    for use in (scanner.fileno, lambda: scanner.scan(memory, mask=PRESENT), lambda: scanner.entries(memory)):
        with pytest.raises(ClosedError):
            use()


def test_a_descriptor_stays_the_callers(memory: Mapping) -> None:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        with Scanner(fd=fd) as scanner:
            assert scanner.fileno() == fd
            assert scanner.entries(memory).shape == (64,)
        os.fstat(fd)
    finally:
        os.close(fd)


# --- entries -------------------------------------------------------------------------------------------------------


def test_entries(memory: Mapping) -> None:
    found = pagemap.entries(memory)
    assert (found.shape, found.dtype) == ((64,), np.uint64)
    expected = [page % 2 == 0 for page in range(64)]
    assert pagemap.has(found, PagemapBit.PRESENT).tolist() == expected
    assert pagemap.has(found, PagemapBit.EXCLUSIVE).tolist() == expected
    assert pagemap.present(memory).tolist() == expected
    assert not pagemap.has(found, PagemapBit.FILE).any()
    assert not pagemap.has(found, PagemapBit.SWAPPED | PagemapBit.PRESENT).any()
    assert (found[1::2] & np.uint64((1 << 55) - 1) == 0).all()
    with Mapping.memfd(2 * PAGE) as shared:
        write(shared, 0)
        assert pagemap.has(pagemap.entries(shared), PagemapBit.FILE | PagemapBit.PRESENT).tolist() == [
            True,
            False,
        ]


def test_entries_of_nothing(memory: Mapping) -> None:
    address = memory.address
    memory.unmap()
    assert not pagemap.entries(address, 64 * PAGE).any()


@pytest.mark.needs_feature("WP_UNPOPULATED")
def test_the_bit_of_protected_pages(memory: Mapping) -> None:
    with Userfaultfd(Feature.WP_UNPOPULATED) as uffd:
        uffd.register(memory, mode=RegisterMode.WP)
        assert not pagemap.protected(memory).any()
        uffd.writeprotect(memory, 4 * PAGE)
        found = pagemap.entries(memory, 6 * PAGE)
        assert pagemap.has(found, PagemapBit.UFFD_PROTECTED).tolist() == [True] * 4 + [False] * 2
        assert pagemap.has(found, PagemapBit.PRESENT).tolist() == [True, False] * 3
        # A page that is not there has a marker, which looks like one that was swapped out.
        assert pagemap.has(found, PagemapBit.SWAPPED).tolist() == [False, True, False, True, False, False]
        uffd.writeprotect(memory, 2 * PAGE, protect=False)
        assert pagemap.protected(memory, 6 * PAGE).tolist() == [False, False, True, True, False, False]
    assert not pagemap.protected(memory).any()


@scans
def test_swapped_pages(memory: Mapping) -> None:
    memory.madvise(Advice.PAGEOUT)
    found = pagemap.entries(memory)
    swapped = pagemap.has(found, PagemapBit.SWAPPED)
    with open("/proc/swaps") as swaps:
        if len(swaps.readlines()) < 2:
            assert not swapped.any()
    # The two views agree, wherever the pages are.
    assert (
        pages_of(pagemap.scan(memory, mask=PageCategory.SWAPPED), memory) == np.flatnonzero(swapped).tolist()
    )
    assert (swapped | pagemap.has(found, PagemapBit.PRESENT)).tolist() == [
        page % 2 == 0 for page in range(64)
    ]


def test_has_wants_all_of_the_bits() -> None:
    rows = np.array([[1 << 63, 1 << 62], [3 << 62, 0]], np.uint64)
    assert pagemap.has(rows, PagemapBit.PRESENT).tolist() == [[True, False], [True, False]]
    assert pagemap.has(rows, PagemapBit.PRESENT | PagemapBit.SWAPPED).tolist() == [
        [False, False],
        [True, False],
    ]
    assert pagemap.has(rows, PagemapBit(0)).all()


# --- flags ---------------------------------------------------------------------------------------------------------


def test_flags_of_registered_memory() -> None:
    with Userfaultfd() as uffd, small_pages(16, protection=3) as memory:
        assert not pagemap.vm_flags(memory.address)[0].registered
        uffd.register(memory.address + 4 * PAGE, 4 * PAGE, mode=RegisterMode.MISSING)
        uffd.register(memory.address + 8 * PAGE, 4 * PAGE, mode=RegisterMode.MISSING | RegisterMode.WP)
        found = pagemap.vm_flags(memory)
        low = [max(flags.start - memory.address, 0) // PAGE for flags in found]
        high = [min(flags.end - memory.address, 16 * PAGE) // PAGE for flags in found]
        assert list(zip(low, high, strict=True)) == [(0, 4), (4, 8), (8, 12), (12, 16)]
        assert [flags.missing for flags in found] == [False, True, True, False]
        assert [flags.write_protect for flags in found] == [False, False, True, False]
        assert [flags.registered for flags in found] == [False, True, True, False]
        assert not any(flags.minor or flags.read_write_protect for flags in found)
        assert {flags.permissions for flags in found} == {"rw-p"}
        (one,) = pagemap.vm_flags(memory.address + 8 * PAGE - 1)
        assert one == found[1]
        assert {"rd", "wr", "um"} <= one.flags
        assert [flags.start for flags in pagemap.vm_flags(one.start - 1, 2)] == [
            found[0].start,
            found[1].start,
        ]


@pytest.mark.needs_feature("MINOR_SHMEM")
def test_flags_of_a_file_in_memory() -> None:
    with Userfaultfd(Feature.MINOR_SHMEM) as uffd, Mapping.memfd(4 * PAGE, name="test flags") as memory:
        uffd.register(memory, mode=RegisterMode.MINOR)
        with Mapping.of_file(memory.fd, 2 * PAGE, offset=2 * PAGE) as second:
            (first,), (second_flags,) = pagemap.vm_flags(memory), pagemap.vm_flags(second)
        assert (first.minor, first.missing, first.registered) == (True, False, True)
        assert first.pathname == "/memfd:test flags (deleted)"
        assert (first.permissions, first.page_size, first.offset) == ("rw-s", PAGE, 0)
        assert (second_flags.offset, second_flags.registered) == (2 * PAGE, False)


def test_flags_of_nothing(memory: Mapping) -> None:
    address = memory.address
    memory.unmap()
    assert pagemap.vm_flags(address) == []
    assert pagemap.vm_flags(address, 64 * PAGE) == []


def test_flags_of_an_array() -> None:
    array = np.arange(100_000)
    found = pagemap.vm_flags(array)  # the allocator's own mappings may meet under it
    start, end = array.ctypes.data, array.ctypes.data + array.nbytes
    assert found[0].start <= start < found[0].end
    assert found[-1].start < end <= found[-1].end
    assert not any(flags.missing for flags in found)


# --- the module ----------------------------------------------------------------------------------------------------


def test_numpy_is_imported_with_the_first_result() -> None:
    program = """
        import sys
        from userfault.kernel import Mapping, pagemap
        with Mapping.anonymous(1 << 16) as memory:
            pagemap.vm_flags(memory)
            print("numpy" in sys.modules)
            pagemap.entries(memory)
            print("numpy" in sys.modules)
    """
    assert run_python(program).check().split() == ["False", "True"]
