"""Hand a userfaultfd and what it covers to another process, and take it over.

All requests on a userfaultfd act on the memory of the process that *created* it, whoever makes them. So the handler may
be another process: it cannot deadlock with the owner's GIL, and may be replaced. The owner registers its memory, and
sends the descriptor with a list of `Region` over a Unix socket; the handler receives a `Handoff` and serves:

    with handoff.receive_userfaultfd(connection) as work:      # the handler
        while not work.peer_exited():
            for fault in work.uffd.read_events(timeout_s=1):
                region = work.region_at(fault.address)
                ...

`send_userfaultfd` returns when the receiver has confirmed that it holds the descriptor; only then may the owner touch
the memory, or close its own.

**Keep a duplicate in the owner.** With the last descriptor the registrations end, and whoever waits gets zeros. With a
duplicate they wait on: send it to a new handler, which calls `redeliver` first, because messages that the dead handler
had read come again only then.

**A userfaultfd does not tell when its owner has died**: no end of file, no error in poll(2). Watch `Handoff.pidfd`.
"""

from __future__ import annotations

import errno
import json
import os
import select
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

from userfault.kernel import abi
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel._frames import (
    MAX_BODY,
    MAX_FDS,
    Deadline,
    Frame,
    FrameKind,
    HandoffError,
    HandoffMessageError,
    HandoffPeerError,
    HandoffTimeoutError,
    Peer,
    check_socket,
    close_all,
    connected_peer,
    receive_frame,
    send_frame,
)
from userfault.kernel._syscalls import ioctl
from userfault.kernel.errors import UsageError, error_from_errno
from userfault.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from types import TracebackType

__all__ = [
    "Handoff",
    "HandoffError",
    "HandoffMessageError",
    "HandoffPeerError",
    "HandoffTimeoutError",
    "Peer",
    "Region",
    "receive_userfaultfd",
    "redeliver",
    "send_userfaultfd",
]

_ADDRESS_BITS: Final = 64


@dataclass(frozen=True, slots=True)
class Region:
    """A range of registered memory, and where its bytes come from.

    Attributes:
        start: First address, in the owner's memory.
        length: In bytes.
        page_size: In bytes; 4096, or that of huge pages.
        offset: Of its first byte in the source, in bytes.
        mode: What it was registered for.
        name: Which source, where there are several.

    Raises:
        UsageError: A value that no range of memory can have.

    Example:
        >>> from userfault.kernel.handoff import Region
        >>> region = Region(start=0x7f0000000000, length=1 << 20, page_size=4096, offset=8192)
        >>> region.source_offset(0x7f0000001000)
        12288
    """

    start: int
    length: int
    page_size: int
    offset: int
    mode: abi.RegisterMode = abi.RegisterMode.MISSING
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("start", "length", "page_size", "offset", "mode"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << _ADDRESS_BITS:
                raise UsageError(f"region: {field} {value!r} is no number of 64 bits")
        if not isinstance(self.name, str):
            raise UsageError(f"region: name {self.name!r} is no text")
        if self.page_size == 0 or self.page_size & (self.page_size - 1):
            raise UsageError(f"region: page_size {self.page_size} is no power of two")
        if self.length == 0 or (self.start | self.length) & (self.page_size - 1):
            raise UsageError(
                f"region: {self.start:#x} + {self.length:#x} is empty or no multiple of its page size"
                f" {self.page_size}"
            )
        if self.start + self.length > 1 << _ADDRESS_BITS:
            raise UsageError(f"region: {self.start:#x} + {self.length:#x} lies outside of the address space")
        object.__setattr__(self, "mode", abi.RegisterMode(self.mode))

    @property
    def end(self) -> int:
        """One past the last address."""
        return self.start + self.length

    def __contains__(self, address: int) -> bool:
        """Whether an address is in it."""
        return self.start <= address < self.end

    def source_offset(self, address: int) -> int:
        """Return where in the source the byte at an address is.

        Raises:
            UsageError: The address is not in the region.
        """
        if address not in self:
            raise UsageError(f"address {address:#x} is not in the region {self.start:#x} + {self.length:#x}")
        return self.offset + address - self.start


class Handoff:
    """What was received. A context manager: at the end it closes the userfaultfd and everything that came with it.

    Attributes:
        uffd: The userfaultfd, ready for use.
        regions: What it covers, as the sender said.
        fds: Further descriptors, for example of the source.
        peer: The sender.
        pidfd: Readable when the sender has exited (`select.poll`, asyncio's `add_reader`); None if it is not visible.
        metadata: What else the sender said.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        regions: tuple[Region, ...],
        fds: tuple[int, ...],
        peer: Peer,
        pidfd: int | None,
        metadata: Mapping[str, Any],
    ) -> None:
        self.uffd: Final = uffd
        self.regions: Final = regions
        self.fds: Final = fds
        self.peer: Final = peer
        self.pidfd: Final = pidfd
        self.metadata: Final = metadata
        self._own = [*fds, *([] if pidfd is None else [pidfd])]

    def __repr__(self) -> str:
        return f"<Handoff of {len(self.regions)} regions from process {self.peer.pid}, {self.uffd!r}>"

    @property
    def peer_pid(self) -> int:
        """The sender's process id; 0 if it is not visible from here (another process namespace)."""
        return self.peer.pid

    def region_at(self, address: int) -> Region:
        """Return the region that an address is in.

        Raises:
            LookupError: It is in none.
        """
        for region in self.regions:
            if address in region:
                return region
        raise LookupError(f"address {address:#x} is in none of the {len(self.regions)} regions")

    def peer_exited(self, timeout_s: float = 0.0) -> bool:
        """Tell whether the sender has exited, waiting that long for it.

        Raises:
            UsageError: Its process is not visible from here, or this was closed.
        """
        if self.pidfd is None or self.pidfd not in self._own:
            why = "it was closed" if self.pidfd is not None else "it is in another process namespace"
            raise UsageError(f"the sender's process cannot be watched: {why}")
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(max(timeout_s, 0.0) * 1000))

    def close(self) -> None:
        """Close every descriptor. Calling it again does nothing."""
        own, self._own = self._own, []
        self.uffd.close()
        close_all(own)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def send_userfaultfd(
    sock: socket.socket,
    uffd: Userfaultfd,
    regions: Sequence[Region],
    *,
    extra_fds: Sequence[int] = (),
    metadata: Mapping[str, Any] | None = None,
    deadline_s: float | None = 10.0,
) -> Peer:
    """Send a userfaultfd with its regions, and wait until the receiver has confirmed that it has them.

    Everything stays open here. Several may be sent over one connection, one after the other.

    Args:
        sock: A connected Unix stream socket; its own timeout does not count.
        uffd: The userfaultfd, after its handshake and with the regions registered.
        regions: What it covers.
        extra_fds: Further descriptors, at most 252.
        metadata: What else the receiver should know, of JSON's types.
        deadline_s: Most seconds for all of it, None for no end.

    Returns:
        Who has it now. `os.pidfd_open(peer.pid)` tells when that process exits, and a new handler is needed.

    Raises:
        UsageError: Not a Unix stream socket, too many descriptors or regions, or metadata that is not JSON.
        HandoffPeerError: The receiver is gone, or refused; the message says why.
        HandoffTimeoutError: It did not confirm in time.
        HandoffMessageError: It answered something else.
    """
    check_socket(sock)
    if len(extra_fds) >= MAX_FDS:
        raise UsageError(f"{len(extra_fds)} extra descriptors: the kernel passes at most {MAX_FDS - 1}")
    deadline = Deadline(deadline_s)
    body = _pack(regions, 1 + len(extra_fds), metadata or {})
    try:
        send_frame(sock, FrameKind.HANDOFF, body, [uffd.fd, *extra_fds], deadline, "sending a userfaultfd")
    except HandoffPeerError as gone:
        # It may have refused the beginning, said why, and gone.
        with suppress(HandoffTimeoutError, HandoffMessageError):
            return _confirmed(sock, Deadline(0))
        raise gone
    return _confirmed(sock, deadline)


def _confirmed(sock: socket.socket, deadline: Deadline) -> Peer:
    answer = receive_frame(sock, deadline, "waiting for the receiver's confirmation")
    close_all(answer.fds)
    if answer.kind == FrameKind.REFUSED:
        raise HandoffPeerError(f"the receiver refused: {answer.body.decode(errors='replace')}")
    if answer.kind != FrameKind.ACCEPTED:
        raise HandoffMessageError(f"the receiver answered with a message of kind {answer.kind}")
    return answer.sender or connected_peer(sock)


def receive_userfaultfd(
    sock: socket.socket, *, deadline_s: float | None = 10.0, max_extra_fds: int = 16
) -> Handoff:
    """Receive a userfaultfd with its regions, and confirm it to the sender.

    Exactly one message is read; what follows it stays in the socket. Whatever fails, no descriptor stays open.

    Args:
        sock: A connected Unix stream socket; its own timeout does not count.
        deadline_s: Most seconds for all of it, None for no end.
        max_extra_fds: Most further descriptors to take.

    Raises:
        UsageError: Not a Unix stream socket.
        HandoffPeerError: The sender is gone.
        HandoffTimeoutError: It sent nothing, or not all, in time.
        HandoffMessageError: What came is no handoff, has no userfaultfd, too many descriptors, or lost some.
    """
    check_socket(sock)
    deadline = Deadline(deadline_s)
    try:
        frame = receive_frame(sock, deadline, "receiving a userfaultfd")
        work = _accept(sock, frame, max_extra_fds)
    except HandoffMessageError as error:
        if not error.foreign:
            with suppress(HandoffError):
                send_frame(sock, FrameKind.REFUSED, str(error).encode(), (), Deadline(0), "refusing")
        raise
    try:
        send_frame(sock, FrameKind.ACCEPTED, b"", (), deadline, "confirming")
    except BaseException:
        work.close()
        raise
    return work


def _pack(regions: Sequence[Region], descriptors: int, metadata: Mapping[str, Any]) -> bytes:
    message = {
        "descriptors": descriptors,
        "regions": [
            {field.name: getattr(region, field.name) for field in fields(Region)} for region in regions
        ],
        "metadata": dict(metadata),
    }
    try:
        body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"metadata must be of JSON's types: {error}") from None
    if len(body) > MAX_BODY:
        raise UsageError(f"{len(body)} bytes of regions and metadata: a message may have {MAX_BODY}")
    return body


def _unpack(body: bytes) -> tuple[int, tuple[Region, ...], dict[str, Any]]:
    """Read a body. Keys that are not known are passed over: a later version may have added them."""

    def fault(what: str) -> HandoffMessageError:
        return HandoffMessageError(f"receiving a userfaultfd: {what} in a message that begins {body[:60]!r}")

    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise fault(f"no JSON ({error})") from None
    if not isinstance(message, dict):
        raise fault(f"a {type(message).__name__} instead of an object")
    descriptors, listed = message.get("descriptors"), message.get("regions")
    metadata = message.get("metadata", {})
    if not isinstance(descriptors, int) or not isinstance(listed, list) or not isinstance(metadata, dict):
        raise fault("no number of descriptors, list of regions or object of metadata")
    names = {field.name for field in fields(Region)}
    regions = []
    for number, values in enumerate(listed):
        if not isinstance(values, dict):
            raise fault(f"region {number} is a {type(values).__name__}")
        try:
            regions.append(Region(**{name: value for name, value in values.items() if name in names}))
        except (UsageError, TypeError) as error:
            raise fault(f"region {number} is wrong ({error})") from None
    return descriptors, tuple(regions), metadata


def _accept(sock: socket.socket, frame: Frame, max_extra_fds: int) -> Handoff:
    """Make the object of a frame, or close its descriptors."""
    fds = frame.fds
    try:
        if frame.kind != FrameKind.HANDOFF:
            raise HandoffMessageError(f"receiving a userfaultfd: a message of kind {frame.kind} came")
        promised, regions, metadata = _unpack(frame.body)
        if len(fds) != promised or not fds:
            raise HandoffMessageError(
                f"receiving a userfaultfd: {len(fds)} descriptors came, the message tells of {promised}"
            )
        if len(fds) - 1 > max_extra_fds:
            raise HandoffMessageError(
                f"receiving a userfaultfd: {len(fds) - 1} further descriptors came, at most {max_extra_fds} are taken"
            )
        try:
            uffd = Userfaultfd.from_fd(fds[0])
        except UsageError:
            what = os.readlink(f"/proc/self/fd/{fds[0]}")
            raise HandoffMessageError(
                f"receiving a userfaultfd: the first descriptor is {what}, no userfaultfd"
            ) from None
        peer = frame.sender or connected_peer(sock)
        try:
            pidfd = _open_pidfd(peer.pid)
        except BaseException:
            fds = fds[1:]
            uffd.close()
            raise
    except BaseException:
        close_all(fds)
        raise
    return Handoff(uffd, regions, tuple(fds[1:]), peer, pidfd, metadata)


def _open_pidfd(pid: int) -> int | None:
    """Open the sender's process. It cannot be another's by now: the sender lives, and waits for the confirmation.

    Raises:
        HandoffPeerError: It does not live any more.
    """
    if pid == 0:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise HandoffPeerError(f"receiving a userfaultfd: its sender, process {pid}, has exited") from None


def redeliver(uffd: Userfaultfd) -> None:
    """Have every message come again that was read and not answered, for a handler that takes over from a dead one.

    A message is read once; the thread it is about goes on waiting. Woken, it finds its page still missing (or
    protected) and faults again, which gives a new message. There is no list of registrations to wake by, and it needs
    none: this wakes all waiters of the userfaultfd, wherever they are.

    Other events (fork, remap, remove, unmap) that the dead handler had read do not come again: whoever asked for
    those compares its regions with what is registered still (`pagemap.vm_flags`).

    Raises:
        ClosedError: The userfaultfd is closed.
        InvalidRequestError: Its handshake was not made yet.
    """
    # The range has to end where the owner's address space does, which depends on its architecture and is told
    # nowhere: found bit by bit, from the highest. Each part that is accepted has been woken.
    start = 0
    for bit in reversed(range(PAGE_SIZE.bit_length() - 1, _ADDRESS_BITS)):
        length = 1 << bit
        try:
            ioctl(uffd.fd, abi.Request.WAKE, abi.RANGE.pack(start, length))
        except OSError as failure:
            if failure.errno != errno.EINVAL:
                raise error_from_errno(failure.errno or errno.EIO, call="UFFDIO_WAKE") from None
        else:
            start += length
    if not start:
        raise error_from_errno(errno.EINVAL, call="UFFDIO_WAKE", remedy="make the handshake first")
