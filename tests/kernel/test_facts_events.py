"""Events and what goes on while they wait (docs/kernel-api.md, 4.1 to 4.3).

Unchecked: the event of a shrinking heap (malloc owns it); spurious events of a fork that failed; a fill that is under
way while its page is being given up (a race that cannot be arranged); managers that block on a pipe, or whose threads
overtake each other (matters of their design).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.kernel import PAGE, Area, Link, Touch, in_child, make_area, next_event, subject, waiters
from support.kernel_facts import Job, entry, kernel_call, registered, vma
from support.kernel_releases import documented
from support.waiting import wait_until
from userfault.kernel import (
    Feature,
    Fork,
    Outcome,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
    serving,
)
from userfault.kernel._syscalls import madvise_self
from userfault.kernel.abi import PagemapBit
from userfault.kernel.errors import InvalidRequestError, PageExistsError, TooManyFilesError
from userfault.kernel.mapping import Advice, MapFlag, Mapping, MemoryKind, Protection

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
FOLLOW = Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP

delivery = pytest.mark.fact("4.1")
manager = pytest.mark.fact("4.2")
deadlocks = pytest.mark.fact("4.3")


@contextlib.contextmanager
def followed(kind: MemoryKind = ANONYMOUS, pages: int = 4) -> Iterator[tuple[Area, Userfaultfd]]:
    """A full area, registered, with every event but forks."""
    with make_area(kind, pages) as area, Userfaultfd(FOLLOW) as uffd:
        area.populate()
        uffd.register(area.memory)
        try:
            yield area, uffd
        finally:
            uffd.close()  # or the end of the mapping would wait for a reader


def events_of(uffd: Userfaultfd, call: Callable[[], object]) -> list[object]:
    """Make a call in a thread and return the events that it waited for."""
    found: list[object] = []
    job = Job(call)
    while not job.done:
        found += uffd.read_events(1, timeout_s=0.01)
    found += uffd.read_events()
    job.result()
    return found


# --- 4.1: how they are delivered ------------------------------------------------------------------------------


@delivery
def test_who_causes_an_event_waits_until_it_is_read_whatever_signal_comes() -> None:
    seen = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.set())
    try:
        with followed() as (area, uffd), Job(area.drop, 0, 1) as dropping:
            dropping.blocks()
            signal.pthread_kill(dropping.ident, signal.SIGUSR1)
            assert dropping.state() == "D"
            assert uffd.try_copy(area.page(1), area.pattern(1)) == Outcome(0, errno.EAGAIN)
            assert not seen.is_set()
            assert next_event(uffd) == Remove(area.start, area.page(1))
            dropping.result()
            wait_until(seen.is_set, "the signal is handled")
            assert uffd.try_copy(area.start, area.pattern(1)) == Outcome(PAGE, 0)
    finally:
        signal.signal(signal.SIGUSR1, before)


@delivery
def test_closing_the_last_descriptor_lets_it_go_on() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(FOLLOW) as uffd:
        uffd.register(area.memory)
        dropping = Job(area.drop)
        dropping.blocks()
        twin = os.dup(uffd.fd)
        uffd.close()
        assert dropping.state() == "D"
        os.close(twin)
        dropping.result()


@delivery
def test_only_a_fatal_signal_ends_the_wait() -> None:
    def run(link: Link) -> None:
        with followed() as (area, uffd):
            link.send(None, (uffd.fd,))
            area.drop()

    with subject(run) as child, child.receive_uffd() as uffd:
        assert uffd.poll(30)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert uffd.read_events() == []  # it took its event with it


@contextlib.contextmanager
def no_room_behind(area: Area) -> Iterator[None]:
    """See to it that an area cannot grow where it is."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(PageExistsError):  # something is there
            stack.enter_context(Mapping.anonymous(PAGE, address=area.start + area.length))
        yield


@delivery
def test_what_moves() -> None:
    with followed() as (area, uffd), Mapping.anonymous(4 * PAGE) as target:
        old, new = area.start, target.address
        moved = events_of(uffd, lambda: area.memory.remap(to=target))
        assert moved == [Remap(old, new, 4 * PAGE), Unmap(old, old + 4 * PAGE)]
        assert vma(new).missing
    with followed() as (area, uffd):
        old = area.start
        with no_room_behind(area):
            grown = events_of(uffd, lambda: area.memory.remap(6 * PAGE))
        assert grown == [Remap(old, area.start, 4 * PAGE), Unmap(old, old + 4 * PAGE)]


@delivery
def test_what_moves_over_other_memory_that_is_followed() -> None:
    with followed() as (area, uffd), make_area(ANONYMOUS) as target:
        uffd.register(target.memory)
        old, new = area.start, target.start
        assert events_of(uffd, lambda: area.memory.remap(to=target.memory)) == [
            Unmap(new, new + 4 * PAGE),
            Remap(old, new, 4 * PAGE),
            Unmap(old, old + 4 * PAGE),
        ]


@delivery
def test_what_moves_and_leaves_its_place_mapped() -> None:
    with followed() as (area, uffd):
        moved: list[Mapping] = []
        old = area.start
        events = events_of(uffd, lambda: moved.append(area.memory.remap(dontunmap=True)))
        (new,) = moved
        assert events == [Remap(old, new.address, 4 * PAGE)]
        assert vma(old).missing
        assert vma(new.address).missing
        assert PagemapBit.PRESENT not in entry(old)
        uffd.unregister(new)
        new.close()


@delivery
def test_what_shrinks_and_grows_in_place() -> None:
    with followed() as (area, uffd):
        start = area.start
        shrunk = events_of(uffd, lambda: area.memory.remap(2 * PAGE, may_move=False))
        assert shrunk == [Unmap(start + 2 * PAGE, start + 4 * PAGE)]
        assert events_of(uffd, lambda: area.memory.remap(4 * PAGE, may_move=False)) == []
        assert vma(start).end == start + 4 * PAGE
        with Touch(area, 3):
            assert next_event(uffd) == PageFault(start + 3 * PAGE, 0, 0)  # type: ignore[arg-type]
            uffd.zeropage(start + 2 * PAGE, 2 * PAGE)


@delivery
def test_unmapping_is_one_event_with_all_that_was_asked_for() -> None:
    with Mapping.anonymous(6 * PAGE) as memory, Userfaultfd(FOLLOW) as uffd, Userfaultfd(FOLLOW) as other:
        start = memory.address
        uffd.register(start + PAGE, PAGE)
        uffd.register(start + 3 * PAGE, PAGE)
        other.register(start + 4 * PAGE, PAGE)
        both = Job(memory.unmap, 0, 5 * PAGE)
        assert next_event(uffd) == Unmap(start, start + 5 * PAGE)
        assert not both.done
        assert next_event(other) == Unmap(start, start + 5 * PAGE)
        both.result()
        assert uffd.read_events() + other.read_events() == []


@delivery
def test_mapping_over_it_is_unmapping() -> None:
    with followed() as (area, uffd):
        flags = MapFlag.FIXED | MapFlag.ANONYMOUS | MapFlag.PRIVATE
        replaced = Job(kernel_call, "mmap", area.start, 2 * PAGE, 3, int(flags), -1, 0)
        assert next_event(uffd) == Unmap(area.start, area.page(2))
        assert not vma(area.start).missing  # it comes afterwards
        replaced.result()


@delivery
@pytest.mark.parametrize(
    "advice", [Advice.DONTNEED, Advice.DONTNEED_LOCKED, Advice.FREE], ids=lambda advice: advice.name
)
def test_giving_up_private_memory_is_an_event_for_each_mapping_before_it_goes(advice: Advice) -> None:
    with followed() as (area, uffd):
        area.memory.madvise(Advice.DONTDUMP, 2 * PAGE, 2 * PAGE)  # splits it
        job = Job(area.memory.madvise, advice, PAGE, 2 * PAGE)
        job.blocks()
        assert PagemapBit.PRESENT in entry(area.page(1))
        assert next_event(uffd) == Remove(area.page(1), area.page(2))
        assert next_event(uffd) == Remove(area.page(2), area.page(3))
        job.result()
        if advice is not Advice.FREE:
            assert PagemapBit.PRESENT not in entry(area.page(1))


@delivery
def test_giving_up_shared_memory_is_an_event_even_where_it_is_refused() -> None:
    with followed(SHMEM) as (area, uffd):
        whole = [Remove(area.start, area.start + area.length)]
        assert events_of(uffd, lambda: area.memory.madvise(Advice.REMOVE)) == whole
        assert events_of(uffd, lambda: area.memory.madvise(Advice.DONTNEED)) == whole

        def free() -> None:
            with pytest.raises(InvalidRequestError):
                area.memory.madvise(Advice.FREE)

        assert events_of(uffd, free) == whole


@delivery
def test_advice_through_process_madvise() -> None:
    with followed() as (area, uffd):
        answers: list[int] = []

        def advise() -> None:
            try:
                madvise_self([(area.start, PAGE)], Advice.DONTNEED)
            except OSError as refusal:
                answers.append(refusal.errno or 0)
            else:
                answers.append(0)

        events = events_of(uffd, advise)
        (number,) = answers
        assert number in documented("process_madvise(MADV_DONTNEED) of the own process")
        assert events == ([] if number else [Remove(area.start, area.page(1))])


@delivery
def test_what_is_no_event() -> None:
    with followed(SHMEM) as (area, uffd):
        assert area.memory.fd is not None
        fd = area.memory.fd
        for call in (
            lambda: area.memory.punch_hole(0, PAGE),
            lambda: os.ftruncate(fd, 3 * PAGE),
            lambda: os.ftruncate(fd, 4 * PAGE),
            lambda: area.memory.madvise(Advice.PAGEOUT),
            lambda: area.memory.madvise(Advice.COLD),
            lambda: area.memory.protect(Protection.READ),
            lambda: area.memory.protect(Protection.READ | Protection.WRITE),
            lambda: in_child(area.memory.punch_hole),  # another process's doing
        ):
            assert events_of(uffd, call) == []


@delivery
@pytest.mark.needs_linux("MADV_GUARD_INSTALL")
def test_guards_are_no_event() -> None:
    with followed() as (area, uffd):
        assert events_of(uffd, lambda: area.memory.madvise(Advice.GUARD_INSTALL, 0, PAGE)) == []


@delivery
def test_the_end_of_the_process_is_no_event() -> None:
    def run(link: Link) -> None:
        with followed() as (_, uffd):
            link.send(None, (uffd.fd,))
            link.receive()
            os._exit(0)

    with subject(run) as child, child.receive_uffd() as uffd:
        child.send("end")
        child.wait()
        assert not uffd.poll(0)
        assert uffd.read_events() == []


# --- forks ----------------------------------------------------------------------------------------------------

forks = pytest.mark.needs_privilege("EVENT_FORK")


@delivery
@forks
def test_threads_and_programs_that_are_started_are_no_forks() -> None:
    def run() -> list[object]:
        with registered(features=Feature.EVENT_FORK) as (_, uffd):
            Job(int).result()
            with contextlib.suppress(FileNotFoundError):
                os.posix_spawn("/there/is/no/such/program", ["program"], {})
            return list(uffd.read_events())

    assert in_child(run) == []


def _fork_with_two(link: Link) -> None:
    """Fork with two userfaultfds, the second of which has the lower memory, and one that has none."""
    with make_area(ANONYMOUS) as one, make_area(ANONYMOUS) as two, contextlib.ExitStack() as stack:
        low, high = sorted((one, two), key=lambda area: area.start)
        first, second, idle = (stack.enter_context(Userfaultfd(Feature.EVENT_FORK)) for _ in range(3))
        first.register(high.memory)
        second.register(low.memory)
        link.send((high.start, low.start), (first.fd, second.fd, idle.fd))
        with subject(_hold):
            link.receive()


def _hold(link: Link) -> None:
    link.receive()


@deadlocks
@delivery
@forks
def test_a_fork_is_one_event_after_the_other_in_order_of_memory_and_all_wait_for_all() -> None:
    with subject(_fork_with_two) as child, contextlib.ExitStack() as stack:
        (high_start, _), fds = child.receive_with_fds()
        high, low, idle = (stack.enter_context(Userfaultfd.from_fd(fd)) for fd in fds)
        first = next_event(low)
        assert isinstance(first, Fork)
        first.child.close()
        second = next_event(high)
        assert isinstance(second, Fork)
        second.child.close()
        assert idle.read_events() == []
        child.send("end")
        child.receive()
    with subject(_fork_with_two) as child, contextlib.ExitStack() as stack:
        (high_start, _), fds = child.receive_with_fds()
        high, low, _ = (stack.enter_context(Userfaultfd.from_fd(fd)) for fd in fds)
        wait_until(lambda: low.poll(0), "the fork waits for its first event to be read")
        # The one without a message cannot be used either: who tries it again and again, reading only that, hangs.
        assert high.read_events() == []
        assert high.try_zeropage(high_start, PAGE) == Outcome(0, errno.EAGAIN)
        assert serving.zero_all(high, high_start, PAGE, others=[low]).filled == PAGE
        for uffd in (low, high):
            event = next_event(uffd)
            assert isinstance(event, Fork)
            event.child.close()
        child.send("end")
        child.receive()


def _fork_and_touch(link: Link) -> None:
    features = Feature.EVENT_FORK | Feature.THREAD_ID
    with registered(features=features) as (area, uffd):
        fcntl.fcntl(uffd.fd, fcntl.F_SETFL, 0)
        fcntl.fcntl(uffd.fd, fcntl.F_SETFD, 0)
        link.send(area.start, (uffd.fd,))

        def touch() -> tuple[int, bytes]:
            return os.getpid(), area.head(1)

        link.send(in_child(touch))
        link.receive()


@manager
@forks
def test_the_childs_userfaultfd() -> None:
    with subject(_fork_and_touch) as child:
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            (event,) = uffd.read_events(1, timeout_s=None)
            assert isinstance(event, Fork)
            with event.child as forked:
                # As it was created, not as it was changed since: this one reads without waiting, its parent waits.
                assert fcntl.fcntl(forked.fd, fcntl.F_GETFL) & os.O_NONBLOCK
                assert fcntl.fcntl(forked.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
                assert forked.fdinfo().features == Feature.EVENT_FORK | Feature.THREAD_ID
                fault = next_event(forked)
                assert isinstance(fault, PageFault)
                assert fault.address == start + PAGE
                assert uffd.fdinfo().total == 0
                forked.copy(fault.address, b"of the child".ljust(PAGE, b"!"))
                pid, data = child.receive()
                assert fault.thread_id == pid
                assert data[:12] == b"of the child"
            child.send("end")
            child.receive()


def _fork_once(link: Link) -> None:
    with registered(features=Feature.EVENT_FORK) as (_, uffd):
        link.send(None, (uffd.fd,))
        in_child(int)


@manager
@forks
def test_without_a_free_descriptor_the_fork_waits() -> None:
    with subject(_fork_once) as child, child.receive_uffd() as uffd:
        wait_until(lambda: uffd.poll(0), "the child forks")
        lowest = os.dup(uffd.fd)
        os.close(lowest)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            for _ in range(2):
                with pytest.raises(TooManyFilesError, match="the event waits"):
                    uffd.read_events()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        event = next_event(uffd)
        assert isinstance(event, Fork)
        event.child.close()
        child.receive()


def _fork_with_a_handler(link: Link) -> None:
    """os.fork with a Python thread that reads the events."""
    warnings.simplefilter("ignore", DeprecationWarning)
    with registered(features=Feature.EVENT_FORK) as (_, uffd):
        handler = threading.Thread(target=uffd.read_events, kwargs={"timeout_s": None}, daemon=True)
        handler.start()
        link.send(os.getpid(), (uffd.fd,))
        link.receive()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)


@deadlocks
@forks
@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no GIL")
def test_forking_beside_a_python_handler_hangs() -> None:
    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    with subject(_fork_with_a_handler) as child:
        pid, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            child.send("fork")
            # The event is there, its handler is awake, and waits for the GIL that the fork holds.
            wait_until(lambda: state(pid) == "D" and uffd.poll(0), "the fork waits for its event to be read")
            event = next_event(uffd)  # only another process helps
            assert isinstance(event, Fork)
            event.child.close()
            # Its handler finds nothing more, and is still there when the fork is through.
            child.receive()


@deadlocks
def test_whoever_retries_without_reading_everything_hangs() -> None:
    with followed() as (area, uffd):
        assert events_of(uffd, lambda: area.drop(3, 1)) == [Remove(area.page(3), area.page(4))]
        with Touch(area, 3), Job(area.drop, 0, 1) as dropping:
            waiters(uffd, 1)
            fault = next_event(uffd)
            assert isinstance(fault, PageFault)
            dropping.blocks()
            for _ in range(3):
                assert uffd.try_copy(fault.address, area.pattern(3)) == Outcome(0, errno.EAGAIN)
            # Served by reading everything; what was read on the way is kept.
            assert serving.copy_all(uffd, fault.address, area.pattern(3)).filled == PAGE
            assert uffd.read_events() == [Remove(area.start, area.page(1))]
