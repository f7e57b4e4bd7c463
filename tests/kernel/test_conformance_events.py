"""The kernel's unit scenarios of events: a process that forks, moves and gives up its memory while it is served.

The scenarios and their numbers are those of the kernel's own `uffd-unit-tests`, listed in docs/kernel-api.md.
"""

from __future__ import annotations

import errno
import os

import pytest

from support.kernel import KINDS, Area, Link, in_child, make_area, next_event, subject
from support.kernel_facts import Job, ask
from support.kernel_scenarios import Handler, for_kinds, page_of, release_pages, spare_pages, whole_page
from userfault.kernel import FaultKind, Feature, Fork, PageFault, RegisterMode, Remap, Remove, Userfaultfd
from userfault.kernel.abi import FaultFlag, Request
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import Advice, MemoryKind

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
PAGES = 4


def _touch(area: Area, page: int) -> None:
    """Read a page that the handler fills, and write the same back."""
    content = whole_page(area, page)
    assert content == area.pattern(page)
    area.memory.write(page * area.page_size, content)


def _fault_move_and_release(area: Area, source: Area) -> int:
    """What the child does: fault on half of its pages, move all, fault on the rest, give them up; where they were."""
    half = (area.pages + 1) // 2
    for page in range(half):
        _touch(area, page)
    target = source.start
    assert area.memory.remap(to=source.memory).address == target
    for page in range(half, area.pages):
        _touch(area, page)
    # What was filled before has moved along.
    for page in range(half):
        assert whole_page(area, page) == area.pattern(page)
    release_pages(area)
    for page in range(area.pages):
        assert whole_page(area, page) == bytes(area.page_size)
    return area.start


def _fork_a_child_that_faults(link: Link, area: Area, source: Area, mode: RegisterMode) -> int:
    with Userfaultfd(Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE) as uffd:
        uffd.register(area.memory, mode=mode)
        link.send("registered", (uffd.fd,))
        assert link.receive() == "go on"
        address = in_child(_fault_move_and_release, area, source)
        assert isinstance(address, int)
        return address


class _Manager:
    """Serves the child from another process: what a page is to hold follows the memory to where it is moved."""

    def __init__(self, area: Area, mode: RegisterMode) -> None:
        self.area = area
        self.mode = mode
        self.moved_by = 0
        self.released: list[tuple[int, int]] = []

    def serve(self, uffd: Userfaultfd, event: AnyEvent) -> None:
        area = self.area
        match event:
            case Fork():
                pass
            case Remap(source, target, length):
                self.moved_by = target - source
                uffd.wake(source, length)
            case Remove(start, end):
                self.released.append((start, end))
                uffd.unregister(start, end - start)
            case PageFault(address, flags):
                if self.released:
                    # The child goes on as soon as the event is read, so it may be faster than `unregister`, which
                    # wakes it.
                    return
                page = page_of(area, address - self.moved_by)
                place = area.page(page) + self.moved_by
                if event.kind is FaultKind.WRITE_PROTECT:
                    assert flags == FaultFlag.WP | FaultFlag.WRITE
                    uffd.writeprotect(place, area.page_size, protect=False)
                else:
                    assert flags == FaultFlag(0)
                    protect = bool(self.mode & WP)
                    assert uffd.copy(place, area.pattern(page), write_protect=protect) == area.page_size
            case _:
                raise AssertionError(event)


def _check_events(kind: MemoryKind, mode: RegisterMode) -> None:
    with (
        make_area(kind, PAGES) as area,
        make_area(kind, PAGES) as source,
        spare_pages(kind, 2 * PAGES),
        subject(_fork_a_child_that_faults, area, source, mode) as process,
        process.receive_uffd() as uffd,
    ):
        manager = _Manager(area, mode)
        with Handler(uffd, manager.serve) as handler:
            process.send("go on")
            assert process.receive() == source.start
            assert process.wait() == 0
        faults = _with_shift(handler, area, source)
        faulted = [page_of(area, fault.address - shift) for fault, shift in faults]
        kinds = [fault.kind for fault, _ in faults]
        # Each page missed once, and the protected ones written to once.
        assert kinds.count(FaultKind.MISSING) == PAGES
        assert kinds.count(FaultKind.WRITE_PROTECT) == (PAGES if mode & WP else 0)
        assert sorted(set(faulted)) == list(range(PAGES))
        assert len(faulted) == (2 * PAGES if mode & WP else PAGES)
        assert [event for event in handler.events if not isinstance(event, PageFault)] == [
            Fork(handler.children[0]),
            Remap(area.start, source.start, area.length),
            Remove(source.start, source.start + area.length),
        ]
        assert manager.released == [(source.start, source.start + area.length)]


def _with_shift(handler: Handler, area: Area, source: Area) -> list[tuple[PageFault, int]]:
    """The faults until the memory is given up, each with how far it had been moved by then."""
    shift, found = 0, []
    for event in handler.events:
        if isinstance(event, Remove):
            break
        if isinstance(event, Remap):
            shift = source.start - area.start
        elif isinstance(event, PageFault):
            found.append((event, shift))
    return found


@pytest.mark.scenario(29)
@pytest.mark.needs_privilege("EVENT_FORK")
@for_kinds(*KINDS)
def test_events(kind: MemoryKind) -> None:
    """Scenario 29, events."""
    _check_events(kind, MISSING)


@pytest.mark.scenario(30)
@pytest.mark.needs_privilege("EVENT_FORK")
@pytest.mark.needs_feature("PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM")
@for_kinds(*KINDS)
def test_events_with_write_protection(kind: MemoryKind) -> None:
    """Scenario 30, events-wp."""
    _check_events(kind, MISSING | WP)


@pytest.mark.scenario(32)
@pytest.mark.needs_feature("EVENT_REMOVE", "MOVE", "POISON", "MINOR_SHMEM")
@for_kinds(MemoryKind.SHMEM)
def test_fills_while_the_address_space_changes(kind: MemoryKind) -> None:
    """Scenario 32, mmap-changing: the kernel says so before it looks at what it is asked."""
    changing = (errno.EAGAIN, -errno.EAGAIN)
    with make_area(kind, 2) as area, make_area(kind, 2) as other, Userfaultfd(Feature.EVENT_REMOVE) as uffd:
        uffd.register(area.memory, mode=MISSING | MINOR)
        with Job(area.memory.madvise, Advice.REMOVE) as job:
            job.blocks()
            assert uffd.poll(0)
            assert ask(uffd, Request.COPY, 0, 0, 0, 0, 1) == changing
            assert ask(uffd, Request.ZEROPAGE, 0, 0, 0, 1) == changing
            assert ask(uffd, Request.MOVE, 0, 0, 0, 0, 1) == changing
            assert ask(uffd, Request.POISON, 0, 0, 0, 1) == changing
            assert ask(uffd, Request.CONTINUE, 0, 0, 0, 1) == changing
            # Nothing done and EAGAIN: what a handler must take for "read first".
            again = (0, errno.EAGAIN)
            assert uffd.try_copy(area.memory, bytes(area.length)) == again
            assert uffd.try_zeropage(area.memory) == again
            assert uffd.try_move(area.memory, other.memory) == again
            assert uffd.try_poison(area.memory) == again
            assert uffd.try_continue(area.memory) == again
            assert not job.done
            assert next_event(uffd) == Remove(area.start, area.start + area.length)
            assert job.result() is None
        # And then they work again.
        assert uffd.copy(area.memory, area.pattern(0) + area.pattern(1)) == area.length
        assert area.memory.fd is not None
        assert os.pread(area.memory.fd, area.page_size, 0) == area.pattern(0)
