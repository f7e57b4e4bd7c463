"""Frames with file descriptors over a Unix stream socket, each way with a deadline.

A frame is a header of twelve bytes, little-endian (magic "uffd", version, kind, length of the body), and the body.
Descriptors travel beside its first byte, with the sender's credentials, which the kernel checks: on a socket pair that
a parent made for two children, SO_PEERCRED would name the parent.

A stream has no message borders. A frame may arrive in pieces, with its descriptors beside any of them, and the next
frame may be right behind it; so exactly as much is read as belongs to the frame. Whatever goes wrong, no descriptor
that has arrived stays open.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from userfault.errors import UserfaultError
from userfault.kernel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "MAX_BODY",
    "MAX_FDS",
    "VERSION",
    "Deadline",
    "Frame",
    "FrameKind",
    "HandoffError",
    "HandoffMessageError",
    "HandoffPeerError",
    "HandoffTimeoutError",
    "Peer",
    "check_socket",
    "close_all",
    "connected_peer",
    "receive_frame",
    "send_frame",
]

VERSION: Final = 1
MAX_BODY: Final = 16 << 20  # some hundred thousand regions
MAX_FDS: Final = 253  # SCM_MAX_FD of include/net/scm.h: the kernel sends no more beside one byte
_MAGIC: Final = b"uffd"
_HEADER: Final = struct.Struct("<4sHHI")
_CREDENTIALS: Final = struct.Struct("=iII")
# Room for everything that can come beside a byte; what did not fit would be lost, and only a flag tells of it.
_ANCILLARY: Final = socket.CMSG_SPACE(4 * MAX_FDS) + socket.CMSG_SPACE(_CREDENTIALS.size) + 512


class HandoffError(UserfaultError):
    """A userfaultfd was not handed over. Close the socket: where the next message begins is not known any more."""


class HandoffPeerError(HandoffError, ConnectionError):
    """The peer is gone, or refused what it was sent; the message says why it did."""


class HandoffTimeoutError(HandoffError, TimeoutError):
    """The deadline was over before the peer had done its part."""


class HandoffMessageError(HandoffError, ValueError):
    """What came is no handoff, or is not whole; the message names what came.

    Attributes:
        foreign: Whether it was no message of this protocol at all.
    """

    foreign: bool = False


class FrameKind(IntEnum):
    """What a frame says."""

    HANDOFF = 1
    ACCEPTED = 2  # the receiver has it: only now may the sender go on
    REFUSED = 3  # the body is the reason


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel knows it.

    Attributes:
        pid: Process id; 0 if it is not visible from here (another process namespace).
        uid: Effective user id.
        gid: Effective group id.
    """

    pid: int
    uid: int
    gid: int


@dataclass(slots=True)
class Frame:
    """A frame that came. Its descriptors are the holder's to close; its sender is None where it gave no name."""

    kind: int = 0
    body: bytes = b""
    fds: list[int] = field(default_factory=list)
    sender: Peer | None = None


class Deadline:
    """One end for a sequence of waits."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds: Final = seconds
        self._end: Final = None if seconds is None else time.monotonic() + seconds

    def wait(self, sock: socket.socket, event: int, what: str) -> None:
        """Wait until the socket can be read or written, or the peer is gone.

        Raises:
            HandoffTimeoutError: The deadline is over.
        """
        poller = select.poll()
        poller.register(sock, event)
        left = None if self._end is None else self._end - time.monotonic()
        # Rounded up: a wait that ends early would spin. A socket that is ready is used even if time is up.
        if not poller.poll(None if left is None else max(-int(-left * 1000 // 1), 0)):
            raise HandoffTimeoutError(f"{what}: not within {self.seconds} s")


def check_socket(sock: socket.socket) -> None:
    """Refuse what could not carry a frame.

    Raises:
        UsageError: No Unix stream socket.
    """
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise UsageError(
            f"descriptors travel over Unix stream sockets only, this one is {sock.family!r}, {sock.type!r}:"
            " use socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) or socket.socketpair()"
        )


def connected_peer(sock: socket.socket) -> Peer:
    """Name who made the connection: for frames whose sender gave no credentials with them."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(data))


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody shall have."""
    for fd in fds:
        os.close(fd)


def _gone(what: str, failure: OSError) -> HandoffPeerError:
    return HandoffPeerError(f"{what}: the peer is gone ({failure.strerror or failure})")


def send_frame(
    sock: socket.socket, kind: FrameKind, body: bytes, fds: Sequence[int], deadline: Deadline, what: str
) -> None:
    """Send one frame with descriptors; they stay open here.

    Raises:
        HandoffPeerError: The peer is gone.
        HandoffTimeoutError: It does not read.
    """
    credentials = _CREDENTIALS.pack(os.getpid(), os.geteuid(), os.getegid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
    if fds:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds)))
    rest = memoryview(_HEADER.pack(_MAGIC, VERSION, kind, len(body)) + body)
    while rest:
        deadline.wait(sock, select.POLLOUT, what)
        try:
            # No SIGPIPE, and no waiting here: the socket's own timeout is not this deadline.
            sent = sock.sendmsg([rest], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except (BlockingIOError, TimeoutError):
            continue
        except ConnectionError as failure:
            raise _gone(what, failure) from None
        except OSError as failure:
            if failure.errno == errno.ETOOMANYREFS:
                raise HandoffPeerError(
                    f"{what}: too many descriptors are on their way already: the peer does not receive them"
                ) from None
            raise HandoffPeerError(f"{what}: {failure.strerror or failure}") from None
        rest = rest[sent:]
        ancillary = []  # they went with the first byte


@contextmanager
def _with_credentials(sock: socket.socket) -> Iterator[None]:
    """Have the kernel pass the sender's credentials on while this lasts."""
    before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, before)


def _receive(sock: socket.socket, count: int, frame: Frame, deadline: Deadline, what: str) -> bytes:
    """Return exactly so many bytes; what comes beside them goes into the frame."""
    data = bytearray()
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    while len(data) < count:
        deadline.wait(sock, select.POLLIN, what)
        try:
            piece, ancillary, answer, _ = sock.recvmsg(count - len(data), _ANCILLARY, flags)
        except (BlockingIOError, TimeoutError):
            continue
        except OSError as failure:
            raise _gone(what, failure) from None
        _take(ancillary, frame)
        if len(frame.fds) > MAX_FDS:
            raise HandoffMessageError(f"{what}: more than {MAX_FDS} descriptors came")
        if answer & socket.MSG_CTRUNC:
            raise HandoffMessageError(
                f"{what}: descriptors were lost on the way, {len(frame.fds)} came (is no descriptor free? ulimit -n)"
            )
        if not piece:
            raise HandoffPeerError(
                f"{what}: the peer closed the connection after {len(data)} of {count} bytes"
            )
        data += piece
    return bytes(data)


def _take(ancillary: Sequence[tuple[int, int, bytes]], frame: Frame) -> None:
    for level, kind, value in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            frame.fds += (fd for (fd,) in struct.iter_unpack("=i", value[: len(value) & ~3]))
        elif kind == socket.SCM_CREDENTIALS and len(value) == _CREDENTIALS.size:
            pid, uid, gid = _CREDENTIALS.unpack(value)
            if pid:
                frame.sender = Peer(pid, uid, gid)


def receive_frame(sock: socket.socket, deadline: Deadline, what: str) -> Frame:
    """Receive one frame.

    Raises:
        HandoffPeerError: The peer is gone.
        HandoffTimeoutError: It sent too little in time.
        HandoffMessageError: Not this protocol or version, too long, or descriptors were lost.
    """
    frame = Frame()
    try:
        with _with_credentials(sock):
            header = _receive(sock, _HEADER.size, frame, deadline, what)
            magic, version, frame.kind, length = _HEADER.unpack(header)
            if magic != _MAGIC:
                error = HandoffMessageError(
                    f"{what}: a message of another protocol, beginning with {header!r}"
                )
                error.foreign = True
                raise error
            if version != VERSION:
                raise HandoffMessageError(
                    f"{what}: a message of version {version}, this is version {VERSION}: update the older side"
                )
            if length > MAX_BODY:
                raise HandoffMessageError(
                    f"{what}: a message of {length} bytes, at most {MAX_BODY} are taken"
                )
            frame.body = _receive(sock, length, frame, deadline, what)
    except BaseException:
        close_all(frame.fds)
        raise
    return frame
