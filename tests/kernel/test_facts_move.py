"""MOVE (docs/kernel-api.md, 2.11). What pins and KSM do to it is in test_facts_gotchas.py.

Unchecked: large folios in the swap cache and migration entries (nothing in a process brings them about on demand);
shadow stacks; that translations of devices are flushed; soft-dirty marks (few kernels are built with them).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import pytest

from support.kernel import PAGE, Area, Link, Touch, in_child, make_area, next_event, protected, subject
from support.kernel_facts import (
    UNTOUCHED,
    Answer,
    ask,
    ask_at,
    bytes_at,
    entry,
    exited_owner,
    mapped_huge,
    registered,
    swap_out,
)
from support.kernel_scenarios import huge_area, whole_page
from userfault.kernel import FaultKind, Feature, Outcome, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import PagemapBit, Request
from userfault.kernel.errors import (
    BadAddressError,
    InvalidRequestError,
    NotRegisteredError,
    PageExistsError,
    RangeBusyError,
)
from userfault.kernel.mapping import Advice, MemoryKind, Protection

ANONYMOUS = MemoryKind.ANONYMOUS
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
NO_FEATURES = Feature(0)
HOLES = 2  # UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
INVALID = Answer(errno.EINVAL, -errno.EINVAL)
REFUSED = Answer(errno.EINVAL, UNTOUCHED)
EXISTS = Answer(errno.EEXIST, -errno.EEXIST)
NOT_FOUND = Answer(errno.ENOENT, -errno.ENOENT)
BUSY = Answer(errno.EBUSY, -errno.EBUSY)

pytestmark = [pytest.mark.fact("2.11"), pytest.mark.needs_feature("MOVE")]


@contextlib.contextmanager
def stash_and_area(
    mode: RegisterMode = MISSING, features: Feature = NO_FEATURES
) -> Iterator[tuple[Area, Area, Userfaultfd]]:
    """A full area that is not registered, and an empty one that is."""
    with (
        registered(mode=mode, features=features) as (area, uffd),
        make_area(ANONYMOUS) as stash,
    ):
        stash.memory.madvise(Advice.DONTFORK)
        stash.populate()
        yield stash, area, uffd


def move(uffd: Userfaultfd, target: int, source: int, length: int = PAGE, mode: int = 0) -> Answer:
    return ask(uffd, Request.MOVE, target, source, length, mode)


def test_the_page_goes_over_without_a_copy() -> None:
    with stash_and_area() as (stash, area, uffd):
        frame = _frame(stash.start)
        with Touch(area) as touch:
            next_event(uffd)
            assert uffd.move(area.start, stash.start, PAGE) == PAGE
            assert touch.result() == stash.pattern(0)[:32]
        assert whole_page(area, 0) == stash.pattern(0)
        assert _frame(area.start) == frame
        assert PagemapBit.PRESENT not in entry(stash.start)
        assert stash.head(0) == bytes(32)
        area.memory.write(0, b"writable")
        assert uffd.read_events() == []


def _frame(address: int) -> int:
    """The number of the page's frame; 0 for those who may not know it."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        return int.from_bytes(file.read(8), "little") & ((1 << 55) - 1)


def test_a_source_that_is_registered_is_missing_again() -> None:
    with stash_and_area() as (stash, area, uffd):
        uffd.register(stash.memory)
        uffd.move(area.start, stash.start, PAGE)
        with Touch(stash):
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert (event.kind, event.address) == (FaultKind.MISSING, stash.start)
            uffd.move(stash.start, area.start, PAGE)  # and back
        assert stash.head(0) == stash.pattern(0)[:32]


# --- refusals -------------------------------------------------------------------------------------------------


def test_the_arguments() -> None:
    with stash_and_area() as (stash, area, uffd):
        assert ask_at(uffd.fd, Request.MOVE, 0) == errno.EFAULT
        assert move(uffd, area.start + 1, stash.start) == REFUSED
        assert move(uffd, area.start, stash.start + 1) == REFUSED
        assert move(uffd, area.start, stash.start, mode=1 << 2) == REFUSED


def test_only_the_owner_itself_can_move() -> None:
    with stash_and_area() as (stash, area, uffd):
        # A child's memory is another one, whatever it inherited; this comes before all other checks.
        for answer in in_child(lambda: [move(uffd, area.start, stash.start), move(uffd, 1, 1, 0, 1 << 40)]):
            assert answer == REFUSED
        assert in_child(uffd.try_move, area.start, stash.start, PAGE) == Outcome(0, errno.EINVAL)
    with exited_owner() as gone, make_area(ANONYMOUS) as source:
        assert move(gone.uffd, gone.start, source.start) == REFUSED  # not ESRCH
        with pytest.raises(InvalidRequestError, match="of the calling process"):
            gone.uffd.move(gone.start, source.start, PAGE)


def test_both_ends_are_one_mapping() -> None:
    with stash_and_area() as (stash, area, uffd):
        assert move(uffd, stash.page(1), stash.start) == INVALID  # the target is not registered
        with pytest.raises(InvalidRequestError, match="registered with this userfaultfd"):
            uffd.move(stash.page(1), stash.start, PAGE)
        area.memory.unmap(3 * PAGE, PAGE)
        assert move(uffd, area.page(3), stash.start) == NOT_FOUND
        stash.memory.unmap(3 * PAGE, PAGE)
        assert move(uffd, area.start, stash.page(3)) == NOT_FOUND
        with pytest.raises(NotRegisteredError):
            uffd.move(area.start, stash.page(3), PAGE)
        # Across the end of either.
        assert move(uffd, area.page(2), stash.start, 2 * PAGE) == INVALID
        assert move(uffd, area.page(0), stash.page(2), 2 * PAGE) == INVALID


def test_both_ends_are_alike() -> None:
    with stash_and_area() as (stash, area, uffd):
        stash.memory.protect(Protection.READ)
        assert move(uffd, area.start, stash.start) == INVALID
        area.memory.protect(Protection.READ)
        assert move(uffd, area.start, stash.start) == INVALID  # nor without the right to write
        for memory in (stash.memory, area.memory):
            memory.protect(Protection.READ | Protection.WRITE)
        stash.memory.mlock(on_fault=True)
        assert move(uffd, area.start, stash.start) == INVALID
        area.memory.mlock(on_fault=True)
        assert move(uffd, area.start, stash.start) == Answer(0, PAGE)


def test_the_target_is_registered_with_this_very_userfaultfd_in_any_mode() -> None:
    with stash_and_area(WP) as (stash, area, uffd), Userfaultfd() as other:
        assert move(other, area.start, stash.start) == INVALID
        assert move(uffd, area.start, stash.start) == Answer(0, PAGE)


@pytest.mark.parametrize("kind", [MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM, MemoryKind.HUGETLB], ids=str)
def test_only_anonymous_memory_moves(kind: MemoryKind) -> None:
    with make_area(kind, 1) as other, registered(kind, 1) as (area, uffd):
        other.populate()
        assert move(uffd, area.start, other.start, area.page_size) == INVALID
        with pytest.raises(InvalidRequestError, match="private anonymous memory"):
            uffd.move(area.memory, other.memory)
    with stash_and_area() as (stash, anonymous, uffd), make_area(kind, 1) as other:
        other.populate()
        assert move(uffd, anonymous.start, other.start) == INVALID  # even of a page that is a private copy
        if kind is not MemoryKind.HUGETLB:
            uffd.register(other.memory)
            other.drop()
            assert move(uffd, other.start, stash.start) == INVALID


# --- page by page ---------------------------------------------------------------------------------------------


def test_a_target_that_is_there_stays() -> None:
    with stash_and_area(MISSING | WP, Feature.WP_UNPOPULATED) as (stash, area, uffd):
        uffd.copy(area.page(0), area.pattern(2))
        uffd.writeprotect(area.page(1), PAGE)  # a marker
        uffd.poison(area.page(2), PAGE)
        for page in range(3):
            assert move(uffd, area.page(page), stash.page(page)) == EXISTS
        with pytest.raises(PageExistsError):
            uffd.move(area.start, stash.start, PAGE)
        assert move(uffd, area.page(3), stash.page(3)) == Answer(0, PAGE)
        assert stash.head(0) == stash.pattern(0)[:32]


def test_holes_of_the_source() -> None:
    with stash_and_area() as (stash, area, uffd):
        stash.drop(1, 1)
        assert move(uffd, area.start, stash.start, 4 * PAGE) == Answer(errno.EAGAIN, PAGE)
        assert move(uffd, area.page(1), stash.page(1), 3 * PAGE) == NOT_FOUND
        with pytest.raises(NotRegisteredError, match="the source has a hole"):
            uffd.move(area.page(1), stash.page(1), PAGE)
        assert uffd.move(area.page(1), stash.page(1), 3 * PAGE, allow_holes=True) == 3 * PAGE
        assert PagemapBit.PRESENT not in entry(area.page(1))  # counted, and still missing
        assert area.head(3) == stash.pattern(3)[:32]


def test_a_marker_in_the_source() -> None:
    with stash_and_area(features=Feature.WP_UNPOPULATED) as (stash, area, uffd):
        stash.drop(0, 1)
        uffd.register(stash.memory, mode=WP)
        uffd.writeprotect(stash.start, PAGE)
        for mode in (0, HOLES):
            assert move(uffd, area.start, stash.start, mode=mode) == Answer(errno.EFAULT, -errno.EFAULT)
        with pytest.raises(BadAddressError):
            uffd.move(area.start, stash.start, PAGE, allow_holes=True)


def test_write_protection_stays_behind() -> None:
    with stash_and_area(MISSING | WP) as (stash, area, uffd):
        uffd.register(stash.memory, mode=WP)
        uffd.writeprotect(stash.memory)
        assert protected(stash.start)
        uffd.move(area.start, stash.start, PAGE)
        assert not protected(area.start)
        area.memory.write(0, b"nobody is told")
        assert uffd.read_events() == []


def test_zero_pages_move() -> None:
    with stash_and_area() as (_, area, uffd), make_area(ANONYMOUS) as empty:
        assert empty.head(0) == bytes(32)
        assert move(uffd, area.start, empty.start) == Answer(0, PAGE)
        assert PagemapBit.PRESENT in entry(area.start)
        assert area.head(0) == bytes(32)


def _hold(link: Link) -> None:
    link.receive()


def test_pages_that_a_child_shares_are_busy_until_they_are_written() -> None:
    with registered() as (area, uffd), make_area(ANONYMOUS) as stash:
        stash.populate()
        with subject(_hold) as child:
            assert move(uffd, area.start, stash.start) == BUSY
            with pytest.raises(RangeBusyError, match="copy it, then drop the source"):
                uffd.move(area.start, stash.start, PAGE)
            child.send("end")
            child.receive()
            child.wait()
        assert move(uffd, area.start, stash.start) == BUSY  # the child is gone
        stash.memory.write(0, b"written")
        assert move(uffd, area.start, stash.start) == Answer(0, PAGE)
        assert area.head(0)[:7] == b"written"


def test_a_source_that_children_do_not_get_stays_movable() -> None:
    with stash_and_area() as (stash, area, uffd), subject(_hold) as child:
        assert move(uffd, area.start, stash.start) == Answer(0, PAGE)
        child.send("end")
        child.receive()


def test_partial_progress() -> None:
    with stash_and_area() as (stash, area, uffd):
        uffd.copy(area.page(2), bytes(PAGE))
        assert uffd.try_move(area.start, stash.start, 4 * PAGE) == Outcome(2 * PAGE, errno.EAGAIN)
        assert uffd.try_move(area.page(2), stash.page(2), 2 * PAGE) == Outcome(0, errno.EEXIST)
        assert [PagemapBit.PRESENT in entry(stash.page(page)) for page in range(4)] == [
            False,
            False,
            True,
            True,
        ]


def test_pages_in_swap_move() -> None:
    with stash_and_area() as (stash, area, uffd):
        swap_out(stash)
        assert uffd.move(area.start, stash.start, 4 * PAGE) == 4 * PAGE
        assert [area.head(page) for page in range(4)] == [stash.pattern(page)[:32] for page in range(4)]


# --- transparent huge pages -----------------------------------------------------------------------------------


@contextlib.contextmanager
def huge_stash() -> Iterator[Area]:
    with huge_area(1) as stash:
        stash.memory.write(0, b"huge".ljust(stash.length, b"!"))
        stash.memory.madvise(Advice.COLLAPSE)
        assert mapped_huge(stash.start)
        yield stash


def test_a_huge_page_moves_whole() -> None:
    with huge_stash() as stash, huge_area(1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        uffd.move(area.memory, stash.start)
        assert mapped_huge(area.start)
        assert bytes_at(area.start + area.length - 32) == b"!" * 32


def test_or_is_split_where_it_does_not_fit() -> None:
    with huge_stash() as stash, huge_area(1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        uffd.move(area.page(8), stash.page(8), PAGE)
        assert not mapped_huge(stash.start)
        assert not mapped_huge(area.start)
        assert area.head(8) == b"!" * 32
        assert stash.head(9) == b"!" * 32


def test_but_not_while_a_child_shares_it() -> None:
    with huge_stash() as stash, huge_area(1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        with subject(_hold) as child:
            assert move(uffd, area.page(8), stash.page(8)) == BUSY
            child.send("end")
            child.receive()


def test_a_part_that_a_child_shared_is_refused_until_it_is_cut_off() -> None:
    """Whether a page is this process's alone is asked of the first page of the folio that it is in."""
    with huge_stash() as stash, huge_area(1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        stash.memory.madvise(Advice.DONTDUMP, 8 * PAGE, 8 * PAGE)  # now it is mapped in small pages
        assert not mapped_huge(stash.start)
        with subject(_hold) as child:
            child.send("end")
            child.receive()
            child.wait()
        assert move(uffd, area.page(8), stash.page(8)) == BUSY
        frame = _frame(stash.page(8))
        stash.memory.write(8 * PAGE, b"mine")
        # Before Linux 6.15 a write copies it, and that is a page of its own.
        if _frame(stash.page(8)) == frame:
            assert move(uffd, area.page(8), stash.page(8)) == BUSY
            stash.memory.madvise(Advice.COLD, 8 * PAGE, PAGE)
        assert move(uffd, area.page(8), stash.page(8)) == Answer(0, PAGE)
        assert bytes_at(area.page(8))[:4] == b"mine"
