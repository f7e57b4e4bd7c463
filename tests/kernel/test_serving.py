"""The helpers of a correct handler: each answer of the kernel leads to what it must lead to, in bounded time."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.kernel import HUGE, PAGE, Area, Touch, huge_pages, make_area, subject, waiters
from support.waiting import wait_until
from userfault.kernel import Feature, Fork, Mapping, Outcome, RegisterMode, Remove, Userfaultfd, serving
from userfault.kernel.errors import (
    AgainError,
    BadAddressError,
    InvalidRequestError,
    NoMemoryError,
    TargetExitedError,
    UsageError,
)
from userfault.kernel.mapping import Advice, MemoryKind, Protection
from userfault.kernel.serving import Served, continue_all, copy_all, move_all, poison_all, zero_all


@pytest.fixture
def area() -> Any:
    with make_area(MemoryKind.ANONYMOUS, 6) as made:
        yield made


@pytest.fixture
def uffd(area: Area) -> Any:
    with Userfaultfd(optional=Feature.EVENT_REMOVE) as opened:
        opened.register(area.memory)
        yield opened


def test_everything_at_once(uffd: Userfaultfd, area: Area) -> None:
    assert copy_all(uffd, area.memory, b"e" * area.length) == Served(area.length, 0, 0)
    assert area.head(5) == b"e" * 32


def test_pages_that_exist_are_passed_and_woken(uffd: Userfaultfd, area: Area) -> None:
    # The one that a fault waits for was filled without a wake: only the helper's can free the thread.
    with Touch(area, 3) as touch:
        waiters(uffd, 1)
        uffd.copy(area.page(3), b"o" * PAGE, wake=False)
        uffd.zeropage(area.page(0), PAGE)
        assert copy_all(uffd, area.memory, b"n" * area.length) == Served(4 * PAGE, 2 * PAGE, 0)
        assert touch.result() == b"o" * 32
    assert area.head(0) == bytes(32)
    assert [area.head(index, 1) for index in (1, 2, 4, 5)] == [b"n"] * 4


def test_without_wake_nobody_is_woken(uffd: Userfaultfd, area: Area) -> None:
    with Touch(area, 3):
        waiters(uffd, 1)
        uffd.copy(area.page(3), b"o" * PAGE, wake=False)
        copy_all(uffd, area.memory, b"n" * area.length, wake=False)
        assert uffd.fdinfo().total == 1
        uffd.wake(area.memory)


def test_mappings_that_are_split_are_gone_over_page_by_page(uffd: Userfaultfd, area: Area) -> None:
    area.memory.protect(Protection.READ, 2 * PAGE, PAGE)
    assert uffd.try_copy(area.memory, bytes(area.length)) == Outcome(0, errno.ENOENT)
    assert copy_all(uffd, area.memory, b"s" * area.length) == Served(area.length, 0, 0)
    assert area.head(2) == area.head(5) == b"s" * 32


def test_what_is_unmapped_or_not_registered_is_counted(uffd: Userfaultfd, area: Area) -> None:
    area.memory.unmap(2 * PAGE, PAGE)
    uffd.unregister(area.page(4), PAGE)
    assert zero_all(uffd, area.start, area.length) == Served(4 * PAGE, 0, 2 * PAGE)


def _remove(area: Area) -> threading.Thread:
    """A thread that gives up the first page, and waits until the event is read."""
    thread = threading.Thread(target=lambda: area.drop(0, 1))
    thread.start()
    return thread


def _fills(uffd: Userfaultfd, area: Area) -> list[Callable[..., Served]]:
    start, length = area.page(1), PAGE
    return [
        lambda **more: copy_all(uffd, start, bytes(length), **more),
        lambda **more: zero_all(uffd, start, length, **more),
    ]


@pytest.mark.parametrize("number", range(2))
def test_a_changing_address_space_is_waited_for_by_reading(
    uffd: Userfaultfd, area: Area, number: int
) -> None:
    thread = _remove(area)
    wait_until(lambda: uffd.poll(timeout_s=0), "the event is there")
    assert uffd.try_zeropage(area.page(1), PAGE) == Outcome(0, errno.EAGAIN)
    assert _fills(uffd, area)[number]() == Served(PAGE, 0, 0)
    thread.join()
    # Not lost: the event is the first that the program reads.
    assert uffd.read_events() == [Remove(area.start, area.page(1))]


def test_faults_in_front_of_the_event_are_kept_too(uffd: Userfaultfd, area: Area) -> None:
    # Faults overtake events: reading one message and trying again would go on for ever.
    with Touch(area, 4), Touch(area, 5):
        waiters(uffd, 2)
        thread = _remove(area)
        wait_until(lambda: uffd.try_continue(area.page(1), PAGE).errno == errno.EAGAIN, "it has begun")
        served = copy_all(uffd, area.page(2), bytes(PAGE))
        assert served == Served(PAGE, 0, 0)
        thread.join()
        found = uffd.read_events()
        assert sorted(type(event).__name__ for event in found) == ["PageFault", "PageFault", "Remove"]
        zero_all(uffd, area.page(4), 2 * PAGE)


@pytest.mark.needs_privilege("EVENT_FORK")
def test_other_userfaultfds_of_the_process_are_read_too(area: Area) -> None:
    # A fork holds up the requests of *all* userfaultfds of a process, and its events come one after the other.
    with subject(_forks_with_two, area.length) as child:
        first, second = child.receive_uffd(), child.receive_uffd()
        one, two = child.receive()
        with first, second:
            child.send("fork")
            wait_until(lambda: first.poll(timeout_s=0) or second.poll(timeout_s=0), "the fork has begun")
            assert copy_all(first, one, b"1" * PAGE, others=[second]) == Served(PAGE, 0, 0)
            assert copy_all(second, two, b"2" * PAGE, others=[first]) == Served(PAGE, 0, 0)
            # It may have come to its read of `two` before that was filled: a fault, too.
            for uffd in (first, second):
                forks = [event for event in uffd.read_events(timeout_s=30) if isinstance(event, Fork)]
                assert len(forks) == 1
                forks[0].child.close()
        assert child.receive() == (b"1", b"2")


def _forks_with_two(link: Any, length: int) -> object:
    with (
        Mapping.anonymous(length) as one,
        Mapping.anonymous(length) as two,
        Userfaultfd(Feature.EVENT_FORK) as first,
        Userfaultfd(Feature.EVENT_FORK) as second,
    ):
        first.register(one)
        second.register(two)
        link.send("first", (first.fd,))
        link.send("second", (second.fd,))
        link.send((one.address, two.address))
        link.receive()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return one.read(0, 1), two.read(0, 1)


def test_the_deadline_ends_it(uffd: Userfaultfd, area: Area, monkeypatch: pytest.MonkeyPatch) -> None:
    # The event is of a kind that reading does not end: as if another process's userfaultfd held it up.
    thread = _remove(area)
    wait_until(lambda: uffd.poll(timeout_s=0), "the event is there")
    monkeypatch.setattr(Userfaultfd, "drain", lambda self: 0)
    with pytest.raises(AgainError, match="read the waiting events") as caught:
        zero_all(uffd, area.page(1), PAGE, deadline_s=0.05)
    assert caught.value.done == 0
    monkeypatch.undo()
    uffd.drain()
    thread.join()


def test_a_target_that_has_exited() -> None:
    with subject(_registers_and_ends) as child, child.receive_uffd() as uffd:
        start = child.receive()
        child.send("end")
        assert child.wait() == 0
        for fill in (
            lambda: copy_all(uffd, start, bytes(PAGE)),
            lambda: zero_all(uffd, start, PAGE),
            lambda: continue_all(uffd, start, PAGE),
        ):
            with pytest.raises(TargetExitedError, match="has exited"):
                fill()


def _registers_and_ends(link: Any) -> None:
    memory = Mapping.anonymous(PAGE)
    uffd = Userfaultfd()
    uffd.register(memory)
    link.send("it", (uffd.fd,))
    link.send(memory.address)
    link.receive()


def test_a_source_that_is_gone_tells_how_far_it_came(uffd: Userfaultfd, area: Area) -> None:
    with Mapping.anonymous(3 * PAGE) as source:
        for index in range(3):
            source.write(index * PAGE, b"s")
        source.protect(Protection.NONE, 2 * PAGE, PAGE)
        with pytest.raises(BadAddressError) as caught:
            copy_all(uffd, area.start, source)
        assert caught.value.done == 2 * PAGE
        assert caught.value.address == area.page(2)


def test_memory_that_comes_back_in_time(area: Area, monkeypatch: pytest.MonkeyPatch) -> None:
    # ENOMEM cannot be had safely for real; the answers are played, the rest is the helper's own.
    answers = [Outcome(PAGE, errno.EAGAIN), Outcome(0, errno.ENOMEM), Outcome(0, errno.ENOMEM)]
    real = Userfaultfd.try_zeropage

    def played(self: Userfaultfd, *arguments: Any, **more: Any) -> Outcome:
        if answers:
            answer = answers.pop(0)
            if answer.done:
                real(self, arguments[0], answer.done, **more)
            return answer
        return real(self, *arguments, **more)

    with Userfaultfd() as uffd:
        uffd.register(area.memory)
        monkeypatch.setattr(Userfaultfd, "try_zeropage", played)
        assert zero_all(uffd, area.memory) == Served(area.length, 0, 0)
        answers += [Outcome(0, errno.ENOMEM)] * 1000
        area.drop(0, 1)
        with pytest.raises(NoMemoryError):
            zero_all(uffd, area.start, PAGE, deadline_s=0.02)


@pytest.mark.needs_feature("MOVE")
def test_move_leaves_what_is_there(uffd: Userfaultfd, area: Area) -> None:
    with Mapping.anonymous(area.length) as stash:
        stash.madvise(Advice.NOHUGEPAGE)
        for index in range(area.pages):
            stash.write(index * PAGE, b"m%d" % index)
        uffd.zeropage(area.page(2), PAGE)
        assert move_all(uffd, area.memory, stash) == Served(5 * PAGE, PAGE, 0)
        assert area.head(2, 2) == bytes(2)
        assert area.head(3, 2) == b"m3"
        assert stash.read(2 * PAGE, 2) == b"m2"
        assert stash.read(3 * PAGE, 2) == bytes(2)


@pytest.mark.needs_feature("POISON")
def test_poison_spares_what_is_there(uffd: Userfaultfd, area: Area) -> None:
    uffd.copy(area.page(1), b"k" * PAGE)
    assert poison_all(uffd, area.memory) == Served(5 * PAGE, PAGE, 0)
    assert area.head(1) == b"k" * 32


@pytest.mark.needs_feature("MINOR_SHMEM")
def test_continue_maps_the_cache_and_stops_at_a_hole() -> None:
    with make_area(MemoryKind.SHMEM, 4) as area, Userfaultfd() as uffd, area.memory.alias() as alias:
        uffd.register(area.memory, mode=RegisterMode.MINOR)
        for index in (0, 1, 3):
            alias.write(index * PAGE, b"c%d" % index)
        uffd.continue_(area.page(1), PAGE)
        assert continue_all(uffd, area.start, 2 * PAGE) == Served(PAGE, PAGE, 0)
        with pytest.raises(BadAddressError, match="a hole") as caught:
            continue_all(uffd, area.page(1), 3 * PAGE)
        assert caught.value.done == PAGE
        assert area.head(0, 2) == b"c0"


@pytest.mark.needs_privilege("huge pages")
@pytest.mark.parametrize("kind", [MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB])
def test_huge_pages_get_zeros_by_copying(kind: MemoryKind) -> None:
    with make_area(kind, 3) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        with pytest.raises(InvalidRequestError, match="huge pages have no zero page"):
            uffd.zeropage(area.start, HUGE)
        uffd.copy(area.page(1), b"h" * HUGE)
        assert zero_all(uffd, area.memory, page_size=HUGE) == Served(2 * HUGE, HUGE, 0)
        assert area.head(1) == b"h" * 32
        assert area.head(2) == bytes(32)


@pytest.mark.needs_privilege("huge pages")
def test_an_empty_pool_of_huge_pages_is_no_page_that_exists() -> None:
    # The kernel says EEXIST; who wakes and tries again does so for ever.
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    with (
        huge_pages(-int(free.read_text())),  # given back afterwards
        Mapping.anonymous(HUGE, huge_page_size=HUGE, noreserve=True) as memory,
    ):
        if int(free.read_text()):  # promised to other programs
            pytest.skip("needs an empty pool of huge pages")
        with Userfaultfd() as uffd:
            uffd.register(memory)
            # Older kernels say what it is.
            assert uffd.try_copy(memory, bytes(HUGE)) in (Outcome(0, errno.EEXIST), Outcome(0, errno.ENOMEM))
            with pytest.raises(NoMemoryError):
                copy_all(uffd, memory, bytes(HUGE), page_size=HUGE, deadline_s=0.01)


def test_wrong_use_is_refused(uffd: Userfaultfd, area: Area) -> None:
    with pytest.raises(UsageError, match="no power of two"):
        zero_all(uffd, area.memory, page_size=PAGE * 3)
    with pytest.raises(UsageError, match="not whole pages of"):
        copy_all(uffd, area.page(1), bytes(PAGE), page_size=HUGE)
    with pytest.raises(UsageError, match="pad the last page"):
        copy_all(uffd, area.start, bytes(5))


def test_every_helper_is_public() -> None:
    assert set(serving.__all__) == {
        "Served", "continue_all", "copy_all", "move_all", "poison_all", "zero_all",
    }  # fmt: skip
