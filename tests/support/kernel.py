"""What the tests of `userfault.kernel` share: memory of every kind, threads and processes that fault."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import struct
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import pytest

from support.machine import exclusively
from support.waiting import wait_until
from userfault.kernel import Feature, Mapping, Userfaultfd, abi
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import Advice, MemoryKind

__all__ = [
    "HUGE",
    "KINDS",
    "PAGE",
    "Area",
    "Subject",
    "Touch",
    "available_features",
    "huge_pages",
    "in_child",
    "make_area",
    "next_event",
    "protected",
    "subject",
    "waiters",
]

PAGE = os.sysconf("SC_PAGE_SIZE")
HUGE = 2 << 20
KINDS = (
    MemoryKind.ANONYMOUS,
    MemoryKind.SHMEM,
    MemoryKind.PRIVATE_SHMEM,
    MemoryKind.HUGETLB,
    MemoryKind.PRIVATE_HUGETLB,
)
HUGE_KINDS = (MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB)
SHARED_KINDS = (MemoryKind.SHMEM, MemoryKind.HUGETLB)
DEADLINE_S = 60
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@cache
def available_features() -> Feature:
    """What this kernel offers."""
    with Userfaultfd() as uffd:
        return uffd.available_features


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Add huge pages of 2 MiB to the pool and give them back; skip where that is not possible."""
    if not os.access(_POOL, os.W_OK):
        pytest.skip("needs 2 MiB huge pages")
    with exclusively(_POOL):
        try:
            before = int(_POOL.read_text())
            _POOL.write_text(str(before + count))
            there = int(_POOL.read_text())
        except OSError:
            pytest.skip("needs 2 MiB huge pages")
        try:
            if there < before + count:
                pytest.skip("needs 2 MiB huge pages")
            yield
        finally:
            # Not what was there before: other programs may have changed the pool meanwhile.
            _POOL.write_text(str(int(_POOL.read_text()) - (there - before)))


@dataclass(frozen=True)
class Area:
    """Some pages of memory of one kind.

    `page_size` is that of the kind: everything is counted in those pages.
    """

    kind: MemoryKind
    memory: Mapping
    pages: int

    @property
    def page_size(self) -> int:
        return self.memory.page_size

    @property
    def start(self) -> int:
        return self.memory.address

    @property
    def length(self) -> int:
        return self.memory.length

    @property
    def shared(self) -> bool:
        """Whether writes go to a file that another mapping shows."""
        return self.kind in SHARED_KINDS

    def page(self, index: int) -> int:
        """The address of a page."""
        return self.start + index * self.page_size

    def pattern(self, index: int) -> bytes:
        """What `populate` writes to a page: no two pages alike, none of it zero."""
        return (b"page %6d of this area. " % index).ljust(32, b".") * (self.page_size // 32)

    def populate(self) -> None:
        """Write every page. Only while nothing is trapped."""
        for index in range(self.pages):
            self.memory.write(index * self.page_size, self.pattern(index))

    def head(self, index: int, length: int = 32) -> bytes:
        """The first bytes of a page; the GIL is free while it may fault."""
        return self.memory.read(index * self.page_size, length)

    def drop(self, first: int = 0, count: int | None = None) -> None:
        """Give the pages up: private ones are gone, shared ones stay in their file."""
        count = self.pages - first if count is None else count
        self.memory.madvise(Advice.DONTNEED, first * self.page_size, count * self.page_size)


@contextlib.contextmanager
def make_area(kind: MemoryKind, pages: int = 4) -> Iterator[Area]:
    """Make an area, with huge pages reserved for it if it is of those."""
    with contextlib.ExitStack() as stack:
        if kind in HUGE_KINDS:
            # A private copy and its file's page can be there at the same time.
            stack.enter_context(huge_pages(2 * pages))
        match kind:
            case MemoryKind.ANONYMOUS:
                # With one more page on each side nothing of ours merges with a neighbour's mapping.
                memory = Mapping.anonymous(pages * PAGE)
                memory.madvise(Advice.NOHUGEPAGE)
            case MemoryKind.SHMEM:
                memory = Mapping.memfd(pages * PAGE)
            case MemoryKind.PRIVATE_SHMEM:
                memory = Mapping.memfd(pages * PAGE, shared=False)
            case MemoryKind.HUGETLB:
                memory = Mapping.memfd(pages * HUGE, huge_page_size=HUGE)
            case MemoryKind.PRIVATE_HUGETLB:
                memory = Mapping.memfd(pages * HUGE, shared=False, huge_page_size=HUGE)
            case _:
                raise ValueError(kind)
        stack.enter_context(memory)
        assert memory.kind is kind
        yield Area(kind, memory, pages)


class Touch:
    """A thread that reads or writes one place, and may wait in a page fault while the GIL is free.

    As a context manager it joins the thread at the end, and fails if it does not come.
    """

    def __init__(self, area: Area, page: int = 0, *, data: bytes | None = None, offset: int = 0) -> None:
        self._place = page * area.page_size + offset
        self._memory = area.memory
        self._data = data
        self._result: bytes | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._data is None:
                self._result = self._memory.read(self._place, 32)
            else:
                self._memory.write(self._place, self._data)
                self._result = self._data
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether it is through."""
        return not self._thread.is_alive()

    def result(self) -> bytes:
        """Wait for its end and return what it read."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the access still waits in its page fault"
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.result()


def waiters(uffd: Userfaultfd, count: int) -> None:
    """Wait until so many threads wait in faults of this userfaultfd."""
    wait_until(lambda: uffd.fdinfo().total == count, f"{count} threads wait in a fault")


def next_event(uffd: Userfaultfd) -> AnyEvent:
    """The next message; fail if none comes."""
    found = uffd.read_events(1, timeout_s=DEADLINE_S)
    assert found, "no message came"
    return found[0]


def protected(address: int, pid: int | None = None) -> bool:
    """Whether the pagemap marks the page as write-protected or read-write-protected, or as to be so."""
    with open(f"/proc/{pid or 'self'}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        return bool(struct.unpack("=Q", pagemap.read(8))[0] & abi.PagemapBit.UFFD_PROTECTED)


class _Failed:
    """What a child process says instead of its result."""

    def __init__(self) -> None:
        self.text = traceback.format_exc()


class Link:
    """One end of a pipe for objects and descriptors between a test and its child process."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE_S)
        self._socket = sock

    def fileno(self) -> int:
        """The descriptor, for poll."""
        return self._socket.fileno()

    def send(self, value: object, fds: tuple[int, ...] = ()) -> None:
        """Send an object that pickle takes."""
        body = pickle.dumps(value)
        socket.send_fds(self._socket, [struct.pack("=I", len(body))], fds)
        self._socket.sendall(body)

    def receive(self) -> Any:
        """The next object; descriptors that come with it are thrown away."""
        return self.receive_with_fds()[0]

    def receive_with_fds(self) -> tuple[Any, list[int]]:
        """The next object and its descriptors."""
        head, fds, _, _ = socket.recv_fds(self._socket, 4, 8)
        if not head:
            raise EOFError("the other process has ended")
        while len(head) < 4:
            head += self._socket.recv(4 - len(head))
        (length,) = struct.unpack("=I", head)
        body = b""
        while len(body) < length:
            piece = self._socket.recv(length - len(body))
            if not piece:
                raise EOFError("the other process has ended")
            body += piece
        value = pickle.loads(body)
        if isinstance(value, _Failed):
            raise AssertionError(f"in the child:\n{value.text}")
        return value, fds

    def close(self) -> None:
        self._socket.close()


class Subject(Link):
    """A forked child process that runs a function of the test's, which it gives a `Link`."""

    def __init__(self, run: Callable[..., Any], *arguments: Any) -> None:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. The child runs `run` alone, and ends by _exit.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.alarm(
                    2 * DEADLINE_S
                )  # the default action, which needs no GIL, ends a child that hangs
                ours.close()
                link = Link(theirs)
                try:
                    link.send(run(link, *arguments))
                    status = 0
                except BaseException:
                    link.send(_Failed())
            finally:
                os._exit(status)
        theirs.close()
        super().__init__(ours)
        self.status: int | None = None

    def receive_uffd(self) -> Userfaultfd:
        """Take over the userfaultfd that the child sends."""
        _, (fd,) = self.receive_with_fds()
        return Userfaultfd.from_fd(fd)

    def wait(self) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        if self.status is None:
            wait_until(self._ended, "the child process ends")
            assert self.status is not None
        return self.status

    def _ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def kill(self) -> None:
        """End it by SIGKILL, if it has not ended."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()


@contextlib.contextmanager
def subject(run: Callable[..., Any], *arguments: Any) -> Iterator[Subject]:
    """Fork a child that runs `run(link, *arguments)`, sends what it returns, and ends; kill it at the end.

    The test serves the child's memory without sharing a GIL with it: `link.send("…", (uffd.fd,))` in the child,
    `child.receive_uffd()` in the test. (An inherited descriptor acts on the memory of whoever created it.)
    """
    child = Subject(run, *arguments)
    try:
        yield child
    finally:
        child.kill()
        child.close()


def in_child(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run `run(*arguments)` in a forked child and return its result."""
    with subject(lambda _, *rest: run(*rest), *arguments) as child:
        result = child.receive()
        assert child.wait() == 0
        return result


def signal_in_child(run: Callable[..., Any], *arguments: Any) -> int:
    """Run `run(*arguments)` in a forked child that is expected to die; return the signal that ended it, 0 if none."""
    with subject(lambda _, *rest: run(*rest), *arguments) as child:
        return max(-child.wait(), 0)


libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL around every call
