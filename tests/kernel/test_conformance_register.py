"""The kernel's unit scenarios of the handshake and of registering, and what each kind of memory can have.

The scenarios and their numbers are those of the kernel's own `uffd-unit-tests`, listed in docs/kernel-api.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.kernel import HUGE, HUGE_KINDS, KINDS, PAGE, available_features, huge_pages, libc, make_area
from support.kernel_facts import ask, documented
from support.kernel_scenarios import for_kinds, huge_area
from userfault.kernel import Feature, OpenWay, RegisterMode, Userfaultfd
from userfault.kernel.abi import Operation, Request
from userfault.kernel.errors import (
    FeatureError,
    InvalidRequestError,
    NotInitialisedError,
    UffdError,
    UffdPermissionError,
    UsageError,
)
from userfault.kernel.mapping import MapFlag, Mapping, MemoryKind, Protection
from userfault.kernel.pagemap import vm_flags

MISSING, WP, MINOR, RWP = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR, RegisterMode.RWP
MODES = [MISSING, WP, MISSING | WP, MINOR, MISSING | MINOR, WP | MINOR, MISSING | WP | MINOR]
RWP_MODES = [RWP, MISSING | RWP, MINOR | RWP, MISSING | MINOR | RWP]

# What the kernel's own scenario requires.
every_memory_feature = pytest.mark.needs_feature(
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "PAGEFAULT_FLAG_WP",
    "WP_HUGETLBFS_SHMEM",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
)


@dataclass(frozen=True)
class Elsewhere:
    """Memory that nobody of us has mapped."""

    address: int
    nbytes: int
    kind: MemoryKind = MemoryKind.FILE


Memory = Mapping | Elsewhere


# --- the handshake --------------------------------------------------------------------------------------------


def _check_handshake(uffd: Userfaultfd) -> None:
    # A wrong version of the interface. The kernel answers a refused handshake with zeros.
    answer = ask(uffd, Request.API, 0xAB, 0, 0x77)
    assert answer == (errno.EINVAL, 0)
    # A feature that no kernel has.
    unknown = Feature(1 << 63)
    assert ask(uffd, Request.API, 0xAA, int(unknown), 0x77) == (errno.EINVAL, 0)
    with pytest.raises(FeatureError) as failure:
        uffd.handshake(unknown)
    assert failure.value.missing == unknown
    assert not uffd.initialised
    assert not uffd.fdinfo().initialised
    # After all that the descriptor is as good as new.
    assert uffd.handshake() == Feature(0)
    basic = Operation.API | Operation.REGISTER | Operation.UNREGISTER
    assert uffd.available_operations & basic == basic
    assert uffd.fdinfo().initialised
    assert uffd.fdinfo().features == Feature(0)
    # There is no second one, whatever it asks for.
    assert ask(uffd, Request.API, 0xAA, int(Feature.PAGEFAULT_FLAG_WP)).errno == errno.EINVAL
    assert ask(uffd, Request.API, 0xAA, 0).errno == errno.EINVAL
    with pytest.raises(NotInitialisedError):
        uffd.handshake()
    assert uffd.fdinfo().features == Feature(0)


@pytest.mark.scenario(1)
def test_the_handshake_by_system_call() -> None:
    """Scenario 1, api-syscall."""
    with Userfaultfd(way=OpenWay.USER_MODE_ONLY, handshake=False) as uffd:
        _check_handshake(uffd)


@pytest.mark.scenario(2)
def test_the_handshake_by_device() -> None:
    """Scenario 2, api-dev."""
    try:
        uffd = Userfaultfd(way=OpenWay.DEVICE, handshake=False)
    except UffdError:
        pytest.skip("needs /dev/userfaultfd")
    with uffd:
        _check_handshake(uffd)


# --- registering ----------------------------------------------------------------------------------------------


def _expected(kind: MemoryKind, mode: RegisterMode) -> Operation:
    """What REGISTER is to offer. It offers MOVE for shared memory too, where MOVE then fails."""
    offered = Operation.WAKE | Operation.COPY
    if available_features() & Feature.POISON:
        offered |= Operation.POISON
    if kind not in HUGE_KINDS:
        offered |= Operation.ZEROPAGE
        if available_features() & Feature.MOVE:
            offered |= Operation.MOVE
    if mode & WP:
        offered |= Operation.WRITEPROTECT
    if mode & MINOR:
        offered |= Operation.CONTINUE
    if mode & RWP:
        offered |= Operation.RWPROTECT
    return offered


def _flags_in_smaps(address: int) -> set[str]:
    (found,) = [flags for flags in vm_flags(address) if flags.start <= address < flags.end]
    return {
        name
        for name, is_set in (
            ("um", found.missing),
            ("uw", found.write_protect),
            ("ui", found.minor),
            ("ur", found.read_write_protect),
        )
        if is_set
    }


def _expected_flags(mode: RegisterMode) -> set[str]:
    return {name for bit, name in ((MISSING, "um"), (WP, "uw"), (MINOR, "ui"), (RWP, "ur")) if mode & bit}


def _check_accepted(
    uffd: Userfaultfd, memory: Memory, mode: RegisterMode, kind: MemoryKind | None = None
) -> None:
    registration = uffd.register(memory, mode=mode)
    assert registration.operations == _expected(memory.kind if kind is None else kind, mode)
    assert (registration.start, registration.length) == (memory.address, memory.nbytes)
    assert registration.mode == mode
    assert _flags_in_smaps(memory.address) == _expected_flags(mode)
    uffd.unregister(memory)
    assert _flags_in_smaps(memory.address) == set()


def _check_refused(uffd: Userfaultfd, memory: Memory, mode: RegisterMode) -> None:
    with pytest.raises(InvalidRequestError) as failure:
        uffd.register(memory, mode=mode)
    assert failure.value.errno == errno.EINVAL
    # The word for what the memory would offer is written on success only.
    values = (memory.address, memory.nbytes, int(mode), 0x77)
    assert ask(uffd, Request.REGISTER, *values) == (errno.EINVAL, 0x77)
    assert _flags_in_smaps(memory.address) == set()


@pytest.mark.scenario(3)
@every_memory_feature
@for_kinds(*KINDS)
def test_what_registering_offers(kind: MemoryKind) -> None:
    """Scenario 3, register-ioctls."""
    with make_area(kind, 1) as area, Userfaultfd() as uffd:
        # No mode at all.
        assert ask(uffd, Request.REGISTER, area.start, area.length, 0, 0x77) == (errno.EINVAL, 0x77)
        with pytest.raises(UsageError):
            uffd.register(area.memory, mode=RegisterMode(0))
        for mode in MODES:
            if mode & MINOR and kind is MemoryKind.ANONYMOUS:
                _check_refused(uffd, area.memory, mode)
            else:
                _check_accepted(uffd, area.memory, mode)


@pytest.mark.needs_feature("RWP")
@for_kinds(*KINDS)
def test_what_registering_for_reads_and_writes_offers(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd(Feature.RWP) as uffd:
        for mode in RWP_MODES:
            if mode & MINOR and kind is MemoryKind.ANONYMOUS:
                _check_refused(uffd, area.memory, mode)
            else:
                _check_accepted(uffd, area.memory, mode)


# --- the same for more sorts of memory ------------------------------------------------------------------------


@contextlib.contextmanager
def _system_v() -> Iterator[Memory]:
    """System V shared memory is tmpfs inside, and yet to userfaultfd a file like any other."""
    libc.shmat.restype = ctypes.c_void_p
    identifier = libc.shmget(0, ctypes.c_size_t(PAGE), 0o1600)  # IPC_PRIVATE; IPC_CREAT is 0o1000
    assert identifier >= 0
    try:
        address = libc.shmat(identifier, None, 0)
    finally:
        assert libc.shmctl(identifier, 0, None) == 0  # IPC_RMID: it goes with its last mapping
    try:
        yield Elsewhere(address, PAGE)
    finally:
        assert libc.shmdt(ctypes.c_void_p(address)) == 0


@contextlib.contextmanager
def _locked() -> Iterator[Mapping]:
    with Mapping.anonymous(PAGE) as memory:
        memory.mlock()
        yield memory


@contextlib.contextmanager
def _transparent_huge() -> Iterator[Mapping]:
    with huge_area(1) as area:
        area.memory.write(0, b"populated")
        yield area.memory


@contextlib.contextmanager
def _on_tmpfs() -> Iterator[Mapping]:
    # /proc/self/fd gives a second open file, as one of a mounted tmpfs has it.
    with (
        Mapping.memfd(PAGE) as file,
        open(f"/proc/self/fd/{file.fd}", "r+b", buffering=0) as opened,
        Mapping.of_file(opened.fileno(), PAGE) as memory,
    ):
        assert memory.kind is MemoryKind.SHMEM
        yield memory


_SORTS = {
    "mlocked": _locked,
    "thp": _transparent_huge,
    "stack": lambda: Mapping.anonymous(PAGE, flags=MapFlag.GROWSDOWN | MapFlag.STACK),
    "no_access": lambda: Mapping.anonymous(PAGE, protection=Protection.NONE),
    "read_only": lambda: Mapping.anonymous(PAGE, protection=Protection.READ),
    "shared_anonymous": lambda: Mapping.anonymous(PAGE, shared=True),
    "tmpfs": _on_tmpfs,
}


@every_memory_feature
@pytest.mark.parametrize("sort", _SORTS)
def test_more_sorts_of_memory(sort: str) -> None:
    with _SORTS[sort]() as memory, Userfaultfd() as uffd:
        for mode in MODES:
            if mode & MINOR and memory.kind is MemoryKind.ANONYMOUS:
                _check_refused(uffd, memory, mode)
            else:
                _check_accepted(uffd, memory, mode)


@pytest.mark.needs_feature("RWP")
@pytest.mark.parametrize("sort", _SORTS)
def test_more_sorts_of_memory_for_reads_and_writes(sort: str) -> None:
    with _SORTS[sort]() as memory, Userfaultfd(Feature.RWP) as uffd:
        for mode in RWP_MODES:
            if (mode & MINOR and memory.kind is MemoryKind.ANONYMOUS) or sort == "no_access":
                _check_refused(uffd, memory, mode)
            else:
                _check_accepted(uffd, memory, mode)


@every_memory_feature
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_huge_pages_of_no_file(shared: bool) -> None:
    kind = MemoryKind.HUGETLB if shared else MemoryKind.PRIVATE_HUGETLB
    with (
        huge_pages(1),
        Mapping.anonymous(HUGE, shared=shared, huge_page_size=HUGE) as memory,
        Userfaultfd() as uffd,
    ):
        assert memory.kind is kind
        for mode in MODES:
            _check_accepted(uffd, memory, mode)


@contextlib.contextmanager
def _ramfs() -> Iterator[Path]:
    """A file system that is no tmpfs, and has no disk either."""
    folder = tempfile.mkdtemp()
    try:
        if libc.mount(b"none", folder.encode(), b"ramfs", ctypes.c_ulong(0), None) != 0:
            pytest.skip("needs a file on a disk")
        try:
            yield Path(folder)
        finally:
            assert libc.umount2(folder.encode(), 0) == 0
    finally:
        os.rmdir(folder)


@contextlib.contextmanager
def _file_mapping() -> Iterator[Mapping]:
    """A file that is not in memory only: this one, but where all files are."""
    with open(__file__, "rb") as file, Mapping.of_file(file.fileno(), PAGE, shared=False) as memory:
        if memory.kind is MemoryKind.FILE:
            yield memory
            return
    with _ramfs() as folder, open(folder / "file", "w+b") as file:
        file.truncate(PAGE)
        with Mapping.of_file(file.fileno(), PAGE) as memory:
            assert memory.kind is MemoryKind.FILE
            yield memory


@contextlib.contextmanager
def _secret() -> Iterator[Mapping]:
    memfd_secret = 447
    fd = libc.syscall(memfd_secret, os.O_CLOEXEC)
    if fd < 0:
        pytest.skip("needs memfd_secret")
    try:
        os.ftruncate(fd, PAGE)
        with Mapping.of_file(fd, PAGE) as memory:
            yield memory
    finally:
        os.close(fd)


_FILES = {"file": _file_mapping, "memfd_secret": _secret, "system_v": _system_v}


@pytest.mark.parametrize("sort", _FILES)
def test_files_cannot_be_registered(sort: str) -> None:
    with _FILES[sort]() as memory, Userfaultfd() as uffd:
        for mode in MODES:
            _check_refused(uffd, memory, mode)


@pytest.mark.needs_feature("WP_ASYNC")
@pytest.mark.parametrize("sort", _FILES)
def test_files_can_be_registered_for_asynchronous_write_protection_alone(sort: str) -> None:
    with _FILES[sort]() as memory, Userfaultfd(Feature.WP_ASYNC) as uffd:
        for mode in MODES:
            if mode == WP:
                # It is offered what shared memory has, and refuses most of it when asked.
                _check_accepted(uffd, memory, mode, kind=MemoryKind.SHMEM)
            else:
                _check_refused(uffd, memory, mode)


@contextlib.contextmanager
def _droppable() -> Iterator[Mapping]:
    try:
        memory = Mapping.anonymous(PAGE, flags=MapFlag.DROPPABLE)
    except UffdError:
        pytest.skip("needs MAP_DROPPABLE (Linux 6.11)")
    with memory:
        yield memory


@contextlib.contextmanager
def _kernels_own(name: str) -> Iterator[Memory]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f"[{name}]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            yield Elsewhere(start, end - start)
            return
    pytest.skip(f"needs [{name}]")


_REFUSED = {
    "vdso": lambda: _kernels_own("vdso"),
    "vvar": lambda: _kernels_own("vvar"),
}


@pytest.mark.parametrize("sort", _REFUSED)
def test_memory_that_cannot_be_registered(sort: str) -> None:
    optional = Feature.WP_ASYNC | Feature.RWP | Feature.RWP_ASYNC
    with _REFUSED[sort]() as memory, Userfaultfd(optional=optional) as uffd:
        for mode in (*MODES, *(RWP_MODES if uffd.features & Feature.RWP else ())):
            _check_refused(uffd, memory, mode)


def test_droppable_memory_is_refused_where_the_kernel_looks() -> None:
    (accepted, *doubt) = documented("REGISTER of droppable memory")
    with _droppable() as memory, Userfaultfd() as uffd:
        if doubt:
            accepted = ask(uffd, Request.REGISTER, memory.address, memory.nbytes, int(MISSING)).errno
            assert accepted in (0, errno.EINVAL)
            uffd.unregister(memory)
        for mode in MODES:
            if accepted == 0 and not mode & MINOR:
                _check_accepted(uffd, memory, mode)
            else:
                _check_refused(uffd, memory, mode)


def test_what_can_never_be_written_is_not_permitted() -> None:
    with Mapping.memfd(PAGE) as file, Userfaultfd() as uffd:
        # A shared mapping of a file that is open for reading only.
        with open(f"/proc/self/fd/{file.fd}", "rb", buffering=0) as read_only:
            with Mapping.of_file(read_only.fileno(), PAGE, protection=Protection.READ) as memory:
                with pytest.raises(UffdPermissionError) as failure:
                    uffd.register(memory)
                assert failure.value.errno == errno.EPERM
            with Mapping.of_file(
                read_only.fileno(), PAGE, shared=False, protection=Protection.READ
            ) as memory:
                _check_accepted(uffd, memory, MISSING)
        # Read-only today, and yet it may be written one day.
        with Mapping.of_file(file.fd, PAGE, protection=Protection.READ) as memory:
            _check_accepted(uffd, memory, MISSING)
