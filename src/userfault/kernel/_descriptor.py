"""The descriptor of a `Userfaultfd`: what it is, what was negotiated, and its end."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from userfault.errors import ClosedError
from userfault.kernel import abi, events
from userfault.kernel._handshake import Negotiated
from userfault.kernel._opening import OpenWay
from userfault.kernel.errors import NotInitialisedError, UsageError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Descriptor", "FdInfo", "read_fdinfo", "wake_up"]

_INITIALISED: Final = 1 << 31  # fdinfo shows the kernel's own mark that the handshake was made


@dataclass(frozen=True, slots=True)
class FdInfo:
    """`/proc/self/fdinfo` of a userfaultfd.

    Attributes:
        pending: Faults that nobody has read yet.
        total: Threads that wait in a fault, read or unread.
        features: Negotiated features.
        operations: Requests that the kernel knows.
        initialised: Whether the handshake was made.
    """

    pending: int
    total: int
    features: abi.Feature
    operations: abi.Operation
    initialised: bool


class Descriptor:
    """The state that all parts of a `Userfaultfd` share."""

    def _begin(self, fd: int, way: OpenWay | None, *, nonblocking: bool) -> None:
        self._fd = fd
        self._ready = False  # the handshake was made, and it is not closed
        self._way = way
        self._nonblocking = nonblocking
        self._negotiated = Negotiated(abi.Feature(0), abi.Feature(0), abi.Operation(0))
        self._backlog: deque[events.AnyEvent] = deque()
        self._sleepers: set[Any] = set()

    @property
    def fd(self) -> int:
        """The file descriptor.

        Raises:
            ClosedError: It is closed.
        """
        if self._fd < 0:
            raise ClosedError("the userfaultfd is closed")
        return self._fd

    def fileno(self) -> int:
        """Return the file descriptor, so that `select`, `selectors` and asyncio take the object itself."""
        return self.fd

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._fd < 0

    @property
    def initialised(self) -> bool:
        """Whether the handshake was made."""
        return self._ready

    @property
    def features(self) -> abi.Feature:
        """What was negotiated (`WP_UNPOPULATED` comes with `WP_ASYNC`)."""
        return self._negotiated.features

    @property
    def available_features(self) -> abi.Feature:
        """What the kernel offers. After `from_fd` only what was negotiated is known."""
        return self._negotiated.available

    @property
    def available_operations(self) -> abi.Operation:
        """Requests on the descriptor that the handshake offered."""
        return self._negotiated.operations

    @property
    def user_mode_only(self) -> bool | None:
        """Whether faults of system calls fail with EFAULT instead of being trapped; None if it is not known."""
        return None if self._way is None else self._way is OpenWay.USER_MODE_ONLY

    @property
    def backlog(self) -> int:
        """Events that were read already, by `serving`, and that the next `read_events` returns first."""
        return len(self._backlog)

    def fdinfo(self) -> FdInfo:
        """Read what the kernel tells of the descriptor: how many threads wait, and what was negotiated.

        Raises:
            ClosedError: It is closed.
        """
        return read_fdinfo(self.fd)

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<Userfaultfd, closed>"
        state = f"features {self.features!r}" if self._ready else "before the handshake"
        return f"<Userfaultfd {self._fd}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor. Calling it again does nothing.

        With the last descriptor the ranges are no longer registered, and **whoever waits for a missing page gets
        zeros**, silently. Keep a duplicate in a supervisor if another handler shall take over.
        """
        fd, self._fd, self._ready = self._fd, -1, False
        for loop, sleeper in self._sleepers:
            loop.remove_reader(fd)
            loop.call_soon(wake_up, sleeper)
        if fd >= 0:
            os.close(fd)
        for event in self._backlog:
            if isinstance(event, events.Fork):
                event.child.close()
        self._backlog.clear()

    def __del__(self) -> None:
        # No warning: descriptors of fork events that nobody looked at end here as well.
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1

    def _refuse(self) -> UsageError | ClosedError:
        """Say why it cannot be used."""
        if self._fd < 0:
            return ClosedError("the userfaultfd is closed")
        return NotInitialisedError("no handshake was made yet: call handshake() first")


def wake_up(sleeper: Any) -> None:
    """End an asyncio iteration's wait."""
    if not sleeper.done():
        sleeper.set_result(None)


def read_fdinfo(fd: int) -> FdInfo:
    """Read `/proc/self/fdinfo` of a userfaultfd.

    Raises:
        UsageError: `fd` is not open, or no userfaultfd.
    """
    fields: dict[str, str] = {}
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
    except FileNotFoundError:
        raise UsageError(f"descriptor {fd} is not open") from None
    if "API" not in fields or "pending" not in fields:
        raise UsageError(f"descriptor {fd} is no userfaultfd")
    _, features, operations = (int(part, 16) for part in fields["API"].split(":"))
    return FdInfo(
        pending=int(fields["pending"]),
        total=int(fields["total"]),
        features=abi.Feature(features & ~_INITIALISED),
        operations=abi.Operation(operations),
        initialised=bool(features & _INITIALISED),
    )
