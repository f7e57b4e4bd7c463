"""REGISTER (docs/kernel-api.md, 2.2, and which memory can have which mode, 1.4).

Unchecked: ENOMEM while mappings are split (the limit of mappings is the whole system's); guest_memfd (needs KVM);
shadow stacks (need a processor that has them); which of several EINVALs came first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.kernel import (
    HUGE,
    HUGE_KINDS,
    KINDS,
    PAGE,
    available_features,
    make_area,
)
from support.kernel_facts import (
    UNTOUCHED,
    Answer,
    ask,
    ask_at,
    exited_owner,
    ordinary_file,
    registered,
    vma,
)
from support.kernel_releases import documented
from userfault.kernel import Feature, RegisterMode, Userfaultfd
from userfault.kernel.abi import Operation, Request
from userfault.kernel.errors import (
    InvalidRequestError,
    NoMemoryError,
    RangeBusyError,
    UffdPermissionError,
    UsageError,
)
from userfault.kernel.mapping import MapFlag, Mapping, MemoryKind, Protection

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
RWP = RegisterMode.RWP
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def modes_of(address: int) -> RegisterMode:
    """How the mapping at an address is registered."""
    flags = {"um": MISSING, "uw": WP, "ui": MINOR, "ur": RWP}
    found = RegisterMode(0)
    for flag in vma(address).flags & flags.keys():
        found |= flags[flag]
    return found


# --- 1.4: which memory can have which mode ---------------------------------------------------------------------


def expected_operations(kind: MemoryKind, mode: RegisterMode) -> Operation:
    here = available_features()
    found = Operation.WAKE | Operation.COPY
    found |= Operation.POISON if Feature.POISON in here else Operation(0)
    found |= Operation.WRITEPROTECT if WP in mode else Operation(0)
    found |= Operation.CONTINUE if MINOR in mode else Operation(0)
    if kind not in HUGE_KINDS:
        found |= Operation.ZEROPAGE
        found |= Operation.MOVE if Feature.MOVE in here else Operation(0)
    return found


@pytest.mark.fact("1.4")
@every_kind
def test_the_modes_of_each_kind_and_what_they_promise(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd() as uffd:
        for bits in range(1, 8):
            mode = RegisterMode(bits)
            if kind is ANONYMOUS and MINOR in mode:
                assert ask(uffd, Request.REGISTER, area.start, area.length, mode) == Answer(
                    errno.EINVAL, UNTOUCHED
                )
                with pytest.raises(InvalidRequestError, match="MINOR wants shared memory"):
                    uffd.register(area.memory, mode=mode)
                continue
            registration = uffd.register(area.memory, mode=mode)
            assert registration.operations == expected_operations(kind, mode)
            assert modes_of(area.start) == mode
            uffd.unregister(area.memory)
            assert not vma(area.start).registered


def secret_memory() -> int:
    """A descriptor of memory that even the kernel does not see; skip where there is none."""
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(447, os.O_CLOEXEC)  # the same on all architectures
    if fd < 0:
        pytest.skip("needs memfd_secret (Linux 6.5, or secretmem.enable=1)")
    os.ftruncate(fd, PAGE)
    return fd


@contextlib.contextmanager
def unsupported(what: str) -> Iterator[int]:
    """The address of a page that cannot be registered."""
    with contextlib.ExitStack() as stack:
        if what == "file":
            fd = stack.enter_context(ordinary_file())
            yield stack.enter_context(Mapping.of_file(fd, PAGE, shared=False)).address
        elif what == "secret":
            fd = secret_memory()
            stack.callback(os.close, fd)
            yield stack.enter_context(Mapping.of_file(fd, PAGE)).address
        elif what == "droppable":
            try:
                memory = Mapping.anonymous(PAGE, flags=MapFlag.DROPPABLE)
            except InvalidRequestError:
                pytest.skip("needs MAP_DROPPABLE (Linux 6.11)")
            yield stack.enter_context(memory).address
        else:
            (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if "[vdso]" in line)
            yield int(line.partition("-")[0], 16)


@pytest.mark.fact("1.4")
@pytest.mark.parametrize("what", ["file", "secret", "droppable", "vdso"])
def test_what_cannot_be_registered(what: str) -> None:
    answers = documented("REGISTER of droppable memory") if what == "droppable" else (errno.EINVAL,)
    with unsupported(what) as address:
        for mode in (MISSING, WP, MISSING | WP, MINOR):
            with Userfaultfd() as uffd:
                answer = ask(uffd, Request.REGISTER, address, PAGE, mode)
                assert answer.errno in ((errno.EINVAL,) if mode == MINOR else answers)
                if answer.errno:
                    with pytest.raises(
                        InvalidRequestError, match="this kind of memory cannot have this mode"
                    ):
                        uffd.register(address, PAGE, mode=mode)
        if Feature.WP_ASYNC in available_features():
            with Userfaultfd(Feature.WP_ASYNC) as uffd:
                # To protect asynchronously, secret memory is a file like others.
                answer = ask(uffd, Request.REGISTER, address, PAGE, WP)
                assert answer.errno in ((0,) if what in ("file", "secret") else answers)


@pytest.mark.fact("1.4")
def test_the_stack_and_locked_memory_can_be_registered() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        try:
            area.memory.mlock()
        except NoMemoryError:
            pytest.skip("needs to lock 4 pages")
        uffd.register(area.memory)
        assert modes_of(area.start) == MISSING
    (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if "[stack]" in line)
    stack = int(line.partition("-")[0], 16)
    with Userfaultfd() as uffd:
        uffd.register(stack, PAGE, mode=WP)  # the far end; nothing is protected
        assert modes_of(stack) == WP


@pytest.mark.fact("1.4")
def test_memory_that_may_never_be_written_is_not_permitted() -> None:
    with Mapping.memfd(PAGE) as memory, Userfaultfd() as uffd:
        memory.write(0, b"x")
        fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            read = Protection.READ
            with Mapping.of_file(fd, PAGE, protection=read) as shared:
                with pytest.raises(UffdPermissionError, match="may never become writable"):
                    uffd.register(shared)
                assert ask(uffd, Request.REGISTER, shared.address, PAGE, MISSING) == Answer(
                    errno.EPERM, UNTOUCHED
                )
            with Mapping.of_file(fd, PAGE, protection=read, shared=False) as private:
                uffd.register(private)
            with memory.alias(protection=read) as readable:
                uffd.register(readable)
        finally:
            os.close(fd)


@pytest.mark.fact("1.4")
def test_memory_that_nobody_can_touch_can_be_registered() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        area.memory.protect(Protection.NONE)
        uffd.register(area.memory, mode=MISSING | WP)
        assert uffd.copy(area.start, area.pattern(0)) == PAGE
        area.memory.protect(Protection.READ | Protection.WRITE)
        assert area.head(0) == area.pattern(0)[:32]


# --- 2.2: REGISTER --------------------------------------------------------------------------------------------


@pytest.mark.fact("2.2")
def test_the_arguments_of_register() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        start, length = area.start, area.length
        assert ask_at(uffd.fd, Request.REGISTER, 0) == errno.EFAULT
        refused = Answer(errno.EINVAL, UNTOUCHED)
        assert ask(uffd, Request.REGISTER, start, length, 0) == refused
        with pytest.raises(UsageError, match="mode 0x0 traps nothing"):
            uffd.register(area.memory, mode=RegisterMode(0))
        assert ask(uffd, Request.REGISTER, start, length, 1 << 40 | MISSING) == refused
        with pytest.raises(InvalidRequestError):
            uffd.register(area.memory, mode=RegisterMode(1 << 40) | MISSING)
        assert ask(uffd, Request.REGISTER, start, length, RWP) == refused
        with pytest.raises(UsageError, match="RWP needs the feature"):
            uffd.register(area.memory, mode=RWP)
        assert ask(uffd, Request.REGISTER, start, length, WP | RWP) == refused
        with pytest.raises(UsageError, match="exclude each other"):
            uffd.register(area.memory, mode=WP | RWP)
        assert not vma(start).registered


@pytest.mark.fact("2.2")
def test_nothing_mapped_is_invalid() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        area.memory.unmap(PAGE, 2 * PAGE)
        assert ask(uffd, Request.REGISTER, area.page(1), 2 * PAGE, MISSING) == Answer(errno.EINVAL, UNTOUCHED)
        with pytest.raises(InvalidRequestError, match="nothing is mapped"):
            uffd.register(area.page(1), 2 * PAGE)


@pytest.mark.fact("2.2")
def test_the_arguments_win_over_an_owner_that_has_exited() -> None:
    with exited_owner() as gone:
        assert ask(gone.uffd, Request.REGISTER, gone.start, PAGE, 0).errno == errno.EINVAL
        assert ask(gone.uffd, Request.REGISTER, gone.start + 1, PAGE, MISSING).errno == errno.EINVAL
        assert ask(gone.uffd, Request.REGISTER, gone.start, PAGE, MISSING) == Answer(errno.ENOMEM, UNTOUCHED)
        with pytest.raises(NoMemoryError, match="the owner of the memory has exited"):
            gone.uffd.register(gone.start, PAGE)


@pytest.mark.fact("2.2")
@pytest.mark.parametrize("kind", HUGE_KINDS, ids=str)
def test_huge_pages_are_registered_whole(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd() as uffd:
        begins_inside, ends_inside = (area.start + PAGE, HUGE), (area.start, PAGE)
        for start, length in (begins_inside, ends_inside):
            assert ask(uffd, Request.REGISTER, start, length, MISSING) == Answer(errno.EINVAL, UNTOUCHED)
            with pytest.raises(InvalidRequestError, match="a huge page is cut"):
                uffd.register(start, length)
        assert not vma(area.start).registered
        # Where nothing is registered the end of UNREGISTER is not looked at.
        assert ask(uffd, Request.UNREGISTER, *begins_inside).errno == errno.EINVAL
        assert ask(uffd, Request.UNREGISTER, *ends_inside).errno == 0
        uffd.register(area.memory)
        for start, length in (begins_inside, ends_inside):
            assert ask(uffd, Request.UNREGISTER, start, length).errno == errno.EINVAL
            with pytest.raises(InvalidRequestError, match="a huge page is cut"):
                uffd.unregister(start, length)
        uffd.unregister(area.start, HUGE)
        assert not vma(area.start).registered
        assert vma(area.page(1)).missing


@pytest.mark.fact("2.2")
def test_one_mapping_has_one_userfaultfd() -> None:
    with registered() as (area, uffd), Userfaultfd() as other:
        assert ask(other, Request.REGISTER, area.page(1), PAGE, MISSING) == Answer(errno.EBUSY, UNTOUCHED)
        with pytest.raises(RangeBusyError, match="already registered by another userfaultfd"):
            other.register(area.memory, mode=WP)
        uffd.unregister(area.page(1), PAGE)
        other.register(area.page(1), PAGE)


@contextlib.contextmanager
def in_a_row(*memories: str) -> Iterator[int]:
    """One page of each of these, side by side, and the address of the first."""
    with contextlib.ExitStack() as stack:
        room = stack.enter_context(Mapping.anonymous(len(memories) * PAGE))
        start = room.address
        file = stack.enter_context(ordinary_file())
        sealed = stack.enter_context(Mapping.memfd(PAGE))
        fd = os.open(f"/proc/self/fd/{sealed.fd}", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        other = stack.enter_context(Userfaultfd())
        for index, memory in enumerate(memories):
            address = start + index * PAGE
            if memory == "busy":
                other.register(address, PAGE)
            if memory in ("anonymous", "busy"):
                continue
            room.unmap(index * PAGE, PAGE)
            if memory == "file":
                stack.enter_context(Mapping.of_file(file, PAGE, shared=False, address=address))
            elif memory == "read-only":
                stack.enter_context(Mapping.of_file(fd, PAGE, protection=Protection.READ, address=address))
            else:
                assert memory == "hole"
        yield start


@pytest.mark.fact("2.2")
@pytest.mark.parametrize(
    ("row", "number"),
    [
        ("anonymous file busy", errno.EINVAL),
        ("anonymous busy file", errno.EBUSY),
        ("anonymous read-only file", errno.EPERM),
        ("anonymous read-only busy", errno.EPERM),
        ("anonymous busy read-only", errno.EBUSY),
        ("hole anonymous hole file", errno.EINVAL),
    ],
)
def test_the_first_mapping_that_cannot_be_decides_and_none_is_registered(row: str, number: int) -> None:
    memories = row.split()
    with in_a_row(*memories) as start, Userfaultfd() as uffd:
        length = len(memories) * PAGE
        assert ask(uffd, Request.REGISTER, start, length, MISSING) == Answer(number, UNTOUCHED)
        assert not vma(start + memories.index("anonymous") * PAGE).registered


@pytest.mark.fact("2.2")
def test_holes_are_passed_over() -> None:
    with in_a_row("hole", "anonymous", "hole", "anonymous") as start, Userfaultfd() as uffd:
        uffd.register(start, 4 * PAGE)
        assert vma(start + PAGE).missing
        assert vma(start + 3 * PAGE).missing
        # And so they are when it ends.
        assert ask(uffd, Request.UNREGISTER, start, 4 * PAGE).errno == 0
        assert not vma(start + PAGE).registered
        assert not vma(start + 3 * PAGE).registered


AGAIN = [
    (MISSING, MISSING, "kept"),
    (MISSING | WP, WP, "kept"),
    (MISSING | MINOR, MINOR, "kept"),
    (MISSING | MINOR, MISSING, "kept"),
    (MISSING, MINOR, "replaced"),
    (MISSING, WP, "replaced"),
    (MINOR, MISSING | WP, "replaced"),
    (WP, MISSING | WP, "replaced"),
    (MISSING, MISSING | MINOR | WP, "replaced"),
    (WP, MISSING, "registering again without WP, which was all"),
    (MISSING | WP, MISSING, "registering again without WP, which was a part"),
    (MISSING | WP, MISSING | MINOR, "registering again without WP, which was all"),
]


@pytest.mark.fact("2.2")
def test_registering_again_replaces_the_mode_unless_the_old_has_all_of_it() -> None:
    for before, asked, fact in AGAIN:
        with make_area(SHMEM) as area, Userfaultfd() as uffd:
            uffd.register(area.memory, mode=before)
            answer = ask(uffd, Request.REGISTER, area.start, area.length, asked)
            outcomes = (fact,) if fact in ("kept", "replaced") else documented(fact)
            if answer.errno:
                assert "busy" in outcomes, (before, asked)
                assert answer == Answer(errno.EBUSY, UNTOUCHED), (before, asked)
                with pytest.raises(RangeBusyError, match="unregister it first"):
                    uffd.register(area.memory, mode=asked)
                uffd.unregister(area.memory)
                uffd.register(area.memory, mode=asked)
                assert modes_of(area.start) == asked
            else:
                outcome = "kept" if modes_of(area.start) == before else "replaced"
                assert outcome in outcomes or before == asked, (before, asked)
                assert modes_of(area.start) in (before, asked), (before, asked)


@pytest.mark.fact("2.2")
@every_kind
def test_pages_that_are_there_stay_and_are_not_missing(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd() as uffd:
        area.populate()
        uffd.register(area.memory)
        assert area.head(0) == area.pattern(0)[:32]
        uffd.unregister(area.memory)
        assert area.head(0) == area.pattern(0)[:32]
