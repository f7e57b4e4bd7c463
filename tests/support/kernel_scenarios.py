"""What the tests of the kernel's own unit scenarios share: a handler beside the test, SIGBUS that is survived, pins."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

import pytest

from support.kernel import (
    DEADLINE_S,
    HUGE_KINDS,
    PAGE,
    SHARED_KINDS,
    Area,
    huge_pages,
    libc,
    make_area,
    waiters,
)
from support.kernel_facts import Job
from userfault.kernel import FaultKind, Fork, PageFault, Userfaultfd
from userfault.kernel.errors import UffdError
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import Advice, MapFlag, Mapping, MemoryKind, Protection

__all__ = [
    "BUS_ADRERR",
    "BUS_MCEERR_AR",
    "NO_THP",
    "BusError",
    "BusErrors",
    "Handler",
    "for_kinds",
    "huge_area",
    "page_of",
    "pin_briefly",
    "pinned",
    "pmd_size",
    "release_pages",
    "replace_page",
    "spare_pages",
    "whole_page",
    "zap",
]


def for_kinds(*kinds: MemoryKind) -> pytest.MarkDecorator:
    """Run a test once for each kind of memory, which it gets as `kind`."""
    return pytest.mark.parametrize("kind", kinds, ids=[kind.name.lower() for kind in kinds])


# --- pages ----------------------------------------------------------------------------------------------------


def page_of(area: Area, address: int) -> int:
    """The number of the page of an area that an address lies in."""
    page = (address - area.start) // area.page_size
    assert 0 <= page < area.pages, f"{address:#x} is not in {area}"
    return page


def whole_page(area: Area, page: int) -> bytes:
    """All bytes of a page; the GIL is free while it may fault."""
    return area.memory.read(page * area.page_size, area.page_size)


def zap(area: Area) -> None:
    """Take the pages out of the page table, so that only marks can stay there; their contents stay.

    Private pages can only go to swap. Without swap, and for huge pages, they stay where they are.
    """
    if area.kind in SHARED_KINDS:
        area.drop()
        return
    with contextlib.suppress(UffdError):
        area.memory.madvise(Advice.PAGEOUT)


def release_pages(area: Area) -> None:
    """Free the pages, those of the file too."""
    if area.kind in SHARED_KINDS:
        area.memory.madvise(Advice.REMOVE)
    else:
        area.drop()


def replace_page(area: Area, page: int) -> None:
    """Map ordinary zeros in place of a page that cannot be touched. Only in a child process that ends soon."""
    libc.mmap.restype = ctypes.c_void_p
    flags = MapFlag.FIXED | MapFlag.ANONYMOUS | MapFlag.PRIVATE
    where = area.page(page)
    found = libc.mmap(
        ctypes.c_void_p(where),
        ctypes.c_size_t(area.page_size),
        int(Protection.READ | Protection.WRITE),
        int(flags),
        -1,
        ctypes.c_long(0),
    )
    assert found == where


def spare_pages(kind: MemoryKind, count: int) -> contextlib.AbstractContextManager[None]:
    """Huge pages for the copies that forked children make; what `make_area` reserves is the test's own."""
    return huge_pages(count) if kind in HUGE_KINDS else contextlib.nullcontext()


_PMD_SIZE: Final = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
NO_THP: Final = "needs transparent huge pages"


def pmd_size() -> int:
    """The size of a transparent huge page; skip where there are none."""
    try:
        return int(_PMD_SIZE.read_text())
    except OSError:
        pytest.skip(NO_THP)


@contextlib.contextmanager
def huge_area(chunks: int, advice: Advice = Advice.HUGEPAGE) -> Iterator[Area]:
    """Anonymous memory that transparent huge pages fit in, counted in small pages."""
    size = pmd_size()
    with Mapping.anonymous(chunks * size, align=size) as memory:
        memory.madvise(advice)
        yield Area(MemoryKind.ANONYMOUS, memory, memory.length // PAGE)


# --- a handler ------------------------------------------------------------------------------------------------


class Handler:
    """A thread that calls `serve(uffd, event)` for every message, in the kernel's order, and keeps them all.

    The children of fork events are served too, and closed at the end. What came until the end of the `with` block has
    been served after it. If `serve` fails, or nothing comes for long, all is closed: then nobody waits for ever in a
    page fault, and the block raises what happened.
    """

    def __init__(self, uffd: Userfaultfd, serve: Callable[[Userfaultfd, AnyEvent], object]) -> None:
        self.events: list[AnyEvent] = []
        self.children: list[Userfaultfd] = []
        self._uffds = [uffd]
        self._serve = serve
        self._error: BaseException | None = None
        self._poller = select.poll()
        self._poller.register(uffd, select.POLLIN)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poller.register(self._stop, select.POLLIN)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def faults(self) -> list[PageFault]:
        """The page faults so far."""
        return [event for event in self.events if isinstance(event, PageFault)]

    def count(self, kind: FaultKind) -> int:
        """How many page faults of a kind there were so far."""
        return sum(fault.kind is kind for fault in self.faults)

    def _run(self) -> None:
        try:
            stopped = False
            while not stopped:
                ready = self._poller.poll(DEADLINE_S * 1000)
                assert ready, f"nothing came; {[uffd.fdinfo().total for uffd in self._uffds]} threads wait"
                stopped = any(fd == self._stop for fd, _ in ready)
                for uffd in self._uffds:  # grows on the way
                    self._serve_all(uffd)
        except BaseException as error:
            self._error = error
            for uffd in self._uffds:
                uffd.close()

    def _serve_all(self, uffd: Userfaultfd) -> None:
        while found := uffd.read_events():
            for event in found:
                if isinstance(event, Fork):
                    self.children.append(event.child)
                    self._uffds.append(event.child)
                    self._poller.register(event.child, select.POLLIN)
                self.events.append(event)
                self._serve(uffd, event)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join(DEADLINE_S)
        ended = not self._thread.is_alive()
        if ended:
            os.close(self._stop)
        for child in self.children:
            child.close()
        if self._error is not None:
            raise self._error
        assert ended, "the handler waits for something"


# --- SIGBUS ---------------------------------------------------------------------------------------------------


class BusError(NamedTuple):
    """What a SIGBUS says of itself (siginfo_t)."""

    code: int
    address: int
    lsb: int  # of the address that matters, for a memory error: 12 for a small page


BUS_ADRERR: Final = 2
BUS_MCEERR_AR: Final = 4
_SA_SIGINFO: Final = 4
_CODE_AT: Final = 8
_POINTER: Final = ctypes.sizeof(ctypes.c_void_p)
_ADDRESS_AT: Final = -(-(_CODE_AT + 4) // _POINTER) * _POINTER
_LSB_AT: Final = _ADDRESS_AT + _POINTER
_HANDLER: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    # struct sigaction of libc, on all architectures that have the generic order of its members
    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class BusErrors:
    """Survives SIGBUS: `repair(error)` does something about the page, and the processor tries the access again.

    The handler of the signal is Python, which is otherwise forbidden. It is right here because the signal comes only
    from the accesses of a thread that has released the GIL and is in nothing but a copy of memory: it interrupts
    nobody's lock. Only in a forked child: what `repair` raises ends the process, or the access would go on for ever.

    As a context manager it gives the list of what came.
    """

    def __init__(self, repair: Callable[[BusError], object]) -> None:
        self._repair = repair
        self._seen: list[BusError] = []
        self._action = _Action(_HANDLER(self._handle), flags=_SA_SIGINFO)
        self._before = _Action()

    def _handle(self, number: int, info: int, context: int) -> None:
        try:
            error = BusError(
                ctypes.c_int.from_address(info + _CODE_AT).value,
                ctypes.c_size_t.from_address(info + _ADDRESS_AT).value,
                ctypes.c_short.from_address(info + _LSB_AT).value,
            )
            self._seen.append(error)
            self._repair(error)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def __enter__(self) -> list[BusError]:
        self._set(self._action, self._before)
        return self._seen

    def __exit__(self, *exception: object) -> None:
        self._set(self._before, None)

    @staticmethod
    def _set(action: _Action, before: _Action | None) -> None:
        place = None if before is None else ctypes.byref(before)
        assert libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), place) == 0


# --- pins -----------------------------------------------------------------------------------------------------


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _read_process(pid: int, source: int, target: int, length: int) -> int:
    """Have the kernel copy memory of a process (process_vm_readv); return the error number, 0 if none."""
    ours, theirs = _Vector(target, length), _Vector(source, length)
    done = libc.process_vm_readv(
        pid, ctypes.byref(ours), ctypes.c_ulong(1), ctypes.byref(theirs), ctypes.c_ulong(1), ctypes.c_ulong(0)
    )
    assert done in (-1, length)
    return ctypes.get_errno() if done < 0 else 0


def pin_briefly(address: int) -> bytes:
    """Pin a page of this process for reading, and unpin it again; return its first bytes.

    process_vm_readv is the one system call that pins pages for reading only (FOLL_PIN without FOLL_WRITE) and needs
    neither a device nor a debug kernel: a page that is shared with another process since a fork is unshared by it.
    """
    target = ctypes.create_string_buffer(32)
    assert _read_process(os.getpid(), address, ctypes.addressof(target), 32) == 0
    return target.raw


@contextlib.contextmanager
def pinned(pid: int, address: int) -> Iterator[None]:
    """Keep a page of a process pinned for reading meanwhile.

    process_vm_readv pins the source first and then copies. Here it copies to a missing page, and so waits in the
    middle, with the pin.
    """
    with make_area(MemoryKind.ANONYMOUS, 1) as target, Userfaultfd() as uffd:
        uffd.register(target.memory)
        job = Job(_read_process, pid, address, target.start, mmap.PAGESIZE)
        try:
            waiters(uffd, 1)
            yield
            assert not job.done
        finally:
            uffd.zeropage(target.memory)
            assert job.result() == 0
