"""Every way in which handing a userfaultfd over can go wrong: named, typed, and without a descriptor left open."""

from __future__ import annotations

import json
import os
import pickle
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from support.handoff import DEADLINE_S, GOOD, body, header, refusal, speak
from support.kernel import PAGE, Link, subject
from userfault.kernel import RegisterMode, Userfaultfd
from userfault.kernel._frames import MAX_BODY, MAX_FDS
from userfault.kernel.errors import UsageError
from userfault.kernel.handoff import (
    HandoffError,
    HandoffMessageError,
    HandoffPeerError,
    HandoffTimeoutError,
    Region,
    receive_userfaultfd,
    send_userfaultfd,
)

OVER_SOON_S = 0.02
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# ---- what a receiver refuses


WRONG: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"\x00\xff garbage", "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "a list": (b"[1, 2]", "a list instead of an object"),
    "empty": (b"", "no JSON"),
    "no count": (json.dumps({"regions": []}).encode(), "no number of descriptors"),
    "no regions": (json.dumps({"descriptors": 1}).encode(), "no number of descriptors"),
    "metadata": (body(metadata=[1]), "object of metadata"),
    "region of text": (body(regions=["x"]), "region 0 is a str"),
    "region without start": (body(regions=[GOOD, {"length": PAGE}]), "region 1 is wrong"),
    "negative": (body(regions=[{**GOOD, "start": -PAGE}]), "no number of 64 bits"),
    "a float": (body(regions=[{**GOOD, "offset": 1.5}]), "no number of 64 bits"),
    "too large": (body(regions=[{**GOOD, "length": 1 << 64}]), "no number of 64 bits"),
    "not aligned": (body(regions=[{**GOOD, "start": 17}]), "no multiple of its page size"),
    "name": (body(regions=[{**GOOD, "name": 3}]), "no text"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_body_that_is_wrong_is_refused_and_named(pair: Pair, what: str) -> None:
    text, reason = WRONG[what]
    with Userfaultfd() as uffd:
        speak(pair[1], header(text) + text, [uffd.fd])
        with pytest.raises(HandoffMessageError, match=reason) as caught:
            receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)
    assert isinstance(caught.value, ValueError)
    assert not caught.value.foreign
    assert refusal(pair[1]) == str(caught.value)


def test_keys_of_a_later_version_are_passed_over(pair: Pair) -> None:
    text = body(regions=[{**GOOD, "colour": "blue", "mode": 1 << 20 | 1}], weather="fine")
    with Userfaultfd() as uffd:
        speak(pair[1], header(text) + text, [uffd.fd])
        with receive_userfaultfd(pair[0], deadline_s=DEADLINE_S) as work:
            assert work.regions[0].mode == 1 << 20 | RegisterMode.MISSING
            # Without credentials of its own with the message, the sender is who made the connection.
            assert work.peer_pid == os.getpid()


def test_descriptors_may_come_beside_any_byte(pair: Pair) -> None:
    text = body()
    with Userfaultfd() as uffd:
        pair[1].sendall(header(text) + text[:3])
        speak(pair[1], text[3:], [uffd.fd])
        with receive_userfaultfd(pair[0], deadline_s=DEADLINE_S) as work:
            assert work.uffd.features == uffd.features


@pytest.mark.parametrize(
    ("fds", "promised", "reason"),
    [
        (0, 1, "0 descriptors came, the message tells of 1"),
        (0, 0, "0 descriptors came"),
        (2, 3, "2 descriptors came, the message tells of 3"),
        (3, 1, "3 descriptors came, the message tells of 1"),
        (6, 6, "5 further descriptors came, at most 4 are taken"),
        (MAX_FDS, MAX_FDS, "at most 4 are taken"),
    ],
)
def test_the_number_of_descriptors_must_be_right(pair: Pair, fds: int, promised: int, reason: str) -> None:
    text = body(descriptors=promised)
    with Userfaultfd() as uffd:
        speak(pair[1], header(text) + text, [uffd.fd] * fds)
        with pytest.raises(HandoffMessageError, match=reason):
            receive_userfaultfd(pair[0], max_extra_fds=4, deadline_s=DEADLINE_S)
    assert reason in refusal(pair[1])


def test_more_descriptors_than_a_message_can_have(pair: Pair) -> None:
    text = body()
    speak(pair[1], header(text)[:1], [0] * MAX_FDS)
    speak(pair[1], header(text)[1:] + text, [0] * MAX_FDS)
    with pytest.raises(HandoffMessageError, match="more than 253"):
        receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)


def test_the_first_descriptor_must_be_a_userfaultfd(pair: Pair) -> None:
    text = body()
    speak(pair[1], header(text) + text, [pair[1].fileno()])
    with pytest.raises(HandoffMessageError, match="the first descriptor is socket:"):
        receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)


def receive_with_one_free_descriptor(_link: Link, sock: socket.socket) -> tuple[str, bool]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, hard))
    taken = []
    with suppress(OSError):
        while True:
            taken.append(os.dup(0))
    os.close(taken.pop())
    before = os.listdir("/proc/self/fd")  # takes the free one while it lists
    try:
        receive_userfaultfd(sock, deadline_s=DEADLINE_S)
    except HandoffMessageError as error:
        return str(error), os.listdir("/proc/self/fd") == before
    return "received", False


def test_descriptors_that_got_lost_are_missed_and_the_others_closed(pair: Pair) -> None:
    text = body(descriptors=4)
    with Userfaultfd() as uffd, subject(receive_with_one_free_descriptor, pair[0]) as receiver:
        speak(pair[1], header(text) + text, [uffd.fd, 0, 0, 0])
        message, clean = receiver.receive()
        assert "descriptors were lost on the way" in message
        assert clean


def test_another_protocol_is_told_apart_and_not_answered(pair: Pair) -> None:
    firecracker = b'[{"base_host_virt_addr":139942838435840,"size":134217728,"offset":0,"page_size":4096}]'
    with Userfaultfd() as uffd:
        speak(pair[1], firecracker, [uffd.fd])
        with pytest.raises(HandoffMessageError, match=r"another protocol, beginning with b'\[") as caught:
            receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)
    assert caught.value.foreign
    with pytest.raises(BlockingIOError):
        pair[1].recv(1, socket.MSG_DONTWAIT)


def test_another_version_is_refused_by_number(pair: Pair) -> None:
    with Userfaultfd() as uffd:
        speak(pair[1], header(b"", version=9), [uffd.fd])
        with pytest.raises(HandoffMessageError, match="version 9, this is version 1"):
            receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)
    assert "version 9" in refusal(pair[1])


def test_a_message_too_long_is_refused_unread(pair: Pair) -> None:
    speak(pair[1], header(b"", length=MAX_BODY + 1))
    with pytest.raises(HandoffMessageError, match=f"{MAX_BODY + 1} bytes"):
        receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)


def test_an_answer_is_no_handoff(pair: Pair) -> None:
    speak(pair[1], header(b"", kind=2), [0])
    with pytest.raises(HandoffMessageError, match="kind 2"):
        receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)


@pytest.mark.parametrize("length", [0, 5, 12, 20])
def test_a_peer_that_goes_away_in_the_middle(pair: Pair, length: int) -> None:
    text = body(metadata={"a": "long text"})
    with Userfaultfd() as uffd:
        if length:
            speak(pair[1], (header(text) + text)[:length], [uffd.fd])
        pair[1].close()
        with pytest.raises(HandoffPeerError, match="closed the connection") as caught:
            receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("length", [0, 5, 12, 20])
def test_a_peer_that_stops_in_the_middle(pair: Pair, length: int) -> None:
    text = body(metadata={"a": "long text"})
    with Userfaultfd() as uffd:
        if length:
            speak(pair[1], (header(text) + text)[:length], [uffd.fd])
        with pytest.raises(HandoffTimeoutError, match="receiving a userfaultfd: not within") as caught:
            receive_userfaultfd(pair[0], deadline_s=OVER_SOON_S)
    assert isinstance(caught.value, TimeoutError)


def test_a_sender_that_is_gone_before_the_confirmation(pair: Pair) -> None:
    text = body()
    with Userfaultfd() as uffd:
        speak(pair[1], header(text) + text, [uffd.fd])
        pair[1].close()
        with pytest.raises(HandoffPeerError, match="confirming: the peer is gone"):
            receive_userfaultfd(pair[0], deadline_s=DEADLINE_S)


# ---- what a sender meets


def test_a_refusal_tells_the_sender_why(pair: Pair) -> None:
    speak(pair[1], header(b"too warm", kind=3) + b"too warm")
    with Userfaultfd() as uffd, pytest.raises(HandoffPeerError, match="refused: too warm"):
        send_userfaultfd(pair[0], uffd, [], deadline_s=DEADLINE_S)


def test_a_refusal_is_found_even_when_the_receiver_is_gone_already(pair: Pair) -> None:
    speak(pair[1], header(b"too warm", kind=3) + b"too warm")
    pair[1].close()
    with Userfaultfd() as uffd, pytest.raises(HandoffPeerError, match="refused: too warm"):
        send_userfaultfd(pair[0], uffd, [], deadline_s=DEADLINE_S)


def test_a_receiver_that_is_gone(pair: Pair) -> None:
    pair[1].close()
    with Userfaultfd() as uffd, pytest.raises(HandoffPeerError):
        send_userfaultfd(pair[0], uffd, [], deadline_s=DEADLINE_S)


def test_a_receiver_that_does_not_confirm(pair: Pair) -> None:
    with Userfaultfd() as uffd, pytest.raises(HandoffTimeoutError, match="confirmation: not within"):
        send_userfaultfd(pair[0], uffd, [], deadline_s=OVER_SOON_S)


def test_a_receiver_that_does_not_read(pair: Pair) -> None:
    metadata = {"much": "x" * (4 << 20)}
    with Userfaultfd() as uffd, pytest.raises(HandoffTimeoutError, match="sending a userfaultfd: not within"):
        send_userfaultfd(pair[0], uffd, [], metadata=metadata, deadline_s=OVER_SOON_S)


def test_an_answer_that_is_none(pair: Pair) -> None:
    speak(pair[1], header(b"", kind=1), [0])
    with Userfaultfd() as uffd, pytest.raises(HandoffMessageError, match="kind 1"):
        send_userfaultfd(pair[0], uffd, [], deadline_s=DEADLINE_S)


class Drip(socket.socket):
    """A socket that moves three bytes at a time."""

    def recvmsg(self, size: int, *more: Any) -> Any:
        return super().recvmsg(min(size, 3), *more)

    def sendmsg(self, buffers: Any, *more: Any) -> int:
        return super().sendmsg([memoryview(buffers[0])[:3]], *more)


def test_short_reads_and_writes_are_gone_on_with(pair: Pair) -> None:
    regions = [Region(PAGE * 16, PAGE * 4, PAGE, 0, RegisterMode.MISSING | RegisterMode.WP, "ä")]
    speak(pair[1], header(b"", kind=2))
    with Userfaultfd() as uffd, Drip(fileno=os.dup(pair[0].fileno())) as drip:
        peer = send_userfaultfd(drip, uffd, regions, extra_fds=[0, 1], deadline_s=DEADLINE_S)
        assert peer.pid == os.getpid()
    with (
        Drip(fileno=os.dup(pair[1].fileno())) as drip,
        receive_userfaultfd(drip, deadline_s=DEADLINE_S) as work,
    ):
        assert work.regions == tuple(regions)
        assert len(work.fds) == 2
    assert pair[0].recv(64) == header(b"", kind=2)


def test_the_sockets_own_timeout_does_not_count(pair: Pair) -> None:
    for end in pair:
        end.settimeout(0)
    with pytest.raises(HandoffTimeoutError):
        receive_userfaultfd(pair[0], deadline_s=OVER_SOON_S)
    assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0


# ---- wrong use


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_only_unix_stream_sockets_will_do(kind: socket.SocketKind) -> None:
    one, other = socket.socketpair(type=kind)
    with one, other, pytest.raises(UsageError, match="Unix stream sockets only"):
        receive_userfaultfd(one)
    with (
        closing(socket.socket(socket.AF_INET)) as internet,
        Userfaultfd() as uffd,
        pytest.raises(UsageError, match="AF_INET"),
    ):
        send_userfaultfd(internet, uffd, [])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"metadata": {"a": {1, 2}}}, "JSON"),
        ({"metadata": {"a": float("nan")}}, "JSON"),
        ({"metadata": {"a": "x" * MAX_BODY}}, "a message may have"),
        ({"extra_fds": [0] * MAX_FDS}, "at most 252"),
    ],
)
def test_what_cannot_be_sent_is_refused_before(pair: Pair, arguments: dict[str, Any], reason: str) -> None:
    with Userfaultfd() as uffd, pytest.raises(UsageError, match=reason):
        send_userfaultfd(pair[0], uffd, [], **arguments)
    with pytest.raises(BlockingIOError):
        pair[1].recv(1, socket.MSG_DONTWAIT)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (HandoffPeerError, ConnectionError),
        (HandoffTimeoutError, TimeoutError),
        (HandoffMessageError, ValueError),
    ],
)
def test_errors_are_built_ins_too_and_can_be_pickled(
    kind: Callable[[str], HandoffError], builtin: type[Exception]
) -> None:
    error = kind("why")
    assert isinstance(error, HandoffError)
    assert isinstance(error, builtin)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "why"
