"""WRITEPROTECT (docs/kernel-api.md, 2.9). What unregistering does to it is in test_facts_register.py."""

from __future__ import annotations

import errno

import pytest

from support.kernel import (
    HUGE,
    HUGE_KINDS,
    KINDS,
    PAGE,
    Area,
    Link,
    Touch,
    in_child,
    make_area,
    next_event,
    protected,
    subject,
    waiters,
)
from support.kernel_facts import (
    Job,
    ask,
    ask_at,
    entry,
    exited_owner,
    kernel_writes,
    mapped_huge,
    registered,
    swap_out,
    vma,
)
from support.kernel_releases import documented
from support.kernel_scenarios import huge_area
from userfault.kernel import (
    FaultKind,
    Feature,
    Fork,
    OpenWay,
    PageFault,
    RegisterMode,
    Remap,
    Userfaultfd,
)
from userfault.kernel.abi import FaultFlag, PagemapBit, Request, WriteprotectMode
from userfault.kernel.errors import InvalidRequestError, NotRegisteredError, TargetExitedError
from userfault.kernel.mapping import Advice, Mapping, MemoryKind, Protection

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
PROTECT, DONTWAKE = WriteprotectMode.WP, WriteprotectMode.DONTWAKE
WRITE_PROTECTED = FaultFlag.WRITE | FaultFlag.WP

pytestmark = pytest.mark.fact("2.9")
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def marks(area: Area) -> list[bool]:
    """Which pages are protected, or marked to be."""
    return [protected(area.page(page)) for page in range(area.pages)]


def test_the_order_of_refusals() -> None:
    with exited_owner() as gone:
        fd, start = gone.uffd.fd, gone.start
        assert ask_at(fd, Request.WRITEPROTECT, 0) == errno.EFAULT
        assert ask(gone.uffd, Request.WRITEPROTECT, start + 1, PAGE, PROTECT).errno == errno.EINVAL
        assert ask(gone.uffd, Request.WRITEPROTECT, start, PAGE, 1 << 2).errno == errno.EINVAL
        assert ask(gone.uffd, Request.WRITEPROTECT, start, PAGE, PROTECT | DONTWAKE).errno == errno.EINVAL
        assert ask(gone.uffd, Request.WRITEPROTECT, start, PAGE, PROTECT).errno == errno.ESRCH
        with pytest.raises(TargetExitedError, match="exited"):
            gone.uffd.writeprotect(start, PAGE)
    with registered(mode=WP) as (area, uffd):
        uffd.writeprotect(
            area.memory, wake=False
        )  # protecting never wakes: ours is not the refused combination


def test_the_range_is_of_mappings_with_the_mode() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        assert ask(uffd, Request.WRITEPROTECT, area.start, PAGE, PROTECT).errno == errno.ENOENT
        uffd.register(area.memory)
        assert ask(uffd, Request.WRITEPROTECT, area.start, PAGE, PROTECT).errno == errno.ENOENT
        with pytest.raises(NotRegisteredError, match="not registered for WP"):
            uffd.writeprotect(area.memory)
        uffd.register(area.memory, mode=WP)
        area.memory.unmap(PAGE, PAGE)
        assert ask(uffd, Request.WRITEPROTECT, area.page(1), PAGE, PROTECT).errno == errno.ENOENT
        uffd.writeprotect(area.start, PAGE)
        uffd.writeprotect(area.page(2), 2 * PAGE)


def test_several_mappings() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.page(0), 2 * PAGE, mode=WP)
        uffd.register(area.page(2), PAGE, mode=MISSING)
        uffd.register(area.page(3), PAGE, mode=WP)
        answer = ask(uffd, Request.WRITEPROTECT, area.start, area.length, PROTECT).errno
        # What comes before the mapping without the mode is changed already.
        assert (answer, marks(area)) in documented("WRITEPROTECT of several mappings, one without the mode")
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        area.memory.unmap(PAGE, PAGE)
        answer = ask(uffd, Request.WRITEPROTECT, area.start, area.length, PROTECT).errno
        assert (answer, marks(area)) in documented("WRITEPROTECT over a hole")


@pytest.mark.parametrize("kind", HUGE_KINDS, ids=str)
def test_huge_pages_are_protected_whole(kind: MemoryKind) -> None:
    with registered(kind, 1, WP) as (area, uffd):
        for start, length in ((area.start, PAGE), (area.start + PAGE, HUGE - PAGE)):
            assert ask(uffd, Request.WRITEPROTECT, start, length, PROTECT).errno == errno.EINVAL
            with pytest.raises(InvalidRequestError):
                uffd.writeprotect(start, length)


@every_kind
def test_present_and_empty_pages(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd() as uffd:
        area.memory.write(0, b"there")
        uffd.register(area.memory, mode=WP)
        for _ in range(2):  # idempotent
            uffd.writeprotect(area.memory)
            # Empty anonymous pages are marked only with WP_UNPOPULATED.
            assert marks(area) == [True, kind is not ANONYMOUS]
        for _ in range(2):
            uffd.writeprotect(area.memory, protect=False)
            assert marks(area) == [False, False]


def test_any_userfaultfd_of_the_process_may_protect() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd, Userfaultfd() as other:
        area.populate()
        uffd.register(area.memory, mode=WP)
        other.writeprotect(area.memory)
        assert marks(area) == [True] * 4


@every_kind
def test_a_write_is_reported_until_the_protection_is_taken_away(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        assert area.head(1) == area.pattern(1)[:32]  # reading is free
        with Touch(area, 1, data=b"written"):
            assert next_event(uffd) == PageFault(area.page(1), WRITE_PROTECTED, 0)
            # To be woken is not enough.
            uffd.wake(area.memory)
            assert next_event(uffd) == PageFault(area.page(1), WRITE_PROTECTED, 0)
            uffd.writeprotect(area.memory, protect=False, wake=False)
            assert uffd.fdinfo().total == 1
            uffd.wake(area.memory)
        assert area.head(1)[:7] == b"written"


@pytest.mark.parametrize("data", [None, b"written"], ids=["read", "write"])
def test_a_missing_page_is_reported_as_missing_first_and_copied_as_copy_says(data: bytes | None) -> None:
    for write_protect in (False, True):
        with make_area(SHMEM) as area, Userfaultfd() as uffd:
            uffd.register(area.memory, mode=MISSING | WP)
            uffd.writeprotect(area.memory)
            assert protected(area.start)
            with Touch(area, data=data):
                flags = FaultFlag.WRITE if data else FaultFlag(0)
                assert next_event(uffd) == PageFault(area.start, flags, 0)
                uffd.copy(area.start, area.pattern(0), write_protect=write_protect)
                if data and write_protect:
                    assert next_event(uffd) == PageFault(area.start, WRITE_PROTECTED, 0)
                    uffd.writeprotect(area.start, PAGE, protect=False)
            assert protected(area.start) is (write_protect and not data)
            assert uffd.read_events() == []


@pytest.mark.needs_feature("WP_UNPOPULATED")
def test_an_empty_page_that_is_read_is_zeros_and_stays_protected() -> None:
    with registered(mode=WP, features=Feature.WP_UNPOPULATED) as (area, uffd):
        uffd.writeprotect(area.memory)
        assert area.head(0) == bytes(32)
        assert PagemapBit.PRESENT | PagemapBit.UFFD_PROTECTED in entry(area.start)
        with Touch(area, 0, data=b"written"), Touch(area, 1, data=b"written"):
            waiters(uffd, 2)
            faults = uffd.read_events()
            assert {fault.flags for fault in faults if isinstance(fault, PageFault)} == {WRITE_PROTECTED}
            uffd.writeprotect(area.memory, protect=False)


# --- what it outlives, and what not ---------------------------------------------------------------------------


@every_kind
def test_protection_outlives_mprotect(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        for protection in (Protection.NONE, Protection.READ, Protection.READ | Protection.WRITE):
            area.memory.protect(protection)
            assert protected(area.start)
        with Touch(area, data=b"written"):
            assert next_event(uffd) == PageFault(area.start, WRITE_PROTECTED, 0)
            uffd.writeprotect(area.memory, protect=False)


@every_kind
def test_protection_of_shared_memory_outlives_its_pages(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(optional=Feature.WP_UNPOPULATED) as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        area.drop(0, 1)
        # Of private memory the drop takes the marker too; private mappings of files count as files.
        assert protected(area.page(0)) is (kind is not ANONYMOUS)
        assert protected(area.page(1))
        if area.shared:
            area.memory.punch_hole(area.page_size, area.page_size)
            assert protected(area.page(1))
        if Feature.WP_UNPOPULATED in uffd.features and kind is ANONYMOUS:
            uffd.writeprotect(area.memory)
            assert protected(area.page(0))
            area.drop(0, 1)
            assert not protected(area.page(0))


def test_protection_outlives_swap() -> None:
    for kind in (ANONYMOUS, SHMEM):
        with make_area(kind) as area, Userfaultfd() as uffd:
            area.populate()
            uffd.register(area.memory, mode=WP)
            uffd.writeprotect(area.memory)
            swap_out(area)
            assert marks(area) == [True] * area.pages
            assert area.head(0) == area.pattern(0)[:32]
            assert protected(area.page(0))
            with Touch(area, 1, data=b"written"):
                assert next_event(uffd) == PageFault(area.page(1), WRITE_PROTECTED, 0)
                uffd.writeprotect(area.memory, protect=False)


@every_kind
def test_protection_ends_with_the_userfaultfd(kind: MemoryKind) -> None:
    kept = documented("protection after the end of the userfaultfd")
    with make_area(kind, 1) as area:
        area.populate()
        with Userfaultfd() as uffd:
            uffd.register(area.memory, mode=WP)
            uffd.writeprotect(area.memory)
            # Where a huge page keeps the protection, a write to it never ends, and is no message either.
            spins = kind in HUGE_KINDS and True in kept
            touches = [] if spins else [Touch(area, data=b"written")]
            waiters(uffd, len(touches))
        for touch in touches:
            touch.result()  # closing it let them go on
        assert protected(area.start) in kept
        if True in kept:
            with Userfaultfd() as uffd:  # the way out, better taken before
                uffd.register(area.memory, mode=WP)
                uffd.writeprotect(area.memory, protect=False)
        assert not protected(area.start)
        area.memory.write(0, b"written")


@pytest.mark.parametrize("features", [Feature(0), Feature.EVENT_REMAP], ids=["silent", "event"])
def test_protection_moves_with_the_memory_only_if_that_is_an_event(features: Feature) -> None:
    with (
        make_area(ANONYMOUS) as area,
        Mapping.anonymous(area.length) as target,
        Userfaultfd(features) as uffd,
    ):
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        before, after = area.start, target.address
        with Job(lambda: area.memory.remap(to=target)):
            if features:
                assert next_event(uffd) == Remap(before, after, area.length)
        assert area.start == after
        kept = (True,) if features else documented("protection of moved memory that nobody follows")
        assert protected(after) in kept
        assert len(set(marks(area))) == 1
        assert vma(after).write_protect is bool(features)


def _protect_and_fork(link: Link, area: Area) -> list[bool]:
    with Userfaultfd(optional=Feature.EVENT_FORK) as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        link.send(None, (uffd.fd,))
        return in_child(marks, area)  # type: ignore[no-any-return]


@pytest.mark.needs_privilege("EVENT_FORK")
@every_kind
def test_a_forked_child_has_the_protection_if_forks_are_events(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, subject(_protect_and_fork, area) as child, child.receive_uffd() as uffd:
        event = next_event(uffd)
        assert isinstance(event, Fork)
        event.child.close  # noqa: B018 - kept open until the child has looked
        assert child.receive() == [True]
        event.child.close()


@every_kind
def test_a_forked_child_has_no_protection_otherwise(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        (kept,) = in_child(marks, area)
        if kind is MemoryKind.PRIVATE_HUGETLB:
            assert kept in documented("protection in a forked child of private huge pages")
        else:
            assert not kept
        assert marks(area) == [True]


# --- transparent huge pages, and the kernel's own writes ------------------------------------------------------


def test_an_anonymous_huge_page_stays_whole_until_a_part_is_unprotected() -> None:
    with huge_area(1) as area, Userfaultfd() as uffd:
        area.memory.write(0, bytes(area.length))
        area.memory.madvise(Advice.COLLAPSE)
        assert mapped_huge(area.start)
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        assert mapped_huge(area.start)
        with Touch(area, 7, data=b"written"):
            assert next_event(uffd) == PageFault(area.page(7), WRITE_PROTECTED, 0)
            uffd.writeprotect(area.page(7), PAGE, protect=False)
        assert not mapped_huge(area.start)
        assert (protected(area.page(6)), protected(area.page(7))) == (True, False)


def test_a_huge_page_of_shared_memory_is_split() -> None:
    with huge_area(1) as sizes:
        size = sizes.length
    with Mapping.memfd(size, align=size) as memory, Userfaultfd() as uffd:
        memory.write(0, bytes(size))
        try:
            memory.madvise(Advice.COLLAPSE)
        except InvalidRequestError:
            pytest.skip("needs huge pages in shared memory")
        assert mapped_huge(memory.address)
        uffd.register(memory, mode=WP)
        uffd.writeprotect(memory)
        assert not mapped_huge(memory.address)


@pytest.mark.needs_kernel_faults
def test_the_kernels_own_writes_are_reported() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        with Job(kernel_writes, area.start + 3) as writing:
            assert next_event(uffd) == PageFault(area.start, WRITE_PROTECTED, 0)
            assert not writing.done
            uffd.writeprotect(area.memory, protect=False)
            assert writing.result() == 0


def test_the_kernels_own_writes_fail_user_mode_only() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(way=OpenWay.USER_MODE_ONLY) as uffd:
        area.populate()
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        assert kernel_writes(area.start) == errno.EFAULT
        assert uffd.read_events() == []
        with Touch(area, data=b"written"):
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.kind is FaultKind.WRITE_PROTECT
            uffd.writeprotect(area.memory, protect=False)
