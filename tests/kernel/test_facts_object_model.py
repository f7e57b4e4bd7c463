"""What a userfaultfd is, how it is read, and what all its requests share (docs/kernel-api.md, 2.0).

Unchecked: a fatal signal in the middle of a request (whoever could see the answer is dead); the order of checks in
the fault path before a message is queued, where no two apply at once to one access; that a page appears only when it
is complete (no observer can be put in between).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Callable
from pathlib import Path

import pytest

from support.kernel import PAGE, Link, Touch, in_child, make_area, next_event, subject, waiters
from support.kernel_facts import (
    UNTOUCHED,
    Answer,
    Job,
    ask,
    ask_at,
    exited_owner,
    filling,
    kernel_call,
    kernel_reads,
    registered,
    signal_info,
    vma,
)
from support.kernel_releases import documented
from support.waiting import wait_until
from userfault.kernel import Feature, OpenWay, Outcome, PageFault, RegisterMode, Remove, Userfaultfd, abi
from userfault.kernel.abi import Request
from userfault.kernel.errors import (
    AgainError,
    InvalidRequestError,
    NotInitialisedError,
    PageExistsError,
    UsageError,
)
from userfault.kernel.mapping import MemoryKind

ANONYMOUS = MemoryKind.ANONYMOUS
needs_move = pytest.mark.needs_feature("MOVE")
needs_poison = pytest.mark.needs_feature("POISON")
FILLS = [
    Request.COPY,
    Request.ZEROPAGE,
    Request.CONTINUE,
    pytest.param(Request.POISON, marks=needs_poison),
    pytest.param(Request.MOVE, marks=needs_move),
]

pytestmark = pytest.mark.fact("2.0")


def name(value: object) -> str:
    return value.name if isinstance(value, Request) else str(value)


# --- the descriptor -------------------------------------------------------------------------------------------


def test_the_descriptor_is_read_only_and_has_no_position() -> None:
    with Userfaultfd() as uffd:
        assert fcntl.fcntl(uffd.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert kernel_call("write", uffd.fd, b"message", 7) == errno.EBADF
        assert os.lseek(uffd.fd, 4096, os.SEEK_SET) == 0


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_APPEND, 4, 1 << 30])
def test_other_flags_are_invalid(flags: int) -> None:
    number = abi.SYSCALL_NUMBERS.get(os.uname().machine, 282)
    assert kernel_call("syscall", number, flags | abi.OpenFlag.USER_MODE_ONLY) == errno.EINVAL


def test_the_device_knows_one_request_and_needs_no_right_to_write() -> None:
    try:
        device = os.open("/dev/userfaultfd", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        pytest.skip("needs /dev/userfaultfd")
    try:
        assert ask_at(device, Request.REGISTER, 0) == errno.EINVAL
        with Userfaultfd.from_fd(fcntl.ioctl(device, Request.NEW, os.O_CLOEXEC)) as uffd:
            assert not uffd.initialised
    finally:
        os.close(device)


def test_a_duplicate_is_the_same_context() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        with Userfaultfd.from_fd(os.dup(uffd.fd)) as twin:
            twin.register(area.memory)
            with Touch(area) as touch:
                event = next_event(twin)
                assert isinstance(event, PageFault)
                assert uffd.read_events() == []
                uffd.copy(event.address, area.pattern(0))
            assert touch.result() == area.pattern(0)[:32]
        assert vma(area.start).missing  # one of two was closed


def test_a_forked_childs_descriptor_acts_on_the_memory_of_its_creator() -> None:
    with registered() as (area, uffd):

        def serve() -> bytes:
            uffd.copy(area.start, b"of the child".ljust(PAGE, b"!"))
            uffd.unregister(area.page(3), PAGE)
            return area.head(0)

        # The source is the child's, the target is not: its own copy of the area stays empty.
        assert in_child(serve) == bytes(32)
        assert area.head(0)[:12] == b"of the child"
        assert vma(area.page(2)).missing
        assert not vma(area.page(3)).missing


def test_a_descriptor_that_was_sent_acts_on_the_memory_of_its_creator() -> None:
    def run(link: Link) -> bytes:
        with registered() as (area, uffd):
            link.send(area.start, (uffd.fd,))
            return area.head(1)

    with subject(run) as child:
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.address == start + PAGE
            uffd.copy(event.address, b"of the test".ljust(PAGE, b"!"))
            assert child.receive()[:11] == b"of the test"


def test_a_registration_is_a_property_of_mappings_that_split_and_merge() -> None:
    with make_area(ANONYMOUS, 4) as area, Userfaultfd() as uffd, Userfaultfd() as other:
        uffd.register(area.start, 2 * PAGE)
        assert vma(area.start).end == area.page(2)
        uffd.register(area.page(2), 2 * PAGE)
        assert (vma(area.start).start, vma(area.start).end) == (area.start, area.start + area.length)
        uffd.unregister(area.page(2), 2 * PAGE)
        other.register(area.page(2), 2 * PAGE)
        assert (vma(area.start).start, vma(area.start).end) == (area.start, area.page(2))
        assert vma(area.page(2)).start == area.page(2)


# --- messages -------------------------------------------------------------------------------------------------


def test_each_thread_that_waits_has_a_message_and_one_answer_wakes_all() -> None:
    with registered() as (area, uffd), Touch(area), Touch(area, offset=64):
        waiters(uffd, 2)
        assert [(event.address, event.flags) for event in uffd.read_events()] == [(area.start, 0)] * 2  # type: ignore[union-attr]
        assert uffd.fdinfo().pending == 0
        uffd.zeropage(area.start, PAGE)


def test_faults_overtake_events() -> None:
    with registered(features=Feature.EVENT_REMOVE) as (area, uffd), Job(area.drop, 0, 1) as dropping:
        dropping.blocks()
        with Touch(area, 2):
            waiters(uffd, 1)
            assert isinstance(next_event(uffd), PageFault)
            assert next_event(uffd) == Remove(area.start, area.page(1))
            dropping.result()
            uffd.zeropage(area.page(2), PAGE)


def read(uffd: Userfaultfd, length: int) -> int:
    """Read into a buffer of this length; return the error number."""
    return kernel_call("read", uffd.fd, bytes(length), length)


def test_what_read_takes_and_gives() -> None:
    with Userfaultfd(handshake=False) as uffd:
        assert read(uffd, 32) == errno.EINVAL
        with pytest.raises(NotInitialisedError):
            uffd.read_events()
    with registered() as (area, uffd):
        assert read(uffd, 31) == errno.EINVAL
        assert read(uffd, 32) == errno.EAGAIN
        with Touch(area, 0), Touch(area, 1), Touch(area, 2):
            waiters(uffd, 3)
            assert len(os.read(uffd.fd, 2 * 32 + 31)) == 2 * 32
            assert len(os.read(uffd.fd, 1 << 16)) == 32
            assert read(uffd, 1 << 16) == errno.EAGAIN
            uffd.zeropage(area.start, 3 * PAGE)


def test_a_blocking_read_waits_for_the_first_message_only() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(nonblocking=False) as uffd:
        uffd.register(area.memory)
        with Job(os.read, uffd.fd, 1024) as reading:
            reading.blocks("S")
            with Touch(area):
                assert len(reading.result()) == 32
                uffd.zeropage(area.start, PAGE)


def test_one_read_of_a_blocking_descriptor_can_be_told_not_to_wait() -> None:
    with Userfaultfd(nonblocking=False) as uffd:
        try:
            os.preadv(uffd.fd, [bytearray(32)], -1, os.RWF_NOWAIT)
        except OSError as refusal:
            answer = refusal.errno
        assert answer in documented("RWF_NOWAIT without a message")


def test_a_message_that_could_not_be_delivered_is_lost_until_a_wake() -> None:
    with registered() as (area, uffd), Touch(area):
        waiters(uffd, 1)
        assert kernel_call("read", uffd.fd, None, 32) == errno.EFAULT
        assert (uffd.fdinfo().pending, uffd.fdinfo().total) == (0, 1)
        assert uffd.read_events() == []
        uffd.wake(area.start, PAGE)
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.address == area.start
        uffd.zeropage(area.start, PAGE)


def polled(fd: int) -> int:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return sum(events for _, events in poller.poll(0))


def test_what_poll_says() -> None:
    with Userfaultfd(handshake=False) as uffd:
        assert polled(uffd.fd) == select.POLLERR
    with make_area(ANONYMOUS) as area, Userfaultfd(Feature.EVENT_REMOVE) as uffd:
        uffd.register(area.memory)
        assert polled(uffd.fd) == 0
        with Touch(area):
            waiters(uffd, 1)
            assert polled(uffd.fd) == select.POLLIN
            next_event(uffd)
            assert polled(uffd.fd) == 0
            uffd.zeropage(area.start, PAGE)
        with Job(area.drop) as dropping:
            dropping.blocks()
            assert polled(uffd.fd) == select.POLLIN
            next_event(uffd)
    with make_area(ANONYMOUS) as area, Userfaultfd(nonblocking=False) as uffd:
        uffd.register(area.memory)
        assert polled(uffd.fd) == select.POLLERR
        with Touch(area):
            waiters(uffd, 1)
            assert polled(uffd.fd) == select.POLLERR
            uffd.zeropage(area.start, PAGE)


def test_what_was_polled_another_reader_may_take() -> None:
    with registered() as (area, uffd), Touch(area):
        waiters(uffd, 1)
        assert uffd.poll(0)
        assert len(os.read(uffd.fd, 32)) == 32  # the other reader
        assert uffd.read_events() == []
        uffd.zeropage(area.start, PAGE)


def test_a_message_wakes_all_who_poll() -> None:
    def polls(job: Job) -> bool:
        text = Path(f"/proc/self/task/{job.thread_id}/syscall").read_text()
        return text.split()[0] in ("7", "271", "73")  # poll and ppoll of x86-64, ppoll of the others

    with registered() as (area, uffd), Job(uffd.poll) as first, Job(uffd.poll) as second:
        wait_until(lambda: polls(first) and polls(second), "both threads poll")
        with Touch(area):
            assert first.result()
            assert second.result()
            uffd.zeropage(area.start, PAGE)


def test_sigbus_in_place_of_a_message() -> None:
    def touch() -> None:
        with registered(features=Feature.SIGBUS) as (area, _):
            area.head(1)

    info = signal_info(touch)
    assert info is not None
    assert (info.number, info.code) == (7, 2)  # SIGBUS, BUS_ADRERR
    with registered(features=Feature.SIGBUS) as (area, uffd):
        assert kernel_reads(area.start) == errno.EFAULT
        assert uffd.read_events() == []
        assert uffd.fdinfo().total == 0


# --- what all requests share ----------------------------------------------------------------------------------


def test_unknown_requests_and_requests_before_the_handshake_are_invalid() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(handshake=False) as uffd:
        assert ask(uffd, Request.REGISTER, area.start, PAGE, 1) == Answer(errno.EINVAL, UNTOUCHED)
        assert ask(uffd, Request.WAKE, area.start, PAGE).errno == errno.EINVAL
        assert ask(uffd, Request.COPY, area.start, area.start, PAGE, 0) == Answer(errno.EINVAL, UNTOUCHED)
        for call in (uffd.register, uffd.wake, uffd.unregister, uffd.zeropage, uffd.writeprotect):
            with pytest.raises(NotInitialisedError, match="handshake"):
                call(area.start, PAGE)
        uffd.handshake()
        assert ask_at(uffd.fd, Request.REGISTER + 0x3E, 0) == errno.EINVAL
        assert ask_at(uffd.fd, Request.PAGEMAP_SCAN, 0) == errno.EINVAL
        assert ask_at(uffd.fd, Request.NEW, 0) == errno.EINVAL


Range = tuple[
    Request, Callable[[int, int, int], tuple[int, ...]], Callable[[Userfaultfd, int, int, int], object]
]
# By name: the request, its values and our call for [start, +length), given an address with other memory.
RANGES: dict[str, Range] = {
    "register": (Request.REGISTER, lambda s, n, _: (s, n, 1), lambda u, s, n, _: u.register(s, n)),
    "unregister": (Request.UNREGISTER, lambda s, n, _: (s, n), lambda u, s, n, _: u.unregister(s, n)),
    "wake": (Request.WAKE, lambda s, n, _: (s, n), lambda u, s, n, _: u.wake(s, n)),
    "copy": (Request.COPY, lambda s, n, o: (s, o, n, 0), lambda u, s, n, o: u.copy(s, o, n)),
    "zeropage": (Request.ZEROPAGE, lambda s, n, _: (s, n, 0), lambda u, s, n, _: u.zeropage(s, n)),
    "continue": (Request.CONTINUE, lambda s, n, _: (s, n, 0), lambda u, s, n, _: u.continue_(s, n)),
    "poison": (Request.POISON, lambda s, n, _: (s, n, 0), lambda u, s, n, _: u.poison(s, n)),
    "move": (Request.MOVE, lambda s, n, o: (s, o, n, 0), lambda u, s, n, o: u.move(s, o, n)),
    "move's source": (Request.MOVE, lambda s, n, o: (o, s, n, 0), lambda u, s, n, o: u.move(o, s, n)),
    "writeprotect": (
        Request.WRITEPROTECT,
        lambda s, n, _: (s, n, 1),
        lambda u, s, n, _: u.writeprotect(s, n),
    ),
}


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(which, marks=[needs_move] * ("move" in which) + [needs_poison] * (which == "poison"))
        for which in RANGES
    ],
)
def test_ranges_are_whole_pages_of_the_address_space(which: str) -> None:
    request, values, call = RANGES[which]
    mode = RegisterMode.MISSING | RegisterMode.WP
    with registered(mode=mode) as (area, uffd), make_area(ANONYMOUS) as other:
        start, other_start = area.start, other.start
        # What we refuse ourselves, naming the value.
        refused = {
            (start + 1, PAGE): f"{start + 1:#x}",
            (start, PAGE + 1): f"{PAGE + 1}",
            (start, PAGE - 1): f"{PAGE - 1}",
            (start, 0): "0",
            (start, (1 << 64) - PAGE): "outside",  # wraps around
        }
        for (at, length), named in refused.items():
            found = ask(uffd, request, *values(at, length, other_start))
            assert found.errno == errno.EINVAL
            if request not in (Request.UNREGISTER, Request.WAKE, Request.WRITEPROTECT):
                assert found.field == UNTOUCHED
            with pytest.raises(UsageError, match=named):
                call(uffd, at, length, other_start)
        # What only the kernel knows: where the address space ends.
        for at, length in ((1 << 63, PAGE), (start, 1 << 60)):
            assert ask(uffd, request, *values(at, length, other_start)).errno == errno.EINVAL
            with pytest.raises(InvalidRequestError):
                call(uffd, at, length, other_start)


def test_the_source_of_copy_may_begin_anywhere() -> None:
    with registered() as (area, uffd):
        source = bytes(range(256)) * (2 * PAGE // 256)
        uffd.copy(area.start, memoryview(source)[3 : 3 + PAGE])
        assert area.head(0) == source[3:35]


def test_while_the_address_space_changes_filling_and_protecting_say_so_before_they_look_at_anything() -> None:
    mode = RegisterMode.MISSING | RegisterMode.WP
    with (
        make_area(ANONYMOUS) as other,
        registered(mode=mode, features=Feature.EVENT_REMOVE) as (area, uffd),
        Job(area.drop, 0, 1) as dropping,
    ):
        dropping.blocks()
        fills = [Request.COPY, Request.ZEROPAGE, Request.CONTINUE]
        fills += [Request.POISON] * (Feature.POISON in uffd.available_features)
        fills += [Request.MOVE] * (Feature.MOVE in uffd.available_features)
        for request in fills:
            nothing = (0,) * (4 if request in (Request.COPY, Request.MOVE) else 3)
            # Without a structure to be read, or one whose result cannot be written.
            answers = ask(uffd, request, *nothing), ask_at(uffd.fd, request, 0)
            assert answers in documented("fills while the address space changes")
        assert ask_at(uffd.fd, Request.WRITEPROTECT, 0) == errno.EAGAIN
        assert uffd.try_zeropage(area.page(2), PAGE) == Outcome(0, errno.EAGAIN)
        with pytest.raises(AgainError) as failure:
            uffd.copy(area.page(2), area.pattern(2))
        assert failure.value.done == 0
        with pytest.raises(AgainError, match="read the waiting events"):
            uffd.writeprotect(area.memory)
        # The others do their work.
        assert ask(uffd, Request.API, abi.UFFD_API, 0, 0).errno == errno.EINVAL  # was made already
        uffd.register(other.memory)
        uffd.wake(other.memory)
        uffd.unregister(other.memory)
        assert next_event(uffd) == Remove(area.start, area.page(1))
        dropping.result()
        uffd.copy(area.page(2), area.pattern(2))


@pytest.mark.parametrize("request_", FILLS, ids=name)
def test_the_result_field(request_: Request) -> None:
    with filling(request_) as fill:
        # Refused before the work: untouched.
        assert ask(fill.uffd, request_, *fill.values(0, 0)) == Answer(errno.EINVAL, UNTOUCHED)
        assert fill.ask(mode=1 << 40) == Answer(errno.EINVAL, UNTOUCHED)
        assert ask_at(fill.uffd.fd, request_, 0) == errno.EFAULT
        # All of it.
        assert fill.ask(1) == Answer(0, PAGE)
        # The work's own error.
        assert fill.ask(1) == Answer(errno.EEXIST, -errno.EEXIST)
        # A part of it; the true reason comes with the next request.
        assert fill.ask(0, 3) == Answer(errno.EAGAIN, PAGE)
        assert fill.ask(1, 2) == Answer(errno.EEXIST, -errno.EEXIST)
    with filling(request_) as fill:
        assert fill.fill(1) == PAGE
        assert fill.attempt(0, 3) == Outcome(PAGE, errno.EAGAIN)
        assert fill.attempt(1, 2) == Outcome(0, errno.EEXIST)
        assert fill.attempt(2) == Outcome(PAGE, 0)
        with pytest.raises(PageExistsError) as existing:
            fill.fill(2, 2)
        assert existing.value.done == 0
    with filling(request_) as fill:
        fill.fill(1)
        with pytest.raises(AgainError) as partial:
            fill.fill(0, 3)
        assert partial.value.done == PAGE


def test_the_result_field_is_untouched_when_the_owner_has_exited() -> None:
    with exited_owner() as gone, make_area(ANONYMOUS) as source:
        source.populate()
        answer = ask(gone.uffd, Request.COPY, gone.start, source.start, PAGE, 0)
        assert answer == Answer(errno.ESRCH, UNTOUCHED)


@pytest.mark.parametrize("request_", FILLS[:-2] + FILLS[-1:], ids=name)
def test_only_those_are_woken_whose_pages_were_filled(request_: Request) -> None:
    with filling(request_) as fill:
        fill.fill(1)
        with Touch(fill.area, 0) as first, Touch(fill.area, 2):
            waiters(fill.uffd, 2)
            assert fill.attempt(0, 3) == Outcome(PAGE, errno.EAGAIN)
            first.result()
            waiters(fill.uffd, 1)
            assert fill.attempt(1, 2) == Outcome(0, errno.EEXIST)
            assert fill.uffd.fdinfo().total == 1
            fill.fill(2)


@pytest.mark.parametrize("request_", FILLS[:-2] + FILLS[-1:], ids=name)
def test_without_the_wake_they_wait_on(request_: Request) -> None:
    with filling(request_) as fill, Touch(fill.area):
        waiters(fill.uffd, 1)
        fill.fill(wake=False)
        # "Exists already" wakes nobody either: the rule is to wake then.
        assert fill.attempt() == Outcome(0, errno.EEXIST)
        assert fill.uffd.fdinfo().total == 1
        fill.uffd.wake(fill.area.start, PAGE)


def test_a_user_mode_only_descriptor_serves_users_and_fails_the_kernel() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(way=OpenWay.USER_MODE_ONLY) as uffd:
        assert uffd.user_mode_only
        uffd.register(area.memory)
        assert kernel_reads(area.start) == errno.EFAULT
        assert uffd.read_events() == []
        with Touch(area):
            assert isinstance(next_event(uffd), PageFault)
            uffd.zeropage(area.start, PAGE)
