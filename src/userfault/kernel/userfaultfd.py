"""`Userfaultfd`: one userfaultfd, every request of it.

**The GIL trap.** A Python thread that touches a missing page (`memory[0]`, a NumPy element, a `memoryview`) waits
in the kernel *with the GIL held*. If whatever should serve that page needs the GIL of the same process, both wait
for ever, and not even Ctrl-C ends it. Three arrangements work:

1. the touch releases the GIL: `Mapping.read` and `Mapping.write`, `os.readv`, or any function of a `ctypes.CDLL`,
   with the handler in another thread;
2. the handler is another process: a child made by `os.fork` may use the descriptor as it is, because all its
   requests act on the memory of the process that *created* it; other processes get it through `handoff`;
3. no handler is needed: write tracking with `WP_ASYNC` and access tracking with `RWP_ASYNC` (`pagemap.scan`), or
   everything is filled before it is touched. (Or the handler is native: that is what `userfault.open` is.)

All requests here release the GIL while the kernel works. Several threads may use one object; `close` it when none
of them does any more.

    >>> import mmap, threading
    >>> from userfault.kernel import Mapping, Userfaultfd
    >>> with Userfaultfd() as uffd, Mapping.anonymous(2 * mmap.PAGESIZE) as memory:
    ...     _ = uffd.register(memory)
    ...     def serve():
    ...         for fault in uffd.read_events(timeout_s=10):
    ...             uffd.copy(fault.address, b"Hello, page fault" + bytes(mmap.PAGESIZE - 17))
    ...     handler = threading.Thread(target=serve)
    ...     handler.start()
    ...     greeting = memory.read(0, 17)  # releases the GIL while it waits
    ...     handler.join()
    >>> greeting
    b'Hello, page fault'
"""

from __future__ import annotations

import errno
import os
import select
import time
from fcntl import F_GETFL, fcntl
from typing import TYPE_CHECKING, Self

from userfault.kernel import abi, events
from userfault.kernel._descriptor import FdInfo, read_fdinfo, wake_up
from userfault.kernel._handshake import NO_FEATURES, Negotiated, negotiate
from userfault.kernel._opening import OpenWay, open_userfaultfd
from userfault.kernel._requests import Outcome, Registration, Requests
from userfault.kernel.errors import NotInitialisedError, UsageError, error_from_errno

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["FdInfo", "OpenWay", "Outcome", "Registration", "Userfaultfd"]


class Userfaultfd(Requests):
    """A userfaultfd: the memory of the process that created it, served by whoever holds this.

    Ranges are addresses (with a length), or objects: anything with the buffer protocol, a `Mapping`, anything with
    `address` and `nbytes`. They must be page-aligned (huge pages: aligned to those). Lengths are bytes.

    The fill requests `copy`, `zeropage`, `move`, `continue_` and `poison` come twice: `copy` returns the bytes done
    and raises where the kernel refuses (the exception's `done` says what was done before); `try_copy` returns an
    `Outcome` and raises only for wrong use. `serving` has what a correct handler makes of the outcomes.

    Args:
        features: Features that are required; without one of them `FeatureError` is raised.
        optional: Features that are taken where the kernel has them and this process may.
        way: How to open it.
        nonblocking: With False, `read_events(timeout_s=None)` is one system call instead of two, and deadlines,
            `poll` and asyncio are not to be had (a blocking userfaultfd polls as an error), nor, before Linux 6.10,
            reading without waiting.
        cloexec: Whether exec closes it.
        handshake: With False, `handshake` is still to be called.

    Raises:
        UffdPermissionError: This process may not have one, or not with `EVENT_FORK` (needs CAP_SYS_PTRACE).
        FeatureError: A required feature is not there.
        UffdError: The kernel refused otherwise.

    See userfaultfd(2), ioctl_userfaultfd(2), `Documentation/admin-guide/mm/userfaultfd.rst`.
    """

    def __init__(
        self,
        features: abi.Feature = NO_FEATURES,
        *,
        optional: abi.Feature = NO_FEATURES,
        way: OpenWay = OpenWay.ANY,
        nonblocking: bool = True,
        cloexec: bool = True,
        handshake: bool = True,
    ) -> None:
        opened = open_userfaultfd(OpenWay(way), nonblocking=nonblocking, cloexec=cloexec)
        self._begin(opened.fd, opened.way, nonblocking=nonblocking)
        if handshake:
            try:
                self.handshake(features, optional=optional)
            except BaseException:
                self.close()
                raise

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Take over an open userfaultfd, for example one that another process sent; `close` will close it.

        What was negotiated is read from `/proc/self/fdinfo`.

        Raises:
            UsageError: `fd` is no userfaultfd; it is left open.
        """
        info = read_fdinfo(fd)
        self = cls.__new__(cls)
        self._begin(fd, None, nonblocking=bool(fcntl(fd, F_GETFL) & os.O_NONBLOCK))
        if info.initialised:
            self._negotiated = Negotiated(info.features, info.features, info.operations)
            self._ready = True
        return self

    def _adopt(self, fd: int) -> Userfaultfd:
        """Make the object for a fork event's descriptor: initialised, with the features of this one."""
        child = Userfaultfd.__new__(Userfaultfd)
        # The kernel gives it the flags that this one was created with, whatever fcntl has made of them since.
        child._begin(fd, self._way, nonblocking=bool(fcntl(fd, F_GETFL) & os.O_NONBLOCK))
        child._negotiated = self._negotiated
        child._ready = True
        return child

    def handshake(
        self, features: abi.Feature = NO_FEATURES, *, optional: abi.Feature = NO_FEATURES
    ) -> abi.Feature:
        """Negotiate features (UFFDIO_API), once per descriptor, and return what is on.

        Most features need no negotiation to work (WP, MINOR, POISON, MOVE): asking for them makes an old kernel
        say so at once. Those that change behaviour do: events, SIGBUS, THREAD_ID, EXACT_ADDRESS, WP_UNPOPULATED,
        WP_ASYNC, RWP, RWP_ASYNC.

        Raises:
            NotInitialisedError: The handshake was made already.
            FeatureError: A required feature is not there; the descriptor stays usable for another try.
            UffdPermissionError: `EVENT_FORK` is required, and CAP_SYS_PTRACE is not there.
        """
        if self._ready:
            raise NotInitialisedError("the handshake was made already; it can be made once per descriptor")
        self._negotiated = negotiate(self.fd, abi.Feature(features), abi.Feature(optional))
        self._ready = True
        return self._negotiated.features

    def read_events(self, max_events: int = 64, *, timeout_s: float | None = 0.0) -> list[events.AnyEvent]:
        """Read the messages that wait, at most `max_events` of them.

        Faults come before other events. Read until nothing is left, apply the events, then serve the faults.

        Args:
            max_events: Most messages in one call.
            timeout_s: How long to wait for the first in seconds; 0 not at all, None for ever.

        Returns:
            The events; none if none came in time (or another reader was faster).

        Raises:
            UsageError: A deadline on a descriptor that was opened with `nonblocking=False`.
            NotSupportedError: `timeout_s=0` on such a descriptor before Linux 6.10.
            TooManyFilesError: A fork event needs a descriptor and none is free; it waits to be read again.
        """
        if not self._ready:
            raise self._refuse()
        if max_events < 1:
            raise UsageError(f"read_events: max_events is {max_events}, and must be at least 1")
        if self._backlog:
            return [self._backlog.popleft() for _ in range(min(max_events, len(self._backlog)))]
        if timeout_s == 0:
            return self._read_now(max_events)
        if not self._nonblocking:
            if timeout_s is not None:
                raise UsageError("read_events: a deadline needs a descriptor opened with nonblocking=True")
            try:
                data = os.read(self._fd, max_events * abi.MESSAGE_SIZE)
            except OSError as failure:
                raise error_from_errno(failure.errno or errno.EIO, call="read") from None
            return events.decode(data, self._adopt)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not self.poll(timeout_s=left):
                return []
            if found := self._read_now(max_events):
                return found
            # POLLIN promises nothing: the waiter was woken or signalled, or another reader was faster.

    def _read_now(self, max_events: int) -> list[events.AnyEvent]:
        try:
            if self._nonblocking:
                data = os.read(self._fd, max_events * abi.MESSAGE_SIZE)
            else:
                buffer = bytearray(max_events * abi.MESSAGE_SIZE)
                # A file without positions: -1. The flag makes this one read non-blocking.
                data = bytes(buffer[: os.preadv(self._fd, [buffer], -1, os.RWF_NOWAIT)])
        except BlockingIOError:
            return []
        except OSError as failure:
            raise error_from_errno(failure.errno or errno.EIO, call="read") from None
        return events.decode(data, self._adopt)

    def poll(self, timeout_s: float | None = None) -> bool:
        """Wait until there is something to read.

        Args:
            timeout_s: In seconds; 0 looks only, None waits for ever.

        Returns:
            Whether there is. Even so, `read_events` may find nothing: another reader was faster, or the waiter
            was interrupted.

        Raises:
            UsageError: The descriptor was opened with `nonblocking=False`.
        """
        if not self._ready:
            raise self._refuse()
        if self._backlog:
            return True
        if not self._nonblocking:
            raise UsageError(
                "poll: the kernel polls a blocking userfaultfd as an error: open it with nonblocking=True"
            )
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        # Rounded up: a wait that ends early would spin.
        return bool(poller.poll(None if timeout_s is None else -int(-timeout_s * 1000 // 1)))

    async def __aiter__(self) -> AsyncIterator[events.AnyEvent]:
        """Iterate over events for ever, in asyncio; ends when the object is closed.

        The handler runs in the event loop, so nothing in this process may touch missing memory with the GIL held
        (see the top of the module). One iteration at a time. Close the object in the event loop's thread.

        Raises:
            UsageError: The descriptor was opened with `nonblocking=False`.
        """
        import asyncio  # loaded by those who use it

        if not self._ready:
            raise self._refuse()
        if not self._nonblocking:
            raise UsageError("async for: open the userfaultfd with nonblocking=True")
        loop = asyncio.get_running_loop()
        while self._ready:
            found = self.read_events()
            for event in found:
                yield event
            if found or not self._ready:
                continue
            fd = self._fd
            sleeper = loop.create_future()
            entry = (loop, sleeper)
            self._sleepers.add(entry)
            loop.add_reader(fd, wake_up, sleeper)
            try:
                await sleeper
            finally:
                self._sleepers.discard(entry)
                if self._fd == fd:  # else close() did it, before the number could be another file's
                    loop.remove_reader(fd)

    def drain(self) -> int:
        """Read every message that waits into the backlog, which the next `read_events` returns, and count them.

        A request that gets EAGAIN gets it until the event that causes it has been read, and events come after
        faults: who does not read everything spins for ever.
        """
        kept = list(self._backlog)
        self._backlog.clear()
        try:
            while found := self.read_events():
                kept += found
        finally:
            self._backlog.extend(kept)
        return len(kept)
