"""Handing a userfaultfd over, to other processes for real. What can go wrong is in `test_handoff_errors`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from support.handoff import DEADLINE_S, GOOD, body, header, speak
from support.kernel import PAGE, Area, Link, Subject, Touch, make_area, next_event, subject, waiters
from userfault.errors import ClosedError
from userfault.kernel import Mapping, RegisterMode, Userfaultfd, serving
from userfault.kernel.errors import InvalidRequestError, UsageError
from userfault.kernel.events import PageFault
from userfault.kernel.handoff import (
    Handoff,
    Peer,
    Region,
    receive_userfaultfd,
    redeliver,
    send_userfaultfd,
)
from userfault.kernel.mapping import MemoryKind

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def region_of(memory: Mapping, name: str = "", offset: int = 0) -> Region:
    return Region(memory.address, memory.nbytes, PAGE, offset, RegisterMode.MISSING, name)


def content(number: int) -> bytes:
    return (b"page %d of the source. " % number).ljust(32, b".") * (PAGE // 32)


# ---- two processes


def own_and_read(link: Link, sock: socket.socket, pages: int) -> list[bytes]:
    """The owner of the memory: hands its userfaultfd over and reads every page."""
    with Userfaultfd() as uffd, Mapping.anonymous(pages * PAGE) as memory:
        uffd.register(memory)
        receiver = send_userfaultfd(
            sock, uffd, [region_of(memory, "weights", 7 * PAGE)],
            metadata={"source": "a file", "sizes": [1, 2]}, extra_fds=[0], deadline_s=DEADLINE_S,
        )  # fmt: skip
        link.send((receiver.pid, uffd.features))
        # The handler is another process: a touch that keeps the GIL is all right.
        return [bytes(memory.view(page * PAGE, 32)) for page in range(pages)]


def test_another_process_serves_the_senders_memory(pair: Pair) -> None:
    ours, theirs = pair
    with (
        subject(own_and_read, theirs, 4) as owner,
        receive_userfaultfd(ours, deadline_s=DEADLINE_S) as work,
    ):
        assert work.peer == Peer(owner.pid, os.geteuid(), os.getegid())
        assert work.metadata == {"source": "a file", "sizes": [1, 2]}
        assert [os.fstat(fd).st_rdev for fd in work.fds] == [os.fstat(0).st_rdev]
        assert not os.get_inheritable(work.uffd.fd)
        assert not any(os.get_inheritable(fd) for fd in work.fds)
        assert owner.receive() == (os.getpid(), work.uffd.features)
        (region,) = work.regions
        assert (region.length, region.offset, region.name) == (4 * PAGE, 7 * PAGE, "weights")
        for number in range(4):
            fault = next_event(work.uffd)
            assert isinstance(fault, PageFault)
            assert work.region_at(fault.address) is region
            assert region.source_offset(fault.address) == (7 + number) * PAGE
            assert not work.peer_exited()
            serving.copy_all(work.uffd, fault.address, content(number))
        assert owner.receive() == [content(number)[:32] for number in range(4)]
        assert owner.wait() == 0
        # The userfaultfd itself says nothing of its owner's end.
        assert work.peer_exited(DEADLINE_S)
        assert work.uffd.poll(0) is False


def wait_in_a_fault(link: Link, socks: list[socket.socket]) -> bytes:
    """An owner that hands the same userfaultfd to one handler after the other, while a thread of it waits."""
    with Userfaultfd() as uffd, make_area(MemoryKind.ANONYMOUS) as area:
        uffd.register(area.memory)
        touch: Touch | None = None
        for sock in socks:
            send_userfaultfd(sock, uffd, [region_of(area.memory)], deadline_s=DEADLINE_S)
            touch = touch or Touch(area, 1)
            link.receive()
        assert touch is not None
        return touch.result()


def take_and_stall(link: Link, sock: socket.socket) -> None:
    """A handler that reads a message, and then answers it no more."""
    with receive_userfaultfd(sock, deadline_s=DEADLINE_S) as work:
        link.send(next_event(work.uffd))
        link.receive()


def test_a_new_handler_takes_over_from_one_that_was_killed(pair: Pair) -> None:
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        owner: Subject = stack.enter_context(subject(wait_in_a_fault, [pair[1], theirs]))
        handler: Subject = stack.enter_context(subject(take_and_stall, pair[0]))
        fault = handler.receive()
        handler.kill()
        owner.send("it is dead")
        work = stack.enter_context(receive_userfaultfd(ours, deadline_s=DEADLINE_S))
        waiters(work.uffd, 1)
        info = work.uffd.fdinfo()
        assert (info.pending, info.total) == (0, 1)  # read by the dead, answered by nobody
        assert work.uffd.read_events() == []
        redeliver(work.uffd)
        assert next_event(work.uffd) == fault
        serving.copy_all(work.uffd, fault.address, content(1))
        owner.send("it is served")
        assert owner.receive() == content(1)[:32]
        assert owner.wait() == 0


def send_many(link: Link, sock: socket.socket, regions: list[Region]) -> str:
    with Userfaultfd() as uffd:
        for _ in range(2):
            send_userfaultfd(sock, uffd, regions, deadline_s=DEADLINE_S)
    return "sent"


def test_a_message_may_be_longer_than_a_socket_holds_and_others_may_follow(pair: Pair) -> None:
    regions = [
        Region(number * PAGE, PAGE, PAGE, number, name=f"region {number}") for number in range(1, 3000)
    ]
    with subject(send_many, pair[1], regions) as sender:
        for _ in range(2):
            with receive_userfaultfd(pair[0], deadline_s=DEADLINE_S) as work:
                assert list(work.regions) == regions
        assert sender.receive() == "sent"


# ---- redelivery


@pytest.mark.parametrize("address", [None, 3 << 30, (1 << 47) - (1 << 24)], ids=["any", "low", "high"])
def test_waiters_are_asked_again_wherever_they_are(address: int | None) -> None:
    with Userfaultfd() as uffd, Mapping.anonymous(PAGE, address=address) as memory:
        uffd.register(memory)
        with Touch(Area(MemoryKind.ANONYMOUS, memory, 1)):
            first = next_event(uffd)
            assert uffd.read_events() == []
            redeliver(uffd)
            assert next_event(uffd) == first
            uffd.zeropage(memory)


@pytest.mark.needs_feature("PAGEFAULT_FLAG_WP")
def test_writers_are_asked_again() -> None:
    with Userfaultfd() as uffd, make_area(MemoryKind.ANONYMOUS) as area:
        area.populate()
        uffd.register(area.memory, mode=RegisterMode.WP)
        uffd.writeprotect(area.memory)
        with Touch(area, 2, data=b"new"):
            first = next_event(uffd)
            redeliver(uffd)
            assert next_event(uffd) == first
            uffd.writeprotect(area.memory, protect=False)


def test_redelivery_needs_an_open_userfaultfd_after_its_handshake() -> None:
    with Userfaultfd(handshake=False) as uffd, pytest.raises(InvalidRequestError, match="handshake"):
        redeliver(uffd)
    with pytest.raises(ClosedError):
        redeliver(uffd)


# ---- what one has of it


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"start": 1}, "no multiple of its page size"),
        ({"length": 0}, "empty"),
        ({"page_size": 0}, "no power of two"),
        ({"page_size": 3 * PAGE}, "no power of two"),
        ({"offset": -1}, "no number of 64 bits"),
        ({"start": True}, "no number of 64 bits"),
        ({"start": (1 << 64) - PAGE, "length": 2 * PAGE}, "outside of the address space"),
    ],
)
def test_regions_that_cannot_be(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Region(**{**GOOD, **change})


def test_regions_know_their_addresses() -> None:
    region = Region(16 * PAGE, 2 * PAGE, PAGE, 100)
    assert region.end == 18 * PAGE
    assert 16 * PAGE in region
    assert 18 * PAGE - 1 in region
    assert 18 * PAGE not in region
    assert region.source_offset(17 * PAGE) == 100 + PAGE
    with pytest.raises(UsageError, match="is not in the region"):
        region.source_offset(18 * PAGE)


def received(pair: Pair) -> Handoff:
    text = body(regions=[GOOD])
    with Userfaultfd() as uffd:
        speak(pair[1], header(text) + text, [uffd.fd])
        return receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)


def test_closing_closes_everything_and_twice_is_once(pair: Pair) -> None:
    work = received(pair)
    with pytest.raises(LookupError, match="none of the 1 regions"):
        work.region_at(5)
    assert "1 regions" in repr(work)
    work.close()
    work.close()
    assert work.uffd.closed
    with pytest.raises(UsageError, match="it was closed"):
        work.peer_exited()


def test_a_sender_that_is_not_visible_cannot_be_watched() -> None:
    with (
        Userfaultfd() as uffd,
        Handoff(uffd, (), (), Peer(0, 0, 0), None, {}) as work,
        pytest.raises(UsageError, match="another process namespace"),
    ):
        work.peer_exited()
