"""The probe's trials in which a thread waits for this one: messages of a userfaultfd.

They cannot hang either. The waiting thread is inside the kernel without the GIL (ctypes releases it), and this one
waits for a message with a deadline; whatever happens, it then reads what there is, unregisters the memory and closes
the descriptor, which lets every waiter go on.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import select
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from userfault.kernel import abi
from userfault.kernel._kinds import MemoryKind
from userfault.kernel._probing.areas import Area, TrialError, UntriedError, area
from userfault.kernel._probing.trials import Lab, negotiated, register
from userfault.kernel._syscalls import ioctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["exact_address", "remap_event", "remove_event", "thread_id", "unmap_event", "wake"]

_DEADLINE_S: float = 2.0
_OFFSET: Final = 1234  # of the access within its page
_MREMAP_MAYMOVE: Final = 1
_MREMAP_DONTUNMAP: Final = 4


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    return libc


class _Waiter:
    """A thread for an operation that will wait in the kernel."""

    def __init__(self, pages: Area) -> None:
        self._pages = pages
        self._thread: threading.Thread | None = None

    def start(self, operation: Callable[[], object]) -> threading.Thread:
        self._thread = threading.Thread(target=operation, name="userfault-probe", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit on threads
            self._thread = None
            raise UntriedError(str(error), "raise the limit on threads (ulimit -u)") from None
        return self._thread

    def release(self, fd: int) -> None:
        """Let it go on, even if a child forked at this moment keeps the descriptor open."""
        with suppress(OSError):
            os.read(fd, abi.MESSAGE_SIZE)  # whoever causes an event waits until it is read
        with suppress(OSError):
            ioctl(fd, abi.Request.UNREGISTER, abi.RANGE.pack(self._pages.address, self._pages.size))

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(_DEADLINE_S)
            # Its address must stay taken as long as it may still be used.
            self._pages.abandoned = self._thread.is_alive()


@contextmanager
def _scene(lab: Lab, features: abi.Feature, size: int) -> Iterator[tuple[int, Area, _Waiter]]:
    """Set up a userfaultfd, memory registered with it, and a thread to be; take them down in the order that ends.

    First the waiting is ended, then the descriptor closed, then the thread joined, then the memory unmapped.
    """
    with area(MemoryKind.ANONYMOUS, size) as target:
        waiter = _Waiter(target)
        try:
            with lab.userfaultfd(features) as fd:
                register(fd, target, abi.RegisterMode.MISSING)
                try:
                    yield fd, target, waiter
                finally:
                    waiter.release(fd)
        finally:
            waiter.join()


def _read(fd: int) -> bytes:
    """Return the next message."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(_DEADLINE_S * 1000):
        raise TrialError("no message came")
    return os.read(fd, abi.MESSAGE_SIZE)


def _fault(lab: Lab, features: abi.Feature, check: Callable[[int, int, int], str]) -> str:
    """Have a thread wait for a page, look at its message, give it the page and wake it.

    Args:
        lab: Where the userfaultfd comes from.
        features: What to ask for.
        check: Gets the address of the page, and address and thread of the message.
    """
    if not lab.user_mode_only:
        return negotiated(features)(lab)  # with SIGBUS a touch kills
    byte = ctypes.create_string_buffer(1)
    with _scene(lab, features, mmap.PAGESIZE) as (fd, target, waiter):
        source = ctypes.c_void_p(target.address + _OFFSET)
        thread = waiter.start(functools.partial(_libc().memcpy, byte, source, ctypes.c_size_t(1)))
        event, _, address, thread_id = abi.MESSAGE_PAGEFAULT.unpack(_read(fd))
        if event != abi.Event.PAGEFAULT:
            raise TrialError(f"a message {event:#x} came instead of a page fault")
        seen = check(target.address, address, thread_id)
        mode = abi.ZeropageMode.DONTWAKE
        ioctl(fd, abi.Request.ZEROPAGE, abi.ZEROPAGE.pack(target.address, target.size, mode, 0))
        ioctl(fd, abi.Request.WAKE, abi.RANGE.pack(target.address, target.size))
        thread.join(_DEADLINE_S)
        if thread.is_alive():
            raise TrialError("a thread was woken, and still waits")
        if thread_id not in (0, thread.native_id):
            raise TrialError(f"the message names thread {thread_id}, it was {thread.native_id}")
    return seen


def wake(lab: Lab) -> str:
    """Have a thread wait for a page, and wake it."""
    return _fault(lab, abi.Feature(0), lambda *_: "a thread waited for a page, and was woken")


def thread_id(lab: Lab) -> str:
    """Learn which thread waits."""

    def check(_page: int, _address: int, thread: int) -> str:
        if not thread:
            raise TrialError("the message names no thread")
        return "a message named the thread that waited"

    return _fault(lab, abi.Feature.THREAD_ID, check)


def exact_address(lab: Lab) -> str:
    """Learn which byte was touched."""

    def check(page: int, address: int, _thread: int) -> str:
        if address != page + _OFFSET:
            raise TrialError(f"the message names byte {address - page} of the page, it was {_OFFSET}")
        return "a message named the byte that was touched"

    return _fault(lab, abi.Feature.EXACT_ADDRESS, check)


def _event(lab: Lab, feature: abi.Feature, expected: abi.Event, call: Callable[[Area], object]) -> str:
    """Change the memory in a thread, and read the event that it waits for."""
    with _scene(lab, feature, 2 * mmap.PAGESIZE) as (fd, target, waiter):
        waiter.start(functools.partial(call, target))
        event = _read(fd)[0]
        if event != expected:
            raise TrialError(f"a message {event:#x} came instead of {expected.name}")
    return "the event was read"


def remove_event(lab: Lab) -> str:
    """Hear of madvise."""

    def drop(target: Area) -> None:
        _libc().madvise(
            ctypes.c_void_p(target.address), ctypes.c_size_t(target.size), ctypes.c_int(mmap.MADV_DONTNEED)
        )

    return _event(lab, abi.Feature.EVENT_REMOVE, abi.Event.REMOVE, drop)


def unmap_event(lab: Lab) -> str:
    """Hear of munmap."""

    # Mapped over instead of unmapped, so that the address stays taken until its owner unmaps it.
    def cover(target: Area) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        _libc().mmap(
            ctypes.c_void_p(target.address), ctypes.c_size_t(target.size), ctypes.c_int(mmap.PROT_READ),
            ctypes.c_int(flags), ctypes.c_int(-1), ctypes.c_long(0),
        )  # fmt: skip

    return _event(lab, abi.Feature.EVENT_UNMAP, abi.Event.UNMAP, cover)


def remap_event(lab: Lab) -> str:
    """Hear of mremap."""
    moved: list[int] = []

    # DONTUNMAP (5.7) leaves the address taken, for the same reason; without it only the bit can be asked for.
    def stash(target: Area) -> None:
        address = _libc().mremap(
            ctypes.c_void_p(target.address), ctypes.c_size_t(target.size), ctypes.c_size_t(target.size),
            ctypes.c_int(_MREMAP_MAYMOVE | _MREMAP_DONTUNMAP), ctypes.c_void_p(None),
        )  # fmt: skip
        moved.append(address)

    try:
        return _event(lab, abi.Feature.EVENT_REMAP, abi.Event.REMAP, stash)
    finally:
        failed = ctypes.c_void_p(-1).value
        for address in moved:
            if address not in (None, failed):
                _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(2 * mmap.PAGESIZE))
