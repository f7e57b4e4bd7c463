"""A process whose memory the state machine of `tests/kernel/test_state_machine.py` works with.

Its memory is changed, touched and forked on demand of the test's process, which serves the faults. So nothing that
waits in a fault, or until an event is read, holds the test's GIL; and the test sees it when it does not end.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import queue
import resource
import signal
import socket
import threading
import traceback
import warnings
from typing import Any, NamedTuple

from support.kernel import DEADLINE_S, Link
from userfault.kernel import Feature, Userfaultfd
from userfault.kernel._mman import madvise, mprotect
from userfault.kernel.errors import InvalidRequestError, UffdError, UsageError
from userfault.kernel.mapping import Advice, Mapping, MemoryKind, Protection

__all__ = ["serve_commands"]

THREADS = 3  # that touch memory

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
for _call in (_libc.read, _libc.write):
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    _call.restype = ctypes.c_ssize_t


def serve_commands(link: Link, files: list[int]) -> None:
    """Do what comes over `link` until it is closed; `files` are the descriptors of the files that can be mapped.

    A command is the name of a method of `_Process` with its arguments. What is sent back begins with "answer",
    or, whenever an access is through, with "finished".
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _Process(link, files, {}).serve()


class _Given(NamedTuple):
    """An answer that comes with a descriptor, which is closed here."""

    value: object
    what: Userfaultfd | socket.socket


class _Process:
    def __init__(self, link: Link, files: list[int], mappings: dict[int, Mapping]) -> None:
        self.link = link
        self.files = files
        self.mappings = mappings
        self.lock = threading.Lock()  # one sender at a time
        self.jobs: list[queue.SimpleQueue[Any]] = []

    def serve(self) -> None:
        self.jobs = [queue.SimpleQueue() for _ in range(THREADS)]
        threads = [threading.Thread(target=self.work, args=(jobs,), daemon=True) for jobs in self.jobs]
        for thread in threads:
            thread.start()
        self.link.send((os.getpid(), [thread.native_id for thread in threads]))
        while True:
            try:
                (name, arguments), fds = self.link.receive_with_fds()
            except EOFError:
                os._exit(0)
            try:
                answer = getattr(self, name)(*arguments, *fds)
            except UffdError as error:
                answer = ("error", error.errno)
            except BaseException:
                answer = traceback.format_exc()
            if name == "touch":
                continue
            if isinstance(answer, _Given):
                with answer.what:
                    self.send("answer", answer.value, fds=(answer.what.fileno(),))
            else:
                self.send("answer", answer)

    def send(self, *message: Any, fds: tuple[int, ...] = ()) -> None:
        try:
            with self.lock:
                self.link.send(message, fds)
        except OSError:
            os._exit(0)  # the test is over

    # --- userfaultfds ---------------------------------------------------------------------------------------------

    def open(self, features: int) -> _Given:
        """Make a userfaultfd for this memory. The test gets the only descriptor that stays open."""
        uffd = Userfaultfd(Feature(features))
        return _Given(uffd.user_mode_only, uffd)

    def move(self, dst: int, src: int, length: int, wake: bool, holes: bool, fd: int) -> Any:
        """UFFDIO_MOVE is for the process itself."""
        with Userfaultfd.from_fd(fd) as uffd:
            return tuple(uffd.try_move(dst, src, length, wake=wake, allow_holes=holes))

    # --- memory ---------------------------------------------------------------------------------------------------

    def map(self, number: int, kind: str, address: int, length: int, file: int, offset: int) -> None:
        if kind == MemoryKind.ANONYMOUS:
            mapping = Mapping.anonymous(length, address=address)
        else:
            shared = kind == MemoryKind.SHMEM
            mapping = Mapping.of_file(self.files[file], length, offset=offset, shared=shared, address=address)
        assert mapping.kind == kind
        assert mapping.address == address
        with contextlib.suppress(InvalidRequestError):  # a kernel without them
            mapping.madvise(Advice.NOHUGEPAGE)
        self.mappings[number] = mapping

    def advise(self, advice: int, address: int, length: int) -> None:
        try:
            mapping, start = self.inside(address, length)
        except LookupError:
            madvise(address, length, advice)
        else:
            mapping.madvise(advice, start, length)

    def protect(self, protection: int, address: int, length: int) -> None:
        try:
            mapping, start = self.inside(address, length)
        except LookupError:
            mprotect(address, length, protection)
        else:
            mapping.protect(Protection(protection), start, length)

    def inside(self, address: int, length: int) -> tuple[Mapping, int]:
        """The mapping that has all of a range, and where in it that begins.

        Raises:
            LookupError: None has.
        """
        for mapping in self.mappings.values():
            start = address - mapping.address
            if 0 <= start <= mapping.length - length:
                with contextlib.suppress(UsageError):
                    mapping.view(start, length).release()  # raises if a part of it was unmapped
                    return mapping, start
        raise LookupError

    def unmap(self, number: int, start: int, length: int) -> None:
        self.mappings[number].unmap(start, length)

    def punch(self, number: int, start: int, length: int) -> None:
        self.mappings[number].punch_hole(start, length)

    def close(self, number: int) -> None:
        self.mappings.pop(number).close()

    def remap(self, number: int, length: int, to: int | None, replaced: int | None, kept: int | None) -> None:
        """Resize or move; `replaced` is a mapping to be moved over, `kept` the number that the old place gets."""
        target = to if replaced is None else self.mappings[replaced]
        moved = self.mappings[number].remap(
            length, to=target, dontunmap=kept is not None, may_move=to is not None
        )
        if replaced is not None and self.mappings[replaced].closed:
            del self.mappings[replaced]
        if kept is not None:
            self.mappings[kept] = self.mappings[number]
            self.mappings[number] = moved

    # --- accesses -------------------------------------------------------------------------------------------------

    def touch(
        self, thread: int, number: int, address: int, length: int, data: bytes | None, by_kernel: bool
    ) -> None:
        """Have a thread read or write. When it is through that is told by "finished"."""
        self.jobs[thread].put((number, _by_kernel if by_kernel else _by_processor, address, length, data))

    def work(self, jobs: queue.SimpleQueue[Any]) -> None:
        while True:
            number, access, *arguments = jobs.get()
            self.send("finished", number, access(*arguments))

    def contents(self, addresses: list[int], length: int) -> list[bytes]:
        """Digests of what is at these addresses, where nothing is trapped any more."""
        return [hashlib.blake2b(_by_processor(address, length, None)).digest() for address in addresses]

    # --- processes ------------------------------------------------------------------------------------------------

    def fork(self) -> _Given:
        """Fork; return the child's link."""
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # forks beside threads: these only wait in faults
            pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(2 * DEADLINE_S)
                ours.close()
                self.link.close()
                _Process(Link(theirs), self.files, self.mappings).serve()
            finally:
                os._exit(1)
        theirs.close()
        return _Given(None, ours)

    def wait(self, pid: int) -> int:
        """Return how a child ended."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def exit(self) -> None:
        os._exit(0)


def _by_processor(address: int, length: int, data: bytes | None) -> bytes:
    buffer = ctypes.create_string_buffer(data or b"", length)
    if data is None:
        _libc.memmove(buffer, address, length)
    else:
        _libc.memmove(address, buffer, length)
    return buffer.raw


def _by_kernel(address: int, length: int, data: bytes | None) -> bytes | int:
    """Return the error number if the kernel cannot touch it."""
    source, target = os.pipe()
    try:
        if data is None:
            if _libc.write(target, address, length) < 0:
                return ctypes.get_errno()
            return os.read(source, length)
        os.write(target, data)
        return data if _libc.read(source, address, length) == length else ctypes.get_errno()
    finally:
        os.close(source)
        os.close(target)
