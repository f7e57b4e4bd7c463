"""WP_ASYNC and PAGEMAP_SCAN (docs/kernel-api.md, 2.10).

Unchecked: EINTR by a fatal signal (whoever could see the answer is dead); kernels of the first 6.7 releases, whose two
code paths disagreed about empty pages. What pinned pages hide and what KSM reports is in test_facts_gotchas.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from support.kernel import HUGE, KINDS, PAGE, Area, in_child, make_area, protected
from support.kernel_facts import ask_at, kernel_writes, mapped_huge, ordinary_file
from support.kernel_releases import documented
from support.kernel_scenarios import huge_area
from support.rwp import write_mem_file
from userfault.kernel import Feature, RegisterMode, Userfaultfd, abi, pagemap
from userfault.kernel.abi import PageCategory, Request, ScanFlag
from userfault.kernel.errors import BadAddressError, InvalidRequestError, UffdPermissionError, UsageError
from userfault.kernel.mapping import Advice, Mapping, MemoryKind, Protection

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
WPALLOWED, WRITTEN, PRESENT = PageCategory.WPALLOWED, PageCategory.WRITTEN, PageCategory.PRESENT
FILE, PFNZERO, HUGE_PAGE = PageCategory.FILE, PageCategory.PFNZERO, PageCategory.HUGE
UNKNOWN = 1 << 40
FIELDS = dict.fromkeys(abi.SCAN_ARGUMENT.fields, 0)

pytestmark = [pytest.mark.fact("2.10"), pytest.mark.needs_linux("PAGEMAP_SCAN")]
needs_wp_async = pytest.mark.needs_feature("WP_ASYNC")
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


class Scanned(NamedTuple):
    """What a bare PAGEMAP_SCAN gave: the error number, how many regions, where it ended, and the regions in pages."""

    errno: int
    walk_end: int
    regions: list[tuple[int, int, int]]


def bare(start: int, end: int, *, room: int = 16, size: int = 96, **fields: int) -> Scanned:
    """Scan with nothing of ours in between."""
    vector = ctypes.create_string_buffer(24 * max(room, 1))
    given = {"vec": ctypes.addressof(vector) if room else 0, "vec_len": room, **fields}
    values = {**FIELDS, "size": size, "start": start, "end": end, "walk_end": 7, **given}
    argument = ctypes.create_string_buffer(abi.SCAN_ARGUMENT.pack(*values.values()), 96)
    pagemap_file = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        count = libc.ioctl(pagemap_file, ctypes.c_ulong(Request.PAGEMAP_SCAN), argument)
    finally:
        os.close(pagemap_file)
    number = ctypes.get_errno() if count < 0 else 0
    walk_end = abi.SCAN_ARGUMENT.decode(argument.raw)["walk_end"]
    found = [
        ((low - start) // PAGE, (high - start) // PAGE, categories)
        for low, high, categories in abi.PAGE_REGION.iter_unpack(vector.raw[: 24 * max(count, 0)])
    ]
    return Scanned(number, walk_end, found)


@contextlib.contextmanager
def tracked(
    kind: MemoryKind = ANONYMOUS, pages: int = 4, *, populate: bool = True
) -> Iterator[tuple[Area, Userfaultfd]]:
    """An area registered for WP asynchronously, every page protected."""
    with make_area(kind, pages) as area, Userfaultfd(Feature.WP_ASYNC) as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        yield area, uffd


def written(area: Area) -> list[int]:
    """The pages that were written since they were protected."""
    found = pagemap.scan(area.memory, mask=WRITTEN).mask()
    return [page for page in range(area.pages) if found[page * area.page_size // PAGE]]


# --- the arguments --------------------------------------------------------------------------------------------


def test_the_arguments() -> None:
    with make_area(ANONYMOUS) as area, open("/proc/self/pagemap", "rb") as file:
        start, end = area.start, area.start + area.length
        assert ask_at(file.fileno(), Request.PAGEMAP_SCAN, 0) == errno.EFAULT
        assert ask_at(file.fileno(), Request.API, 0) in (errno.EINVAL, errno.ENOTTY)
        for size in (0, 95, 104):
            assert bare(start, end, size=size).errno == errno.EINVAL
        assert bare(start, end, flags=1 << 2).errno == errno.EINVAL
        for name in ("category_inverted", "category_mask", "category_anyof_mask", "return_mask"):
            assert bare(start, end, **{name: UNKNOWN}).errno == errno.EINVAL
        assert bare(start + 1, end).errno == errno.EINVAL
        assert bare(start, end, room=0, vec_len=1).errno == errno.EINVAL
        assert bare(1 << 63, (1 << 63) + PAGE).errno == errno.EFAULT
        assert bare(start, end, vec=1 << 63).errno == errno.EFAULT
        # Ours: the same, but for what cannot be said with it.
        with pytest.raises(InvalidRequestError):
            pagemap.scan(area.memory, mask=PageCategory(UNKNOWN))
        with pytest.raises(BadAddressError):
            pagemap.scan(1 << 63, PAGE)
        with pytest.raises(UsageError, match=f"{start + 1:#x}"):
            pagemap.scan(start + 1, PAGE)


def test_a_vector_that_cannot_be_written() -> None:
    with make_area(ANONYMOUS) as area, Mapping.anonymous(PAGE, protection=Protection.READ) as vector:
        area.populate()
        found = bare(area.start, area.start + area.length, vec=vector.address, return_mask=PRESENT)
        assert found.errno == errno.EFAULT


def test_where_it_ends() -> None:
    with make_area(ANONYMOUS) as area:
        area.populate()
        start, end = area.start, area.start + area.length
        whole = bare(start, end - 100, category_mask=PRESENT, return_mask=PRESENT)
        assert whole == Scanned(0, end, [(0, 4, PRESENT)])  # the end is rounded up
        first = bare(start, end, max_pages=3, category_mask=PRESENT, return_mask=PRESENT)
        assert first == Scanned(0, area.page(3), [(0, 3, PRESENT)])
        area.drop(1, 1)
        # The vector is full after one region: not an error.
        full = bare(start, end, room=1, category_mask=PRESENT, return_mask=PRESENT)
        assert full.errno == 0
        assert full.regions == [(0, 1, PRESENT)]
        assert area.page(1) <= full.walk_end <= area.page(2)
        rest = bare(full.walk_end, end, room=1, category_mask=PRESENT, return_mask=PRESENT)
        assert [(low + (full.walk_end - start) // PAGE) for low, _, _ in rest.regions] == [2]
        # Without a vector it says only where it ended.
        assert bare(start, end, room=0, category_mask=PRESENT) == Scanned(0, end, [])
        # Ours goes on by itself.
        found = pagemap.scan(area.memory, mask=PRESENT, max_regions=1)
        assert found.ranges() == [(start, area.page(1)), (area.page(2), end)]
        assert found.complete


def test_which_pages_match() -> None:
    with make_area(ANONYMOUS) as area:
        area.memory.write(0, b"there")
        assert area.head(2) == bytes(32)  # maps the zero page
        start, end = area.start, area.start + area.length

        def match(**fields: int) -> list[int]:
            regions = bare(start, end, return_mask=PFNZERO, **fields).regions
            return [page for low, high, _ in regions for page in range(low, high)]

        assert match() == [0, 1, 2, 3]
        assert match(category_mask=PRESENT) == [0, 2]
        assert match(category_mask=PRESENT | PFNZERO) == [2]
        assert match(category_anyof_mask=PRESENT | PFNZERO) == [0, 2]
        assert match(category_mask=PRESENT, category_anyof_mask=PFNZERO | FILE) == [2]
        assert match(category_inverted=PRESENT, category_mask=PRESENT) == [1, 3]
        assert match(category_inverted=PFNZERO, category_mask=PRESENT | PFNZERO) == [0]
        assert match(category_inverted=PRESENT, category_anyof_mask=PRESENT | PFNZERO) == [1, 2, 3]


def test_neighbours_that_are_told_alike_are_one_region() -> None:
    with make_area(ANONYMOUS) as area:
        area.memory.write(0, b"there")
        area.head(1)
        area.memory.write(3 * PAGE, b"there")
        start, end = area.start, area.start + area.length
        assert bare(start, end, category_mask=PRESENT, return_mask=PRESENT).regions == [
            (0, 2, PRESENT),
            (3, 4, PRESENT),
        ]
        assert bare(start, end, category_mask=PRESENT, return_mask=PRESENT | PFNZERO).regions == [
            (0, 1, PRESENT),
            (1, 2, PRESENT | PFNZERO),
            (3, 4, PRESENT),
        ]


# --- what WRITTEN means ---------------------------------------------------------------------------------------


@needs_wp_async
@every_kind
def test_writes_are_noticed_without_a_handler(kind: MemoryKind) -> None:
    pages = 4 if kind not in (MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB) else 2
    with tracked(kind, pages) as (area, uffd):
        assert written(area) == []
        area.memory.write(area.page_size, b"written")
        assert area.head(0) == area.pattern(0)[:32]
        assert written(area) == [1]
        assert (protected(area.page(0)), protected(area.page(1))) == (True, False)
        assert uffd.read_events() == []
        assert uffd.fdinfo().total == 0
        # Protecting what is reported and reporting it are one step.
        again = pagemap.scan(area.memory, mask=WRITTEN, protect=True)
        assert again.ranges() == [(area.page(1), area.page(1) + area.page_size)]
        assert written(area) == []
        area.memory.write(0, b"written")
        assert written(area) == [0]
        # Taking the protection away works here too, and counts as written.
        uffd.writeprotect(area.memory, protect=False)
        assert written(area) == list(range(pages))


@needs_wp_async
@every_kind
def test_empty_pages_count_as_written_until_they_are_marked(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(Feature.WP_ASYNC) as uffd:
        area.memory.write(0, b"there")
        uffd.register(area.memory, mode=WP)
        huge = area.page_size == HUGE
        assert written(area) == ([0] if huge else [0, 1])
        uffd.writeprotect(area.memory)
        assert written(area) == []


@needs_wp_async
def test_memory_that_is_not_tracked() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(Feature.WP_ASYNC):
        area.memory.write(0, b"there")
        assert written(area) in documented("WRITTEN of memory that is not registered for WP")


def _touch_user(area: Area) -> None:
    area.memory.write(PAGE, b"x")


def _touch_kernel(area: Area) -> None:
    assert kernel_writes(area.page(1)) == 0


def _touch_mem_file(area: Area) -> None:
    assert write_mem_file(area.page(1), b"x") == 1


def _touch_process(area: Area) -> None:
    source = ctypes.create_string_buffer(b"x", 1)
    vectors = [(ctypes.c_ulong * 2)(address, 1) for address in (ctypes.addressof(source), area.page(1))]
    one = ctypes.c_ulong(1)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.process_vm_writev(os.getpid(), vectors[0], one, vectors[1], one, ctypes.c_ulong(0)) == 1


def _touch_drop(area: Area) -> None:
    area.drop(1, 1)


@needs_wp_async
@pytest.mark.parametrize(
    "touch",
    [_touch_user, _touch_kernel, _touch_mem_file, _touch_process, _touch_drop],
    ids=["store", "read(2)", "mem file", "process_vm_writev", "MADV_DONTNEED"],
)
def test_what_counts_as_a_write(touch: object) -> None:
    assert callable(touch)
    with tracked() as (area, _):
        touch(area)
        assert written(area) == [1]


@needs_wp_async
def test_direct_io_counts_as_a_write(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "direct"
    path.write_bytes(b"of the disk".ljust(PAGE))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        path.unlink()
        pytest.skip("needs O_DIRECT")
    try:
        with tracked() as (area, _):
            assert os.preadv(fd, [area.memory.view(PAGE, PAGE)], 0) == PAGE
            assert written(area) == [1]
    finally:
        os.close(fd)
        path.unlink()


@needs_wp_async
def test_what_is_written_elsewhere_does_not_count() -> None:
    with tracked(SHMEM) as (area, _):
        assert area.memory.fd is not None
        os.pwrite(area.memory.fd, b"through the file", 0)
        with area.memory.alias() as second:
            second.write(PAGE, b"through another mapping")
        in_child(area.memory.write, 2 * PAGE, b"in another process")
        assert written(area) == []
        assert [area.head(page)[:7] for page in range(3)] == [b"through", b"through", b"in anot"]


@needs_wp_async
def test_a_file_of_any_kind_is_tracked() -> None:
    with ordinary_file() as fd, Mapping.of_file(fd, 2 * PAGE, shared=False) as memory:
        area = Area(MemoryKind.FILE, memory, 2)
        with Userfaultfd(Feature.WP_ASYNC) as uffd:
            uffd.register(memory, mode=WP)
            uffd.writeprotect(memory)
            assert area.head(0) == os.pread(fd, 32, 0)
            assert written(area) == []
            memory.write(PAGE, b"written")
            assert written(area) == [1]


# --- PM_SCAN_WP_MATCHING --------------------------------------------------------------------------------------


@needs_wp_async
def test_only_what_matches_and_was_written_is_protected() -> None:
    with tracked() as (area, _):
        for page in (0, 2, 3):
            area.memory.write(page * PAGE, b"written")
        start, end = area.start, area.start + area.length
        found = bare(
            start, end, flags=ScanFlag.WP_MATCHING, max_pages=2, category_mask=WRITTEN, return_mask=WRITTEN
        )
        assert found == Scanned(0, area.page(3), [(0, 1, WRITTEN), (2, 3, WRITTEN)])
        assert written(area) == [3]
        # One that does not match is left alone.
        found = bare(start, end, flags=ScanFlag.WP_MATCHING, category_mask=WRITTEN | PFNZERO)
        assert found.regions == []
        assert written(area) == [3]


@needs_wp_async
def test_without_a_vector_everything_is_protected() -> None:
    with tracked() as (area, _):
        area.memory.write(0, b"written")
        end = area.start + area.length
        assert bare(area.start, end, room=0, flags=ScanFlag.WP_MATCHING, category_mask=FILE).errno == 0
        assert written(area) == []
        area.memory.write(0, b"written")
        pagemap.write_protect(area.memory)
        assert written(area) == []


@needs_wp_async
def test_who_is_passed_over_and_who_is_refused() -> None:
    protect, check = ScanFlag.WP_MATCHING, ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC
    with make_area(ANONYMOUS) as area, Userfaultfd(Feature.WP_ASYNC) as uffd, Userfaultfd() as sync:
        area.populate()
        start, end = area.start, area.start + area.length
        uffd.register(area.page(0), PAGE, mode=WP)
        sync.register(area.page(1), PAGE, mode=WP)
        assert bare(start, end, flags=protect, category_mask=WRITTEN).errno == 0
        assert [protected(area.page(page)) for page in range(4)] == [True, False, False, False]
        for page, number in ((0, 0), (1, errno.EPERM), (2, errno.EPERM)):
            assert bare(area.page(page), area.page(page + 1), flags=check).errno == number, page
        with pytest.raises(UffdPermissionError, match="not registered for WP with WP_ASYNC"):
            pagemap.scan(area.memory, mask=WRITTEN, protect=True, check_wpasync=True)
        allowed = pagemap.scan(area.memory, mask=WPALLOWED)
        assert allowed.ranges() == [(area.page(0), area.page(1))]
    with tracked() as (area, _):
        area.memory.unmap(PAGE, PAGE)
        assert bare(area.start, area.start + area.length, flags=check, category_mask=WRITTEN).errno == 0


@needs_wp_async
def test_transparent_huge_pages() -> None:
    with huge_area(1) as area, Userfaultfd(Feature.WP_ASYNC) as uffd:
        area.memory.write(0, bytes(area.length))
        area.memory.madvise(Advice.COLLAPSE)
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        assert pagemap.scan(area.memory, mask=HUGE_PAGE).pages == area.pages
        assert written(area) == []
        # One write splits it, and only the small page counts.
        area.memory.write(7 * PAGE, b"written")
        assert not mapped_huge(area.start)
        assert written(area) == [7]
    with huge_area(1) as area, Userfaultfd(Feature.WP_ASYNC) as uffd:
        area.memory.write(0, bytes(area.length))
        area.memory.madvise(Advice.COLLAPSE)
        uffd.register(area.memory, mode=WP)
        half = area.pages // 2
        found = pagemap.scan(area.start, half * PAGE, mask=WRITTEN, protect=True)
        assert found.pages == half
        assert not mapped_huge(area.start)
        assert written(area) == list(range(half, area.pages))


@needs_wp_async
def test_half_a_huge_page_is_not_protected() -> None:
    with make_area(MemoryKind.HUGETLB, 1) as area, Userfaultfd(Feature.WP_ASYNC) as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        half = area.start + HUGE // 2
        found = bare(area.start, half, flags=ScanFlag.WP_MATCHING, category_mask=WRITTEN, return_mask=WRITTEN)
        assert found == Scanned(0, area.start, [])
        assert not protected(area.start)
        whole = pagemap.scan(area.memory, mask=WRITTEN, protect=True)
        assert whole.pages == HUGE // PAGE
        assert protected(area.start)
