"""What tests of single facts about the kernel share: bare requests, threads that wait in it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import pytest

from support.kernel import DEADLINE_S, PAGE, Area, Link, make_area, subject
from support.kernel_releases import UNTOUCHED, documented
from support.rwp import needs_swap
from support.waiting import wait_until
from userfault.kernel import Feature, Outcome, RegisterMode, Userfaultfd, abi, pagemap
from userfault.kernel.mapping import Advice, Mapping, MemoryKind
from userfault.kernel.pagemap import VmFlags

__all__ = [
    "UNTOUCHED",
    "Answer",
    "Job",
    "SignalInfo",
    "ask",
    "ask_at",
    "bytes_at",
    "documented",
    "drop_privileges",
    "entry",
    "exited_owner",
    "fill_cache",
    "filling",
    "in_file",
    "kernel_call",
    "kernel_reads",
    "kernel_writes",
    "mapped_huge",
    "mounted",
    "ordinary_file",
    "registered",
    "signal_info",
    "smaps_bytes",
    "swap_out",
    "tell_signals",
    "vma",
]

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
ANONYMOUS = MemoryKind.ANONYMOUS
NO_FEATURES: Final = Feature(0)


# --- bare requests --------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)  # of our own: the argument types are ours
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_LAYOUTS: Final = {
    abi.Request.API: abi.API,
    abi.Request.REGISTER: abi.REGISTER,
    abi.Request.UNREGISTER: abi.RANGE,
    abi.Request.WAKE: abi.RANGE,
    abi.Request.COPY: abi.COPY,
    abi.Request.ZEROPAGE: abi.ZEROPAGE,
    abi.Request.MOVE: abi.MOVE,
    abi.Request.WRITEPROTECT: abi.WRITEPROTECT,
    abi.Request.CONTINUE: abi.CONTINUE,
    abi.Request.POISON: abi.POISON,
    abi.Request.RWPROTECT: abi.RWPROTECT,
    abi.Request.SET_MODE: abi.SET_MODE,
}


class Answer(NamedTuple):
    """What the kernel made of a request: the error number (0 if none) and the last field of the structure."""

    errno: int
    field: int


def ask_at(fd: int, request: int, address: int) -> int:
    """Issue a request with its structure at any address; return the error number, 0 if none. The GIL is free."""
    return ctypes.get_errno() if _libc.ioctl(fd, request, address) < 0 else 0


def ask(uffd: Userfaultfd | int, request: abi.Request, *values: int) -> Answer:
    """Issue a request that nothing of ours has checked. A result that is not given is preset to `UNTOUCHED`."""
    layout = _LAYOUTS[request]
    values += (UNTOUCHED,) * (len(layout.fields) - len(values))
    buffer = ctypes.create_string_buffer(layout.pack(*values), layout.size)
    fd = uffd if isinstance(uffd, int) else uffd.fd
    number = ask_at(fd, request, ctypes.addressof(buffer))
    return Answer(number, layout.unpack(buffer)[-1])


def kernel_call(name: str, *arguments: Any) -> int:
    """Call a function of libc; return the error number, 0 if none. The GIL is free."""
    function = getattr(_libc, name)
    function.restype = ctypes.c_int  # also of those that return a long: -1 is -1
    words = (ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)
    return ctypes.get_errno() if function(*words) == -1 else 0


def kernel_reads(address: int) -> int:
    """Have the kernel read a byte there (write(2) into a pipe). Gives the error number; waits where it waits."""
    receiver, sender = os.pipe()
    try:
        return kernel_call("write", sender, address, 1)
    finally:
        os.close(receiver)
        os.close(sender)


def kernel_writes(address: int) -> int:
    """Have the kernel write a byte there (read(2) from a pipe). Gives the error number; waits where it waits."""
    receiver, sender = os.pipe()
    try:
        os.write(sender, b"k")
        return kernel_call("read", receiver, address, 1)
    finally:
        os.close(receiver)
        os.close(sender)


# --- memory ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def registered(
    kind: MemoryKind = ANONYMOUS,
    pages: int = 4,
    mode: RegisterMode = MISSING,
    features: Feature = NO_FEATURES,
) -> Iterator[tuple[Area, Userfaultfd]]:
    """An empty area, registered."""
    with make_area(kind, pages) as area, Userfaultfd(features) as uffd:
        uffd.register(area.memory, mode=mode)
        yield area, uffd


def fill_cache(area: Area, page: int, data: bytes) -> None:
    """Have a page in the file behind an area, through another mapping: no page table of the area knows of it."""
    assert area.memory.fd is not None
    with Mapping.of_file(area.memory.fd, area.length) as file:
        file.write(page * area.page_size, data)


def in_file(area: Area, page: int) -> bytes:
    """The first bytes of a page of the file behind an area."""
    assert area.memory.fd is not None
    with Mapping.of_file(area.memory.fd, area.length) as file:
        return file.read(page * area.page_size, 32)


def bytes_at(address: int, length: int = 32) -> bytes:
    """Copy bytes out of any memory of this process; the GIL is free while it may fault."""
    found = ctypes.create_string_buffer(length)
    _libc.memmove(found, ctypes.c_void_p(address), ctypes.c_size_t(length))
    return found.raw


def entry(address: int, pid: int | None = None) -> abi.PagemapBit:
    """The flags of a page in the pagemap."""
    with open(f"/proc/{pid or 'self'}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        return abi.PagemapBit(int.from_bytes(pagemap.read(8), "little") >> 55 << 55)


def vma(address: int) -> VmFlags:
    """The mapping at an address, as smaps has it."""
    (found,) = pagemap.vm_flags(address)
    return found


def smaps_bytes(address: int, *fields: str) -> int:
    """The sum of some numbers that smaps tells of the mapping at an address."""
    found = start = end = 0
    with open("/proc/self/smaps") as lines:
        for line in lines:
            head, _, rest = line.partition(" ")
            if "-" in head and ":" not in head:
                start, end = (int(part, 16) for part in head.split("-"))
            elif start <= address < end and head.removesuffix(":") in fields:
                found += int(rest.split()[0]) << 10
    return found


def mapped_huge(address: int) -> bool:
    """Whether transparent huge pages are mapped in the mapping at an address."""
    return smaps_bytes(address, "AnonHugePages", "ShmemPmdMapped") > 0


def swap_out(area: Area) -> None:
    """Have all pages of an area, which is a mapping of its own, written to swap; skip where there is none."""
    needs_swap()

    def gone() -> bool:
        area.memory.madvise(Advice.PAGEOUT)
        return smaps_bytes(area.start, "Swap") == area.length

    wait_until(gone, "the pages are swapped out")


@dataclass(frozen=True)
class Filling:
    """One of the five fill requests, and memory that it can fill: bare, and through our API."""

    request: abi.Request
    area: Area
    uffd: Userfaultfd
    source: int  # where COPY and MOVE take the pages from

    def values(self, page: int = 0, count: int = 1, mode: int = 0) -> tuple[int, ...]:
        """What goes into the structure."""
        start, length = self.area.page(page), count * self.area.page_size
        if self.request in (abi.Request.COPY, abi.Request.MOVE):
            return start, self.source + page * self.area.page_size, length, mode
        return start, length, mode

    def ask(self, page: int = 0, count: int = 1, mode: int = 0) -> Answer:
        """Issue it, unchecked."""
        return ask(self.uffd, self.request, *self.values(page, count, mode))

    def _arguments(self, page: int, count: int) -> tuple[int, ...]:
        return self.values(page, count)[:-1]

    def attempt(self, page: int = 0, count: int = 1, *, wake: bool = True) -> Outcome:
        """Issue it with the kernel's errors as values."""
        name = f"try_{self.request.name.lower()}"
        outcome = getattr(self.uffd, name)(*self._arguments(page, count), wake=wake)
        assert isinstance(outcome, Outcome)
        return outcome

    def fill(self, page: int = 0, count: int = 1, *, wake: bool = True) -> int:
        """Issue it with the kernel's errors as exceptions."""
        name = "continue_" if self.request == abi.Request.CONTINUE else self.request.name.lower()
        done = getattr(self.uffd, name)(*self._arguments(page, count), wake=wake)
        assert isinstance(done, int)
        return done


@contextlib.contextmanager
def filling(request: abi.Request, pages: int = 4) -> Iterator[Filling]:
    """Memory that a fill request can fill, registered and empty, and its source."""
    minor = request == abi.Request.CONTINUE
    kind = MemoryKind.SHMEM if minor else MemoryKind.ANONYMOUS
    with (
        registered(kind, pages, MINOR if minor else MISSING) as (area, uffd),
        make_area(ANONYMOUS, pages) as source,
    ):
        source.populate()
        if minor:
            assert area.memory.fd is not None
            for page in range(pages):
                os.pwrite(area.memory.fd, source.pattern(page), page * PAGE)
        yield Filling(request, area, uffd, source.start)


@dataclass(frozen=True)
class Exited:
    """What a process that has exited left: its userfaultfd, and where its memory was."""

    uffd: Userfaultfd
    start: int


@contextlib.contextmanager
def exited_owner() -> Iterator[Exited]:
    """A userfaultfd whose memory is gone with its process; it was registered for MISSING and WP."""

    def run(link: Link) -> None:
        with registered(ANONYMOUS, 4, MISSING | WP) as (area, uffd):
            link.send(area.start, (uffd.fd,))
            link.receive()

    with subject(run) as child:
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            child.send("go")
            child.receive()
            child.wait()
            yield Exited(uffd, start)


# --- threads and processes ------------------------------------------------------------------------------------


class Job:
    """A thread that makes one call, which may wait in the kernel while the GIL is free.

    As a context manager it waits for the end of the call, and raises what that raised.
    """

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call = call
        self._arguments = arguments
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call(*self._arguments)
        except BaseException as error:  # told by `result`
            self._error = error

    @property
    def thread_id(self) -> int:
        """The kernel's number of the thread."""
        assert self._thread.native_id is not None
        return self._thread.native_id

    @property
    def ident(self) -> int:
        """Python's number of the thread."""
        assert self._thread.ident is not None
        return self._thread.ident

    @property
    def done(self) -> bool:
        """Whether the call has ended."""
        return not self._thread.is_alive()

    def state(self) -> str:
        """The kernel's letter for what the thread does; D where only a fatal signal could interrupt it."""
        stat = Path(f"/proc/self/task/{self.thread_id}/stat").read_text()
        return stat.rpartition(")")[2].split()[0]

    def blocks(self, state: str = "D") -> None:
        """Wait until it waits in this state."""
        wait_until(lambda: self.done or self.state() == state, f"the thread waits in state {state}")
        assert not self.done, "the call did not wait"

    def result(self) -> Any:
        """Wait for the end of the call and return its result."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the call still waits in the kernel"
        if self._error is not None:
            raise self._error
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.result()


class SignalInfo(NamedTuple):
    """What a signal handler is told of an access that failed (siginfo_t)."""

    number: int
    code: int
    address: int
    lsb: int


_HANDLER: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    # struct sigaction of libc, on all that have the generic order of its members
    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def tell_signals(link: Link) -> object:
    """In a child: have SIGBUS and SIGSEGV tell the other process what they are, and end this one.

    Returns:
        What must be kept alive.
    """

    def tell(number: int, info: int, _: int) -> None:
        raw = ctypes.string_at(info, 32)
        link.send(
            SignalInfo(
                number,
                int.from_bytes(raw[8:12], "little", signed=True),
                int.from_bytes(raw[16:24], "little"),
                int.from_bytes(raw[24:26], "little"),
            )
        )
        os._exit(0)

    sa_siginfo = 4
    action = _Action(_HANDLER(tell), flags=sa_siginfo)
    for number in (signal.SIGBUS, signal.SIGSEGV):
        assert _libc.sigaction(int(number), ctypes.byref(action), None) == 0
    return action  # to be kept alive


def signal_info(touch: Callable[..., Any], *arguments: Any) -> SignalInfo | None:
    """Run `touch(*arguments)` in a forked child; return what the signal says that ends it, None if none does."""

    def run(link: Link) -> None:
        kept = tell_signals(link)
        touch(*arguments)
        del kept

    with subject(run) as child:
        found = child.receive()
        assert child.wait() == 0
        assert found is None or isinstance(found, SignalInfo)
        return found


def drop_privileges() -> None:
    """Become a user without any capability. Only in a forked child."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)


@contextlib.contextmanager
def mounted(kind: str, options: str = "") -> Iterator[Path]:
    """An empty file system; skip where nothing can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        if kernel_call("mount", b"userfault-test", folder.encode(), kind.encode(), 0, options.encode()):
            pytest.skip(f"needs to mount a {kind}")
        try:
            yield Path(folder)
        finally:
            assert kernel_call("umount2", folder.encode(), 0) == 0


@contextlib.contextmanager
def ordinary_file() -> Iterator[int]:
    """The descriptor of a file of two pages and more that is on a disk, or at least not in shared memory."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(__file__, "rb"))
        with Mapping.of_file(file.fileno(), PAGE, shared=False) as found:
            in_shared_memory = found.kind is not MemoryKind.FILE
        if in_shared_memory:  # a system that runs from memory
            copy = stack.enter_context(mounted("ramfs")) / "file"
            copy.write_bytes(Path(__file__).read_bytes())
            file = stack.enter_context(open(copy, "rb"))
        assert os.fstat(file.fileno()).st_size > 2 * PAGE
        yield file.fileno()
