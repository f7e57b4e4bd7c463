"""Accesses to read-write-protected pages: their messages, what resolves them, and who is woken."""

from __future__ import annotations

import threading

import pytest

from support.kernel import KINDS, PAGE, Area, Touch, make_area, next_event, waiters
from support.kernel_facts import ask
from support.rwp import ASYNC, DIFFERENT_KINDS, SYNC, accessed, armed, entry, present_pages, protected_pages
from userfault.kernel import Feature, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import FaultFlag, PagemapBit, Request
from userfault.kernel.mapping import MemoryKind

pytestmark = [pytest.mark.fact("2.12"), pytest.mark.needs_feature("RWP", "RWP_ASYNC")]
every_kind = pytest.mark.parametrize("kind", KINDS)
kinds = pytest.mark.parametrize("kind", DIFFERENT_KINDS)
READ = FaultFlag.RWP
WRITE = FaultFlag.RWP | FaultFlag.WRITE


def remove(area: Area, index: int) -> None:
    """Give a page up, so that it is missing next."""
    area.drop(index, 1)
    if area.memory.fd is not None:
        # A private write to a file in memory has left an empty page in the file, too.
        area.memory.punch_hole(index * area.page_size, area.page_size)


@kinds
def test_waking_alone_brings_the_message_again(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd), Touch(area, 1) as touch:
        for _ in range(3):
            assert next_event(uffd) == PageFault(area.page(1), READ, 0)
            assert uffd.read_events() == []
            uffd.wake(area.page(1), area.page_size)
        assert next_event(uffd) == PageFault(area.page(1), READ, 0)
        uffd.rwprotect(area.memory, protect=False)
        assert touch.result() == area.pattern(1)[:32]


@kinds
def test_resolving_without_waking(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd), Touch(area, 1) as touch:
        waiters(uffd, 1)
        uffd.rwprotect(area.memory, protect=False, wake=False)
        assert protected_pages(area) == [False, False]
        assert uffd.fdinfo().total == 1
        uffd.wake(area.memory)
        assert touch.result() == area.pattern(1)[:32]
        # It was resolved before the message was read, so there is none any more.
        assert uffd.read_events() == []


def test_protecting_wakes_nobody() -> None:
    with armed(MemoryKind.ANONYMOUS) as (area, uffd), Touch(area):
        waiters(uffd, 1)
        uffd.rwprotect(area.memory)
        assert uffd.fdinfo().total == 1
        uffd.rwprotect(area.memory, protect=False)


@kinds
def test_one_request_wakes_all_who_wait_in_its_range(kind: MemoryKind) -> None:
    with armed(kind, pages=3) as (area, uffd):
        touches = [Touch(area, 0), Touch(area, 0, data=b"x", offset=64), Touch(area, 1), Touch(area, 2)]
        waiters(uffd, 4)
        events = [next_event(uffd) for _ in touches]
        assert all(isinstance(event, PageFault) for event in events)
        assert sorted((event.address, event.flags) for event in events) == [
            (area.start, READ),
            (area.start, WRITE),
            (area.page(1), READ),
            (area.page(2), READ),
        ]
        uffd.rwprotect(area.start, 2 * area.page_size, protect=False)
        for touch in touches[:3]:
            touch.result()
        assert uffd.fdinfo().total == 1
        uffd.rwprotect(area.page(2), area.page_size, protect=False)
        assert touches[3].result() == area.pattern(2)[:32]


@pytest.mark.needs_feature("RWP", "EXACT_ADDRESS", "THREAD_ID")
@kinds
def test_exact_addresses_and_threads(kind: MemoryKind) -> None:
    with armed(kind, SYNC | Feature.EXACT_ADDRESS | Feature.THREAD_ID) as (area, uffd):
        threads: list[int] = []

        def touch() -> None:
            threads.append(threading.get_native_id())
            area.memory.read(area.page_size + 1234, 1)

        thread = threading.Thread(target=touch)
        thread.start()
        event = next_event(uffd)
        assert event == PageFault(area.page(1) + 1234, READ, threads[0])
        uffd.rwprotect(area.memory, protect=False)
        thread.join()


@every_kind
def test_a_page_given_up_while_someone_waits_is_missing(kind: MemoryKind) -> None:
    with armed(kind, mode=RegisterMode.RWP | RegisterMode.MISSING) as (area, uffd), Touch(area, 1) as touch:
        assert next_event(uffd) == PageFault(area.page(1), READ, 0)
        remove(area, 1)
        assert uffd.fdinfo().total == 1
        uffd.wake(area.page(1), area.page_size)
        assert next_event(uffd) == PageFault(area.page(1), FaultFlag(0), 0)
        uffd.copy(area.page(1), bytes(reversed(area.pattern(1))))
        assert touch.result() == bytes(reversed(area.pattern(1)))[:32]
        assert present_pages(area) == [True, True]
        assert protected_pages(area) == [True, False]


@every_kind
def test_a_page_given_up_while_someone_waits_without_missing(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd), Touch(area, 1) as touch:
        assert next_event(uffd) == PageFault(area.page(1), READ, 0)
        area.drop(1, 1)
        assert uffd.fdinfo().total == 1
        uffd.wake(area.page(1), area.page_size)
        # Shared memory has it in its file still.
        assert touch.result() == (area.pattern(1)[:32] if area.shared else bytes(32))
        assert uffd.read_events() == []


@pytest.mark.needs_feature("RWP", "MOVE")
def test_a_page_moved_away_while_someone_waits() -> None:
    """Evicted and brought back: the one who waits gets a message of each kind."""
    modes = RegisterMode.RWP | RegisterMode.MISSING
    with make_area(MemoryKind.ANONYMOUS, 1) as stash, armed(MemoryKind.ANONYMOUS, mode=modes) as (area, uffd):
        uffd.register(stash.memory, mode=RegisterMode.MISSING)
        with Touch(area, 1) as touch:
            assert next_event(uffd) == PageFault(area.page(1), READ, 0)
            uffd.move(stash.start, area.page(1), PAGE)
            uffd.wake(area.page(1), PAGE)
            assert next_event(uffd) == PageFault(area.page(1), FaultFlag(0), 0)
            uffd.move(area.page(1), stash.start, PAGE)  # wakes, and protects
            assert next_event(uffd) == PageFault(area.page(1), READ, 0)
            uffd.rwprotect(area.page(1), PAGE, protect=False)
            assert touch.result() == area.pattern(1)[:32]


@kinds
def test_async_accesses_clear_the_mark(kind: MemoryKind) -> None:
    with armed(kind, ASYNC, pages=3) as (area, uffd):
        assert area.head(1) == area.pattern(1)[:32]
        assert protected_pages(area) == [True, False, True]
        area.memory.write(2 * area.page_size, b"a write counts too")
        assert protected_pages(area) == [True, False, False]
        assert accessed(area) == [False, True, True]
        assert entry(area.page(1)) == PagemapBit.PRESENT
        assert (uffd.read_events(), uffd.fdinfo().total) == ([], 0)
        assert area.head(2).startswith(b"a write counts too")


@kinds
def test_unregistering_gives_the_pages_back(kind: MemoryKind) -> None:
    with armed(kind) as (area, uffd):
        uffd.unregister(area.memory)
        assert protected_pages(area) == [False, False]
        assert present_pages(area) == [True, True]
        assert [area.head(index) for index in range(2)] == [area.pattern(index)[:32] for index in range(2)]


@pytest.mark.fact("2.3")
@kinds
def test_the_kernel_unregisters_without_waking(kind: MemoryKind) -> None:
    """Where MISSING is not registered; so `unregister` wakes by itself."""
    with armed(kind) as (area, uffd), Touch(area, 0) as touch:
        assert next_event(uffd) == PageFault(area.start, READ, 0)
        assert ask(uffd, Request.UNREGISTER, area.start, area.length).errno == 0
        assert protected_pages(area) == [False, False]
        assert uffd.fdinfo().total == 1
        uffd.wake(area.memory)
        assert touch.result() == area.pattern(0)[:32]

        uffd.register(area.memory, mode=RegisterMode.RWP)
        uffd.rwprotect(area.memory)
        with Touch(area, 1) as second:
            waiters(uffd, 1)
            uffd.unregister(area.memory)
            assert second.result() == area.pattern(1)[:32]

        uffd.register(area.memory, mode=RegisterMode.RWP | RegisterMode.MISSING)
        uffd.rwprotect(area.memory)
        with Touch(area, 1) as third:
            waiters(uffd, 1)
            assert ask(uffd, Request.UNREGISTER, area.start, area.length).errno == 0
            assert third.result() == area.pattern(1)[:32]


def test_a_poller_of_a_protected_page_is_told() -> None:
    with armed(MemoryKind.SHMEM) as (area, uffd):
        assert not uffd.poll(0)
        with Touch(area) as touch:
            assert uffd.poll(60)
            assert uffd.fdinfo().pending == uffd.fdinfo().total == 1
            assert next_event(uffd).kind == "read-write-protect"
            assert (uffd.fdinfo().pending, uffd.fdinfo().total) == (0, 1)
            uffd.rwprotect(area.memory, protect=False)
            touch.result()
        assert uffd.fdinfo().total == 0


def test_a_blocking_descriptor() -> None:
    with make_area(MemoryKind.SHMEM) as area, Userfaultfd(SYNC, nonblocking=False) as uffd:
        area.populate()
        uffd.register(area.memory, mode=RegisterMode.RWP)
        uffd.rwprotect(area.memory)
        with Touch(area, 3):
            assert uffd.read_events(timeout_s=None) == [PageFault(area.page(3), READ, 0)]
            uffd.rwprotect(area.memory, protect=False)
