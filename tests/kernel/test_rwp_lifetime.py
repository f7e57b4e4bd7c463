"""What read-write protection outlives and what ends it: mprotect, zaps, mremap, fork, swap."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Iterator

import pytest

from support.kernel import (
    HUGE,
    PAGE,
    Area,
    Link,
    Touch,
    in_child,
    make_area,
    next_event,
    subject,
    waiters,
)
from support.kernel_facts import Job
from support.machine import KSM, exclusively
from support.rwp import (
    ASYNC,
    DIFFERENT_KINDS,
    SYNC,
    accessed,
    armed,
    entry,
    needs_swap,
    pool_kept,
    present_pages,
    protected_pages,
    read_waits,
    swap_out,
)
from support.waiting import wait_until
from userfault.kernel import Feature, Fork, Mapping, PageFault, RegisterMode, Remap, Userfaultfd, pagemap
from userfault.kernel.abi import FaultFlag, PageCategory, PagemapBit
from userfault.kernel.mapping import Advice, MemoryKind, Protection

pytestmark = [pytest.mark.fact("2.12"), pytest.mark.needs_feature("RWP", "RWP_ASYNC")]
kinds = pytest.mark.parametrize("kind", DIFFERENT_KINDS)
SMALL_KINDS = (MemoryKind.ANONYMOUS, MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM)
READ_WRITE = Protection.READ | Protection.WRITE


# --- mprotect ------------------------------------------------------------------------------------------------


@kinds
def test_protection_outlives_mprotect_of_a_part(kind: MemoryKind) -> None:
    with armed(kind, SYNC) as (area, uffd):
        for protection in (Protection.READ, Protection.NONE, READ_WRITE):
            area.memory.protect(protection, 0, area.page_size)
            assert protected_pages(area) == [True, True]
        for index in range(2):
            assert read_waits(area, uffd, index)


def _touch_none(link: Link, kind: MemoryKind) -> None:
    with armed(kind, SYNC) as (area, uffd):
        link.send(None, (uffd.fd,))
        faulthandler.disable()  # it would tell of the SIGSEGV, which is expected
        area.memory.protect(Protection.NONE, area.page_size, area.page_size)
        area.head(1)


@kinds
def test_memory_that_may_not_be_accessed_is_no_page_fault(kind: MemoryKind) -> None:
    with pool_kept(kind), subject(_touch_none, kind) as child, child.receive_uffd() as uffd:
        assert child.wait() == -signal.SIGSEGV
        assert uffd.read_events() == []


@kinds
def test_a_resolved_page_of_read_only_memory_is_read_only(kind: MemoryKind) -> None:
    with armed(kind, SYNC) as (area, uffd):
        area.memory.protect(Protection.READ)
        assert read_waits(area, uffd, 0)
        assert area.head(0) == area.pattern(0)[:32]
        (flags,) = pagemap.vm_flags(area.memory)
        assert flags.read_write_protect
        assert "wr" not in flags.flags


# --- pages that go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_zapped_pages_leave_no_mark(kind: MemoryKind) -> None:
    """Huge pages leave one: test_rwp_hugetlb.py."""
    with armed(kind, SYNC, pages=3) as (area, uffd):
        area.drop(0, 1)
        area.drop(1, 1)
        if area.memory.fd is not None:
            area.memory.punch_hole(PAGE, PAGE)
        assert [entry(area.page(index)) for index in range(2)] == [PagemapBit(0)] * 2
        assert accessed(area) == [False] * 3
        assert not read_waits(area, uffd, 0)
        assert not read_waits(area, uffd, 1)
        assert area.head(0) == (area.pattern(0)[:32] if area.shared else bytes(32))
        assert area.head(1) == bytes(32)
        assert accessed(area) == [True, True, False]


@pytest.mark.parametrize("kind", [MemoryKind.ANONYMOUS, MemoryKind.PRIVATE_SHMEM])
def test_protection_goes_to_swap_and_comes_back(kind: MemoryKind) -> None:
    needs_swap()
    swapped = PagemapBit.SWAPPED | PagemapBit.UFFD_PROTECTED
    with armed(kind, SYNC, pages=3) as (area, uffd):
        swap_out(area)
        assert [entry(area.page(index)) for index in range(3)] == [swapped] * 3
        assert accessed(area) == [False] * 3
        assert read_waits(area, uffd, 0)
        assert area.head(0) == area.pattern(0)[:32]
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert area.head(1) == area.pattern(1)[:32]
        assert accessed(area) == [True, True, False]
        assert protected_pages(area) == [False, False, True]


@pytest.mark.parametrize("kind", [MemoryKind.ANONYMOUS, MemoryKind.PRIVATE_SHMEM])
def test_pages_in_swap_are_protected_there(kind: MemoryKind) -> None:
    needs_swap()
    with armed(kind, SYNC) as (area, uffd):
        uffd.rwprotect(area.memory, protect=False)
        swap_out(area)
        assert [entry(area.page(index)) for index in range(2)] == [PagemapBit.SWAPPED] * 2
        assert accessed(area) == [True, True]
        uffd.rwprotect(area.start, PAGE)
        assert protected_pages(area) == [True, False]
        assert accessed(area) == [False, True]
        assert not read_waits(area, uffd, 1)
        assert read_waits(area, uffd, 0)
        assert area.head(0) == area.pattern(0)[:32]


def test_shared_memory_that_is_reclaimed_is_not_protected() -> None:
    """Neither accessed nor present: whoever counts pages must know."""
    needs_swap()
    with armed(MemoryKind.SHMEM, SYNC) as (area, uffd):

        def gone() -> bool:
            area.memory.madvise(Advice.PAGEOUT)
            return [entry(area.page(index)) for index in range(2)] == [PagemapBit(0)] * 2

        wait_until(gone, "the pages are reclaimed")
        assert accessed(area) == [False, False]
        assert not read_waits(area, uffd, 1)
        assert area.head(1) == area.pattern(1)[:32]


@contextlib.contextmanager
def _equal_pages_are_merged() -> Iterator[None]:
    settings = {"sleep_millisecs": "1", "pages_to_scan": "10000", "run": "1"}
    if not KSM.exists():
        pytest.skip("needs KSM")
    with exclusively(KSM / "run"):
        before = {name: (KSM / name).read_text() for name in settings}
        try:
            for name, value in settings.items():
                (KSM / name).write_text(value)
            yield
        finally:
            (KSM / "run").write_text("2")  # unmerge
            for name, value in before.items():
                (KSM / name).write_text(value)


@pytest.mark.fact("5.9")
@pytest.mark.needs_privilege("KSM")
def test_merged_pages_lose_it() -> None:
    """Pages that the kernel merges with equal ones count as accessed, and accesses to them are not reported."""
    with make_area(MemoryKind.ANONYMOUS, 8) as area, Userfaultfd(SYNC) as uffd:
        for index in range(8):
            area.memory.write(index * PAGE, b"equal to all others" * 200)
        uffd.register(area.memory, mode=RegisterMode.RWP)
        uffd.rwprotect(area.memory)
        area.memory.madvise(Advice.MERGEABLE)
        with _equal_pages_are_merged():
            # One of them is the page that the others become, and keeps its own.
            wait_until(lambda: protected_pages(area).count(True) == 1, "the pages are merged")
            assert accessed(area) == [not kept for kept in protected_pages(area)]
            assert not read_waits(area, uffd, protected_pages(area).index(False))


# --- mremap --------------------------------------------------------------------------------------------------


def _place_for(area: Area) -> Mapping:
    return Mapping.anonymous(area.length, align=HUGE, noreserve=True, protection=Protection.NONE)


@pytest.mark.fact("4.4")
@kinds
def test_a_move_that_is_not_followed_ends_it(kind: MemoryKind) -> None:
    with armed(kind, SYNC) as (area, uffd), _place_for(area) as place:
        area.memory.remap(to=place)
        assert protected_pages(area) == [False, False]
        assert present_pages(area) == [True, True]
        (flags,) = pagemap.vm_flags(area.memory)
        assert not flags.read_write_protect
        assert not read_waits(area, uffd, 1)
        assert area.head(0) == area.pattern(0)[:32]


@kinds
def test_a_move_that_is_followed_keeps_it(kind: MemoryKind) -> None:
    with armed(kind, SYNC | Feature.EVENT_REMAP) as (area, uffd), _place_for(area) as place:
        source, target = area.start, place.address
        with Job(lambda: area.memory.remap(to=place)):
            assert next_event(uffd) == Remap(source, target, area.length)
        assert area.start == target
        assert protected_pages(area) == [True, True]
        assert read_waits(area, uffd, 1)
        assert area.head(1) == area.pattern(1)[:32]


@pytest.mark.fact("4.4")
def test_what_a_move_leaves_behind_is_registered() -> None:
    with armed(MemoryKind.ANONYMOUS, SYNC) as (area, uffd), area.memory.remap(dontunmap=True) as moved:
        (left,), (gone,) = pagemap.vm_flags(area.memory), pagemap.vm_flags(moved)
        assert left.read_write_protect
        assert not gone.read_write_protect
        assert moved.read(PAGE, 32) == area.pattern(1)[:32]
        assert present_pages(area) == protected_pages(area) == [False, False]
        area.populate()
        uffd.rwprotect(area.memory)
        assert read_waits(area, uffd, 1)


# --- fork ----------------------------------------------------------------------------------------------------


def _look(area: Area) -> tuple[list[bool], list[bytes]]:
    return protected_pages(area), [area.head(index) for index in range(area.pages)]


@pytest.mark.fact("4.4")
@kinds
def test_a_fork_that_is_not_followed_is_not_protected(kind: MemoryKind) -> None:
    with armed(kind, SYNC) as (area, uffd):
        contents = [area.pattern(index)[:32] for index in range(2)]
        assert in_child(_look, area) == ([False, False], contents)
        assert protected_pages(area) == [True, True]
        assert uffd.read_events() == []
        assert read_waits(area, uffd, 1)


def _fork_and_read(link: Link, kind: MemoryKind) -> tuple[object, list[bool]]:
    with armed(kind, SYNC | Feature.EVENT_FORK) as (area, uffd):
        link.send(area.page(1), (uffd.fd,))
        return in_child(lambda: (area.head(1), protected_pages(area))), protected_pages(area)


@pytest.mark.needs_privilege("EVENT_FORK")
@kinds
def test_a_fork_that_is_followed_is_served_apart(kind: MemoryKind) -> None:
    with pool_kept(kind), subject(_fork_and_read, kind) as child:
        address, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            event = next_event(uffd)
            assert isinstance(event, Fork)
            with event.child as forked:
                assert forked.features == uffd.features
                fault = next_event(forked)
                assert fault == PageFault(address, FaultFlag.RWP, 0)
                page_size = HUGE if "hugetlb" in kind else PAGE
                forked.rwprotect(address, page_size, protect=False)
                content = b"page      1 of this area. ".ljust(32, b".")
                assert child.receive() == ((content, [True, False]), [True, True])
            assert uffd.read_events() == []


def test_a_scan_of_another_process() -> None:
    with armed(MemoryKind.ANONYMOUS, ASYNC) as (area, _), subject(lambda link: link.receive()) as child:
        found = pagemap.scan(area.start, area.length, pid=child.pid, mask=PageCategory.PRESENT)
        assert found.pages == 2
        # The child's memory is not registered: nothing of it counts as accessed.
        found = pagemap.scan(area.start, area.length, pid=child.pid, mask=PageCategory.ACCESSED)
        assert found.pages == 0
        child.send("end")
        assert child.wait() == 0
    with subject(_be_scanned) as child:
        start = child.receive()
        found = pagemap.scan(start, 2 * PAGE, pid=child.pid, mask=PageCategory.ACCESSED)
        assert found.ranges() == [(start + PAGE, start + 2 * PAGE)]
        child.send("end")
        assert child.wait() == 0


def _be_scanned(link: Link) -> None:
    with armed(MemoryKind.SHMEM, ASYNC) as (area, _):
        area.head(1)
        link.send(area.start)
        link.receive()


def test_someone_who_waits_when_it_is_closed_goes_on() -> None:
    with armed(MemoryKind.PRIVATE_SHMEM, SYNC) as (area, uffd):
        touches = [Touch(area, 0), Touch(area, 1, data=b"x")]
        waiters(uffd, 2)
        uffd.close()
        assert [touch.result() for touch in touches] == [area.pattern(0)[:32], b"x"]
