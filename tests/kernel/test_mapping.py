"""`Mapping`: memory of every kind, its calls, and that nothing is unmapped which somebody uses."""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib.util
import mmap
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.kernel import HUGE, PAGE, huge_pages, in_child, signal_in_child
from support.processes import run_python
from userfault.errors import ClosedError, ExportedError
from userfault.kernel import Userfaultfd, _architecture, _mman, pagemap
from userfault.kernel.errors import (
    BadAddressError,
    InvalidRequestError,
    NoMemoryError,
    NotSupportedError,
    PageExistsError,
    UffdError,
    UffdPermissionError,
    UsageError,
    error_from_errno,
)
from userfault.kernel.mapping import Advice, MapFlag, Mapping, MemoryKind, Protection

READ = Protection.READ
READ_WRITE = Protection.READ | Protection.WRITE


@pytest.fixture
def memory() -> Iterator[Mapping]:
    """Four pages of a memfd."""
    with Mapping.memfd(4 * PAGE) as made:
        yield made


@pytest.fixture
def anonymous() -> Iterator[Mapping]:
    """Four pages of private anonymous memory."""
    with Mapping.anonymous(4 * PAGE) as made:
        yield made


def mapped(address: int) -> bool:
    """Whether something is mapped there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, _, high = line.split()[0].partition("-")
        if int(low, 16) <= address < int(high, 16):
            return True
    return False


def free_range(length: int) -> int:
    """An address where so many bytes are free."""
    with Mapping.anonymous(length) as found:
        return found.address


def death(run: Callable[[], object]) -> int:
    """The signal that ends a child which runs this; 0 if none."""

    def quietly() -> None:
        faulthandler.disable()  # the stacks of a death that is meant say nothing
        run()

    return signal_in_child(quietly)


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("enum", "prefix"), [(Advice, "MADV_"), (MapFlag, "MAP_"), (Protection, "PROT_")])
def test_numbers_are_those_that_python_knows(enum: Any, prefix: str) -> None:
    names = {prefix + member.name: member for member in enum.__members__.values()}
    known = {name: int(member) for name, member in names.items() if hasattr(mmap, name)}
    assert len(known) >= 3
    assert known == {name: getattr(mmap, name) for name in known}


_FAMILIES = {
    # From the headers of Linux 7.3: the flags below, and MADV_DONTNEED.
    "aarch64": [16, 32, 256, 8192, 16384, 32768, 131072, 262144, 1048576, 4],
    "ppc64le": [16, 32, 256, 128, 64, 32768, 131072, 262144, 1048576, 4],
    "sparc64": [16, 32, 512, 256, 64, 32768, 131072, 262144, 1048576, 4],
    "mips64": [16, 2048, 4096, 32768, 1024, 65536, 262144, 524288, 1048576, 4],
    "alpha": [256, 16, 4096, 32768, 65536, 131072, 524288, 1048576, 2097152, 6],
    "parisc64": [4, 16, 32768, 8192, 16384, 65536, 262144, 524288, 1048576, 4],
}


@pytest.mark.parametrize("machine", _FAMILIES)
def test_some_architectures_have_numbers_of_their_own(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_architecture, "architecture", lambda: machine)
    spec = importlib.util.spec_from_file_location("memory_calls_of_another_machine", _mman.__file__)
    assert spec is not None
    assert spec.loader is not None
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    flag = there.MapFlag
    found = [flag.FIXED, flag.ANONYMOUS, flag.GROWSDOWN, flag.LOCKED, flag.NORESERVE, flag.POPULATE, flag.STACK,
             flag.HUGETLB, flag.FIXED_NOREPLACE, there.Advice.DONTNEED]  # fmt: skip
    assert [int(number) for number in found] == _FAMILIES[machine]


# --- kinds and places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "shared", "has_file"),
    [
        (Mapping.anonymous, MemoryKind.ANONYMOUS, False, False),
        (lambda n: Mapping.anonymous(n, shared=True), MemoryKind.SHMEM, True, False),
        (Mapping.memfd, MemoryKind.SHMEM, True, True),
        (lambda n: Mapping.memfd(n, shared=False), MemoryKind.PRIVATE_SHMEM, False, True),
    ],
)
def test_kinds(make: Callable[[int], Mapping], kind: MemoryKind, shared: bool, has_file: bool) -> None:
    with make(3 * PAGE) as memory:
        assert (memory.kind, memory.shared, memory.fd is not None) == (kind, shared, has_file)
        assert (memory.length, memory.nbytes, memory.page_size) == (3 * PAGE, 3 * PAGE, PAGE)
        assert memory.address % PAGE == 0
        assert not pagemap.present(memory).any()  # nothing was touched
        assert memory.read(0, 3 * PAGE) == bytes(3 * PAGE)
        (flags,) = pagemap.vm_flags(memory)
        assert flags.permissions == ("rw-s" if shared else "rw-p")
    assert repr(memory) == f"<Mapping {kind} closed>"


@pytest.mark.needs_privilege("huge pages")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("by_file", [True, False])
def test_huge_pages(shared: bool, by_file: bool) -> None:
    make = Mapping.memfd if by_file else Mapping.anonymous
    with huge_pages(3):  # one for the file behind a private mapping
        with make(2 * HUGE, shared=shared, huge_page_size=HUGE) as memory:
            assert memory.kind is (MemoryKind.HUGETLB if shared else MemoryKind.PRIVATE_HUGETLB)
            assert memory.page_size == HUGE
            assert memory.address % HUGE == 0
            memory.write(HUGE - 3, b"across")
            assert memory.read(HUGE - 3, 6) == b"across"
            (flags,) = pagemap.vm_flags(memory)
            assert "ht" in flags.flags
            assert flags.page_size == HUGE
            with pytest.raises(
                UsageError, match=f"start {PAGE:#x} is not a multiple of the page size {HUGE}"
            ):
                memory.madvise(Advice.DONTNEED, PAGE, HUGE)
            if by_file:
                with Mapping.of_file(memory.fd, HUGE, offset=HUGE) as second:
                    assert second.page_size == HUGE
                    assert second.kind is MemoryKind.HUGETLB
        with pytest.raises(UsageError, match=f"length {PAGE} .* {HUGE} would be"):
            make(PAGE, huge_page_size=HUGE)
        with pytest.raises(NoMemoryError, match="nr_hugepages"):
            make(1 << 44, huge_page_size=HUGE)


def test_a_size_of_huge_pages_that_no_machine_has() -> None:
    for make in (Mapping.anonymous, Mapping.memfd):
        with pytest.raises(UffdError):
            make(PAGE << 1, huge_page_size=PAGE << 1)
        with pytest.raises(UsageError, match="power of two"):
            make(3 * PAGE, huge_page_size=3 * PAGE)


def test_at_an_address() -> None:
    address = free_range(4 * PAGE)
    with Mapping.anonymous(2 * PAGE, address=address) as memory:
        assert memory.address == address
        with Mapping.memfd(PAGE, address=address + 2 * PAGE) as second:
            assert second.address == address + 2 * PAGE


def test_what_is_mapped_is_never_replaced(memory: Mapping) -> None:
    memory.write(0, b"mine")
    with pytest.raises(
        PageExistsError, match=f"mmap .{memory.address:#x}.*EEXIST.*something is mapped there"
    ) as caught:
        Mapping.anonymous(PAGE, address=memory.address)
    assert isinstance(caught.value, FileExistsError)
    assert (caught.value.call, caught.value.address, caught.value.errno) == (
        "mmap",
        memory.address,
        errno.EEXIST,
    )
    assert memory.read(0, 4) == b"mine"


@pytest.mark.parametrize("make", [Mapping.anonymous, Mapping.memfd])
def test_aligned(make: Callable[..., Mapping]) -> None:
    for align in (PAGE, 2 << 20, 1 << 30):
        with make(3 * PAGE, align=align) as memory:
            assert memory.address % align == 0
            memory.write(3 * PAGE - 1, b"x")
    with pytest.raises(UsageError, match="power of two"):
        make(PAGE, align=3 * PAGE)
    with pytest.raises(UsageError, match="not a multiple of align"):
        make(PAGE, align=2 << 20, address=(2 << 20) + PAGE)


def test_a_terabyte_costs_nothing() -> None:
    with Mapping.anonymous(1 << 40, noreserve=True) as memory:
        memory.write((1 << 40) - 1, b"x")
        assert memory.read((1 << 40) - 2, 2) == b"\0x"
        (flags,) = pagemap.vm_flags(memory)
        assert "nr" in flags.flags
        with memory.view() as view:
            assert len(view) == 1 << 40


def test_populated_at_once() -> None:
    with Mapping.anonymous(4 * PAGE, populate=True) as memory:
        assert pagemap.present(memory).all()


def test_further_flags() -> None:
    with Mapping.anonymous(PAGE, flags=MapFlag.STACK | MapFlag.NORESERVE) as memory:
        assert memory.read(0, 1) == b"\0"
    try:
        droppable = Mapping.anonymous(PAGE, flags=MapFlag.DROPPABLE)
    except InvalidRequestError:
        pytest.skip("needs MAP_DROPPABLE (Linux 6.11)")
    with droppable:
        (flags,) = pagemap.vm_flags(droppable)
        assert "dp" in flags.flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, f"length 0 is not a positive multiple of the page size {PAGE}: {PAGE} would be"),
        ({"length": -PAGE}, "not a positive multiple"),
        ({"length": PAGE + 1}, f"length {PAGE + 1} .* {2 * PAGE} would be"),
        ({"length": PAGE, "address": 12345 * PAGE + 1}, "address 0x.* is not a multiple of the page size"),
        ({"length": PAGE, "align": 0}, "align 0 is not a power of two"),
        ({"length": PAGE, "huge_page_size": 1}, "huge page size 1 is not"),
    ],
)
def test_numbers_that_cannot_be(arguments: dict[str, int], message: str) -> None:
    for make in (Mapping.anonymous, Mapping.memfd):
        with pytest.raises(UsageError, match=message):
            make(**arguments)


def test_too_much_is_an_error_of_the_kernel() -> None:
    with pytest.raises(NoMemoryError) as caught:
        Mapping.anonymous(1 << 60)
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(NoMemoryError):
        Mapping.memfd(1 << 60)


# --- files ---------------------------------------------------------------------------------------------------------


def _is_shmem(memory: Mapping) -> bool:
    """Whether a userfaultfd can trap missing pages of this file's mapping: not those of a disk's."""
    with Userfaultfd() as uffd:
        try:
            uffd.register(memory)
        except InvalidRequestError:
            return False
        uffd.unregister(memory)
        return True


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"A" * PAGE + b"B" * PAGE + b"C")
    with path.open("r+b") as file:
        with (
            Mapping.of_file(file.fileno(), 2 * PAGE, offset=PAGE) as shared,
            Mapping.of_file(file.fileno(), PAGE, shared=False) as private,
        ):
            in_memory = (MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM)
            kinds = in_memory if _is_shmem(shared) else (MemoryKind.FILE, MemoryKind.FILE)
            assert (shared.kind, private.kind) == kinds
            assert (shared.offset, private.offset) == (PAGE, 0)
            assert shared.fd != file.fileno()
            assert shared.read(0, 2 * PAGE) == b"B" * PAGE + b"C" + bytes(PAGE - 1)
            shared.write(0, b"new")
            private.write(0, b"old")
            with shared.alias() as alias:
                assert alias.read(0, 4) == b"newB"
        assert os.pread(file.fileno(), 3, PAGE) == b"new"
        assert os.pread(file.fileno(), 3, 0) == b"AAA"


def test_what_cannot_be_mapped_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(UffdPermissionError, match="the file is not open for what the mapping wants"):
            Mapping.of_file(fd, PAGE)
        with pytest.raises(UsageError, match="offset 0x1 is not"):
            Mapping.of_file(fd, PAGE, offset=1, protection=READ)
        with Mapping.of_file(fd, PAGE, protection=READ) as memory:
            with pytest.raises(UffdPermissionError, match="mprotect"):
                memory.protect(READ_WRITE)
            assert memory.protection == READ
    finally:
        os.close(fd)
    with pytest.raises(UffdError, match="EBADF"):
        Mapping.of_file(fd, PAGE)
    counter = os.eventfd(0)
    try:
        with pytest.raises(NotSupportedError, match="this file cannot be mapped"):
            Mapping.of_file(counter, PAGE)
    finally:
        os.close(counter)


def test_beyond_the_end_of_the_file_is_a_signal(memory: Mapping) -> None:
    def touch() -> None:
        os.ftruncate(memory.fd, PAGE)
        memory.read(PAGE, 1)

    assert death(touch) == signal.SIGBUS


# --- aliases -------------------------------------------------------------------------------------------------------


def test_an_alias_shows_the_same_pages(memory: Mapping) -> None:
    with memory.alias(protection=READ) as alias:
        assert alias.address != memory.address
        assert (alias.kind, alias.length) == (memory.kind, memory.length)
        memory.write(PAGE, b"both")
        assert alias.read(PAGE, 4) == b"both"
        assert alias.protection == READ
        assert memory.protection == READ_WRITE
        memory.close()
        assert alias.read(PAGE, 4) == b"both"
        with alias.alias(protection=READ_WRITE, align=2 << 20) as third:
            third.write(0, b"third")
            assert third.address % (2 << 20) == 0
        assert alias.read(0, 5) == b"third"


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Mapping.anonymous(PAGE), "use Mapping.memfd"),
        (lambda: Mapping.anonymous(PAGE, shared=True), "use Mapping.memfd"),
        (lambda: Mapping.memfd(PAGE, shared=False), r"Mapping.of_file\(m.fd, m.length\)"),
    ],
    ids=["anonymous", "shared", "private"],
)
def test_nothing_to_share(make: Callable[[], Mapping], remedy: str) -> None:
    with make() as memory, pytest.raises(UsageError, match=remedy):
        memory.alias()


def test_the_file_of_a_private_mapping() -> None:
    with Mapping.memfd(PAGE, shared=False) as private, Mapping.of_file(private.fd, PAGE) as file:
        file.write(0, b"file")
        assert private.read(0, 4) == b"file"
        private.write(0, b"mine")
        assert file.read(0, 4) == b"file"


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"bytes",
        bytearray(b"bytes"),
        memoryview(b"xbytesx")[1:6],
        memoryview(bytearray(b"bytes")),
        np.frombuffer(b"bytes", np.uint8),
        np.arange(12, dtype="f4").reshape(3, 4),
    ],
    ids=["bytes", "bytearray", "slice", "view", "read-only array", "matrix"],
)
def test_written_bytes_are_read(memory: Mapping, data: Any) -> None:
    expected = bytes(memoryview(data).cast("B")) if memoryview(data).ndim > 1 else bytes(data)
    memory.write(PAGE - 2, data)
    assert memory.read(PAGE - 2, len(expected)) == expected
    target = bytearray(len(expected))
    memory.read_into(PAGE - 2, target)
    assert target == expected
    array = np.zeros(len(expected), np.uint8)
    memory.read_into(PAGE - 2, array)
    assert array.tobytes() == expected


def test_from_one_mapping_to_another(memory: Mapping, anonymous: Mapping) -> None:
    memory.write(0, b"some bytes")
    anonymous.write(0, memory)
    assert anonymous.read(0, 10) == b"some bytes"
    anonymous.write(PAGE, b"more")
    anonymous.read_into(0, memory)
    assert memory.read(PAGE, 4) == b"more"
    memory.write(0, memory)
    assert memory.read(0, 10) == b"some bytes"


def test_nothing_is_not_an_error(memory: Mapping) -> None:
    memory.write(4 * PAGE, b"")
    assert memory.read(4 * PAGE, 0) == b""
    assert len(memory.view(4 * PAGE, 0)) == 0


_OUTSIDE: dict[str, Callable[[Mapping], object]] = {
    "read across the end": lambda m: m.read(4 * PAGE - 1, 2),
    "read before the beginning": lambda m: m.read(-1, 1),
    "read less than nothing": lambda m: m.read(0, -1),
    "read nothing beyond": lambda m: m.read(5 * PAGE, 0),
    "write across the end": lambda m: m.write(4 * PAGE - 1, b"xy"),
    "read into bytes": lambda m: m.read_into(0, bytes(1)),
    "write a column": lambda m: m.write(0, np.zeros((4, 4))[:, 1]),
    "view across the end": lambda m: m.view(0, 4 * PAGE + 1),
    "advice from within a page": lambda m: m.madvise(Advice.NORMAL, 1, PAGE),
    "advice on a byte": lambda m: m.madvise(Advice.NORMAL, 0, 1),
    "advice on nothing": lambda m: m.madvise(Advice.NORMAL, 4 * PAGE),
    "protect across the end": lambda m: m.protect(READ, 3 * PAGE, 2 * PAGE),
    "unmap nothing": lambda m: m.unmap(0, 0),
    "hole before the beginning": lambda m: m.punch_hole(-PAGE, PAGE),
    "grow by a byte": lambda m: m.remap(4 * PAGE + 1),
    "grow and stay": lambda m: m.remap(5 * PAGE, dontunmap=True),
    "move onto itself": lambda m: m.remap(to=m),
    "move into a page": lambda m: m.remap(to=m.address + 1),
}


@pytest.mark.parametrize("use", _OUTSIDE.values(), ids=_OUTSIDE)
def test_what_is_not_inside_is_refused(memory: Mapping, use: Callable[[Mapping], object]) -> None:
    memory.write(0, b"untouched")
    with pytest.raises(UsageError):
        use(memory)
    assert memory.read(0, 9) == b"untouched"


def test_the_gil_is_free_while_bytes_fault() -> None:
    # In a process of its own: if it is not, no thread of ours runs again.
    program = """
        import mmap, threading
        from userfault.kernel import Mapping, Userfaultfd
        PAGE = mmap.PAGESIZE
        with Userfaultfd() as uffd, Mapping.anonymous(6 * PAGE) as memory, Mapping.anonymous(PAGE) as other:
            uffd.register(memory)
            def serve():
                served = 0
                while served < 5:
                    for fault in uffd.read_events(timeout_s=30):
                        number = (fault.address - memory.address) // PAGE
                        uffd.copy(fault.address, bytes([65 + number]) * PAGE)
                        served += 1
            handler = threading.Thread(target=serve)
            handler.start()
            print(memory.read(2 * PAGE - 1, 2))          # two faults, in our source
            target = bytearray(1)
            memory.read_into(5 * PAGE, target)           # one
            print(bytes(target))
            memory.write(3 * PAGE, b"x")                 # one, in our target
            other.write(0, memory.view(4 * PAGE, PAGE))  # one, in the source of a write
            print(other.read(0, 1))
            handler.join()
            print(memory.read(3 * PAGE, 2))
    """
    assert run_python(program).check().split() == ["b'BC'", "b'F'", "b'E'", "b'xD'"]


# --- views ---------------------------------------------------------------------------------------------------------


def test_a_view_is_the_memory(memory: Mapping) -> None:
    with memory.view(PAGE, 2 * PAGE) as view:
        assert (view.format, view.itemsize, view.nbytes, view.readonly) == ("B", 1, 2 * PAGE, False)
        view[:4] = b"seen"
        assert memory.read(PAGE, 4) == b"seen"
        array = np.frombuffer(view, "u4")
        assert array.ctypes.data == memory.address + PAGE
        array[1] = 0x41424344
        del array
        assert bytes(view[:8]) == b"seen" + (0x41424344).to_bytes(4, sys.byteorder)


def test_the_buffer_protocol(memory: Mapping) -> None:
    memory.write(0, b"python")
    if sys.version_info >= (3, 12):
        with memoryview(memory) as view:
            assert bytes(view[:6]) == b"python"
            with pytest.raises(ExportedError):
                memory.close()
        array = np.asarray(memory)
        assert (array.shape, array.dtype) == ((4 * PAGE,), np.uint8)
        assert array.ctypes.data == memory.address
        with pytest.raises(ExportedError):
            memory.close()
        del array
    else:
        with pytest.raises(TypeError):
            memoryview(memory)  # type: ignore[arg-type]
    memory.close()


def test_read_only_memory_has_read_only_views() -> None:
    with Mapping.memfd(PAGE, protection=READ) as memory:
        with memory.view() as view:
            assert view.readonly
        with pytest.raises(UsageError, match="not mapped for WRITE"):
            memory.write(0, b"x")
        memory.protect(READ_WRITE)
        memory.write(0, b"x")
        memory.protect(Protection.NONE)
        with pytest.raises(UsageError, match="not mapped for READ"):
            memory.read(0, 1)
        with pytest.raises(UsageError, match="not mapped for WRITE"):
            memory.read_into(0, memory)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.close(),
        lambda m: m.unmap(PAGE, PAGE),
        lambda m: m.remap(8 * PAGE),
        lambda m: m.__exit__(None, None, None),
    ],
    ids=["close", "unmap", "remap", "exit"],
)
def test_while_a_view_is_alive_the_memory_stays(memory: Mapping, use: Callable[[Mapping], object]) -> None:
    whole = memory.view()
    part = np.frombuffer(whole[PAGE:], np.uint16)[3:7]
    del whole
    with pytest.raises(ExportedError, match=r"1 view\(s\) of it are alive") as caught:
        use(memory)
    assert isinstance(caught.value, BufferError)
    part[0] = 7  # still there
    del part, caught
    assert not memory.closed
    use(memory)


def test_a_view_outlives_the_mapping_that_nothing_refers_to() -> None:
    memory = Mapping.memfd(PAGE)
    memory.write(0, b"alive")
    address, view = memory.address, memory.view()
    del memory
    gc.collect()
    assert bytes(view[:5]) == b"alive"
    assert mapped(address)
    del view
    assert not mapped(address)


def test_a_refused_view_leaves_nothing_behind(memory: Mapping) -> None:
    with pytest.raises(UsageError) as caught:
        memory.view(0, 5 * PAGE)
    with pytest.raises(UsageError) as also:
        memory.read(0, 5 * PAGE)
    memory.close()  # while both exceptions, with their frames, are alive
    assert caught.value is not also.value


def test_an_exception_that_holds_a_view_passes(memory: Mapping) -> None:
    def fail() -> None:
        with memory:
            view = memory.view()
            view[0] = 1 // 0

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert not memory.closed
    del caught
    gc.collect()
    memory.close()


def test_closing_is_refused_while_another_thread_reads() -> None:
    program = """
        import mmap, threading
        from userfault.errors import ExportedError
        from userfault.kernel import Mapping, Userfaultfd
        PAGE = mmap.PAGESIZE
        with Userfaultfd() as uffd, Mapping.anonymous(2 * PAGE) as memory:
            uffd.register(memory)
            reader = threading.Thread(target=memory.read, args=(0, 1))
            reader.start()
            (fault,) = uffd.read_events(timeout_s=30)  # it waits in the fault now
            for use in (memory.close, lambda: memory.unmap(PAGE, PAGE), lambda: memory.remap(4 * PAGE)):
                try:
                    use()
                except ExportedError as error:
                    print("1 call(s) use it" in str(error))
            uffd.zeropage(fault.address, PAGE)
            reader.join()
            memory.close()
            print(memory.closed)
    """
    assert run_python(program).check().split() == ["True"] * 4


# --- the end -------------------------------------------------------------------------------------------------------


_USES: dict[str, Callable[[Mapping], object]] = {
    "address": lambda m: m.address,
    "fd": lambda m: m.fd,
    "view": lambda m: m.view(),
    "read": lambda m: m.read(0, 1),
    "write": lambda m: m.write(0, b"x"),
    "alias": lambda m: m.alias(),
    "madvise": lambda m: m.madvise(Advice.NORMAL),
    "protect": lambda m: m.protect(READ),
    "mlock": lambda m: m.mlock(),
    "munlock": lambda m: m.munlock(),
    "punch_hole": lambda m: m.punch_hole(),
    "unmap": lambda m: m.unmap(),
    "remap": lambda m: m.remap(8 * PAGE),
    "with": lambda m: m.__enter__(),
    "a range": lambda m: pagemap.entries(m),
}


@pytest.mark.parametrize("use", _USES.values(), ids=_USES)
def test_use_after_close(use: Callable[[Mapping], object]) -> None:
    memory = Mapping.memfd(4 * PAGE)
    memory.close()
    memory.close()
    assert memory.closed
    with pytest.raises(ClosedError):
        use(memory)


def test_the_end_unmaps_and_closes() -> None:
    with Mapping.memfd(PAGE) as memory:
        address, fd = memory.address, memory.fd
    assert not mapped(address)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_garbage_is_unmapped() -> None:
    memory = Mapping.memfd(PAGE)
    address, fd = memory.address, memory.fd
    del memory
    gc.collect()
    assert not mapped(address)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# --- pages ---------------------------------------------------------------------------------------------------------


def test_advice(memory: Mapping, anonymous: Mapping) -> None:
    anonymous.write(0, b"x" * 4 * PAGE)
    anonymous.madvise(Advice.DONTNEED, PAGE, 2 * PAGE)
    assert pagemap.present(anonymous).tolist() == [True, False, False, True]
    assert anonymous.read(PAGE, 1) == b"\0"
    memory.write(0, b"x" * 4 * PAGE)
    memory.madvise(Advice.DONTNEED)
    assert memory.read(PAGE, 1) == b"x"  # in the file still
    memory.madvise(Advice.REMOVE, PAGE, PAGE)
    assert memory.read(PAGE, 1) == b"\0"


def test_advice_that_the_kernel_refuses(memory: Mapping, anonymous: Mapping) -> None:
    with pytest.raises(InvalidRequestError, match=r"madvise \(77\) .* EINVAL") as caught:
        memory.madvise(77)
    assert (caught.value.call, caught.value.address, caught.value.length) == (
        "madvise",
        memory.address,
        4 * PAGE,
    )
    with pytest.raises(InvalidRequestError, match=r"madvise \(REMOVE\)"):
        anonymous.madvise(Advice.REMOVE)


@pytest.mark.needs_linux("MADV_POPULATE_READ")
def test_populating(anonymous: Mapping) -> None:
    anonymous.madvise(Advice.POPULATE_WRITE, PAGE, PAGE)
    assert pagemap.present(anonymous).tolist() == [False, True, False, False]
    anonymous.madvise(Advice.POPULATE_READ)
    assert pagemap.present(anonymous).all()


@pytest.mark.needs_linux("MADV_GUARD_INSTALL")
def test_guard_pages(anonymous: Mapping) -> None:
    anonymous.madvise(Advice.GUARD_INSTALL, PAGE, PAGE)
    assert anonymous.read(0, PAGE) == bytes(PAGE)
    assert death(lambda: anonymous.read(PAGE, 1)) == signal.SIGSEGV
    anonymous.madvise(Advice.GUARD_REMOVE)
    assert anonymous.read(PAGE, 1) == b"\0"


def test_what_a_forked_child_gets(anonymous: Mapping) -> None:
    anonymous.write(0, b"x" * 4 * PAGE)
    anonymous.madvise(Advice.WIPEONFORK, PAGE, PAGE)
    anonymous.madvise(Advice.DONTFORK, 2 * PAGE, PAGE)

    def look() -> tuple[bytes, bool]:
        return anonymous.read(0, PAGE + 1), mapped(anonymous.address + 2 * PAGE)

    assert in_child(look) == (b"x" * PAGE + b"\0", False)
    assert anonymous.read(PAGE, 1) == b"x"


def test_a_protected_page_is_a_signal(anonymous: Mapping) -> None:
    anonymous.protect(READ, PAGE, PAGE)
    assert anonymous.protection == READ_WRITE  # what is true of all of it
    assert [flags.permissions for flags in pagemap.vm_flags(anonymous)][-3:-1] == ["rw-p", "r--p"]
    assert death(lambda: anonymous.write(PAGE, b"x")) == signal.SIGSEGV
    assert death(lambda: anonymous.write(0, b"x")) == 0


def test_locked_pages(anonymous: Mapping) -> None:
    anonymous.mlock(0, PAGE)
    assert pagemap.present(anonymous).tolist() == [True, False, False, False]
    anonymous.mlock(2 * PAGE, PAGE, on_fault=True)
    assert pagemap.present(anonymous).tolist() == [True, False, False, False]
    locked = [flags for flags in pagemap.vm_flags(anonymous) if "lo" in flags.flags]
    assert [flags.start - anonymous.address for flags in locked] == [0, 2 * PAGE]
    anonymous.munlock()
    assert all("lo" not in flags.flags for flags in pagemap.vm_flags(anonymous))


def test_a_hole_is_a_hole_for_all(memory: Mapping, anonymous: Mapping) -> None:
    with memory.alias() as alias:
        memory.write(0, b"x" * 4 * PAGE)
        alias.punch_hole(PAGE, 2 * PAGE)
        assert memory.read(0, 4 * PAGE) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        with Mapping.of_file(memory.fd, 2 * PAGE, offset=2 * PAGE) as tail:
            tail.punch_hole(PAGE)
        assert memory.read(3 * PAGE, 1) == b"\0"
        assert os.fstat(memory.fd).st_size == 4 * PAGE
    with pytest.raises(UsageError, match=r"use madvise\(Advice.REMOVE\)"):
        anonymous.punch_hole()


# --- unmapping and moving ------------------------------------------------------------------------------------------


def test_unmapped_pages_are_gone_and_the_rest_stays(anonymous: Mapping) -> None:
    anonymous.write(0, b"x" * 4 * PAGE)
    address = anonymous.address
    anonymous.unmap(PAGE, PAGE)
    assert not mapped(address + PAGE)
    assert anonymous.read(2 * PAGE, 2 * PAGE) == b"x" * 2 * PAGE
    uses: list[Callable[[], object]] = [
        lambda: anonymous.read(PAGE, 1),
        lambda: anonymous.read(0, PAGE + 1),
        lambda: anonymous.view(),
        lambda: anonymous.madvise(Advice.DONTNEED),
        lambda: anonymous.remap(8 * PAGE),
        lambda: anonymous.unmap(PAGE, PAGE),
    ]
    for use in uses:
        with pytest.raises(UsageError, match=r"not mapped any more|a part of it was unmapped"):
            use()


def test_closing_spares_what_others_mapped_in_a_hole(anonymous: Mapping) -> None:
    anonymous.unmap(PAGE, 2 * PAGE)
    with Mapping.anonymous(PAGE, address=anonymous.address + PAGE) as other:
        other.write(0, b"other")
        anonymous.close()
        assert other.read(0, 5) == b"other"
    assert not mapped(other._extent.address)


def test_growing_and_shrinking(anonymous: Mapping) -> None:
    anonymous.write(0, b"first")
    assert anonymous.remap(64 * PAGE) is anonymous
    assert anonymous.length == 64 * PAGE
    assert anonymous.read(0, 6) == b"first\0"
    anonymous.write(63 * PAGE, b"last")
    address = anonymous.address
    anonymous.remap(PAGE)
    assert (anonymous.address, anonymous.length) == (address, PAGE)
    assert not mapped(address + PAGE)
    with pytest.raises(UsageError):
        anonymous.read(PAGE, 1)


def test_in_place_or_not_at_all() -> None:
    address = free_range(8 * PAGE)
    with Mapping.anonymous(4 * PAGE, address=address) as memory:
        with Mapping.memfd(PAGE, address=address + 4 * PAGE), pytest.raises(NoMemoryError, match="mremap"):
            memory.remap(8 * PAGE, may_move=False)
        assert memory.length == 4 * PAGE
        memory.write(0, b"still usable")
        memory.remap(8 * PAGE, may_move=False)
        assert (memory.address, memory.length) == (address, 8 * PAGE)


def test_moving_to_an_address(anonymous: Mapping) -> None:
    anonymous.write(PAGE, b"moved")
    old, new = anonymous.address, free_range(4 * PAGE)
    assert anonymous.remap(to=new) is anonymous
    assert anonymous.address == new
    assert anonymous.read(PAGE, 5) == b"moved"
    assert not mapped(old)


def test_moving_onto_another_mapping_takes_its_place(anonymous: Mapping) -> None:
    anonymous.write(0, b"moved")
    with Mapping.anonymous(6 * PAGE) as large:
        large.write(4 * PAGE, b"rest")
        address = large.address
        anonymous.remap(to=large)
        assert anonymous.address == address
        assert not large.closed
        assert large.read(4 * PAGE, 4) == b"rest"
        with pytest.raises(UsageError, match="not mapped any more"):
            large.read(0, 1)
        large.close()
        assert anonymous.read(0, 5) == b"moved"
    with Mapping.anonymous(4 * PAGE) as same:
        anonymous.remap(to=same)
        assert same.closed
    with Mapping.anonymous(PAGE) as small, pytest.raises(UsageError, match="cannot take"):
        anonymous.remap(to=small)
    with Mapping.anonymous(4 * PAGE) as used:
        view = used.view()
        with pytest.raises(ExportedError, match="cannot be replaced"):
            anonymous.remap(to=used)
        assert anonymous.read(0, 5) == b"moved"
        del view


def test_moving_without_unmapping(anonymous: Mapping) -> None:
    anonymous.write(0, b"moved")
    with anonymous.remap(dontunmap=True) as moved:
        assert moved.read(0, 5) == b"moved"
        assert (moved.kind, moved.length) == (anonymous.kind, anonymous.length)
        assert anonymous.read(0, 5) == bytes(5)
        # And back, over the mapping that was left.
        with moved.remap(to=anonymous, dontunmap=True) as back:
            assert anonymous.closed
            assert back.read(0, 5) == b"moved"


def test_moving_shared_memory_without_unmapping(memory: Mapping) -> None:
    memory.write(0, b"both")
    with memory.remap(dontunmap=True) as moved:  # Linux 5.13
        assert memory.read(0, 4) == moved.read(0, 4) == b"both"
        memory.close()
        with moved.alias() as alias:
            assert alias.read(0, 4) == b"both"


def test_what_the_kernel_sees_as_two_mappings_does_not_grow(anonymous: Mapping) -> None:
    anonymous.protect(READ, PAGE, PAGE)
    with pytest.raises(BadAddressError, match="it is not one mapping any more"):
        anonymous.remap(64 * PAGE)
    anonymous.write(0, b"still usable")


def test_overlapping_ranges_are_refused(anonymous: Mapping) -> None:
    anonymous.write(0, b"still usable")
    with pytest.raises(InvalidRequestError, match="the ranges overlap"):
        anonymous.remap(to=anonymous.address + PAGE)
    assert anonymous.read(0, 12) == b"still usable"


def test_messages_name_the_memory(memory: Mapping) -> None:
    text = re.escape(f"<Mapping shmem {memory.address:#x} + {4 * PAGE:#x}>")
    assert re.fullmatch(text, repr(memory))
    with pytest.raises(UsageError, match=text):
        memory.read(4 * PAGE, 1)


def test_what_a_failed_move_may_have_unmapped_is_not_unmapped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel unmaps the target before it can still fail; then the place may be somebody else's.
    from userfault.kernel import _extent, _mman

    def fails(*_: object) -> int:
        raise error_from_errno(errno.ENOMEM, call="mremap")

    with Mapping.anonymous(PAGE) as memory:
        target = Mapping.anonymous(PAGE)
        place = (target.address, target.address + PAGE)
        monkeypatch.setattr(_mman, "mremap", fails)
        with pytest.raises(NoMemoryError):
            memory.remap(to=target)
        monkeypatch.undo()
        unmapped: list[tuple[int, int]] = []
        monkeypatch.setattr(_extent, "_munmap", unmapped.extend)
        target.close()
        monkeypatch.undo()
        assert unmapped == []
        memory.write(0, b"still here")
        _extent._munmap([place])
