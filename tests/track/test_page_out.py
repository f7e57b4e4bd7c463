"""Cold memory is handed to the kernel, and comes back as it was."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import userfault
from support.kernel import huge_pages
from support.kernel_facts import smaps_bytes
from support.rwp import needs_swap
from support.tracking import PAGE, memory_of
from support.waiting import wait_until
from userfault.errors import RangeError, UntrackableError
from userfault.kernel import Mapping
from userfault.kernel.errors import InvalidRequestError, NoMemoryError, TargetExitedError, UffdPermissionError
from userfault.track import Touched, _runs, page_out, shared_array
from userfault.track._targets import targets_of
from userfault.track._touched import Found


@pytest.mark.parametrize("advice", ["pageout", "cold"])
def test_whole_objects_by_their_inner_pages(advice: str) -> None:
    with memory_of("anonymous", 16) as array:
        array[:] = np.arange(array.size) % 251
        before = array.copy()
        assert page_out(array, advice=advice) == 16 * PAGE  # type: ignore[arg-type]
        assert page_out(array[10 : 3 * PAGE + 10], advice=advice) == 2 * PAGE  # type: ignore[arg-type]
        assert page_out(array[10:20], bytearray(10)) == 0
        assert page_out(array, array[: 2 * PAGE], advice="cold") == 16 * PAGE, "nothing is told twice"
        assert (array == before).all()


def test_byte_ranges() -> None:
    with memory_of("anonymous", 16) as array:
        array[:] = 1
        assert page_out((array, [(0, PAGE), (5 * PAGE - 1, 8 * PAGE + 1)]), advice="cold") == 4 * PAGE
        assert page_out((array, [])) == 0
        for bad in ((-1, PAGE), (0, 17 * PAGE), (5, 4)):
            with pytest.raises(RangeError, match="are not inside of the object's"):
                page_out((array, [bad]))


def test_more_ranges_than_one_call_takes() -> None:
    count = 5000
    with memory_of("anonymous", count) as array:
        array[:] = 1
        told = page_out(
            (array, [(page * PAGE, (page + 1) * PAGE) for page in range(0, count, 2)]), advice="cold"
        )
        assert told == count // 2 * PAGE


def test_what_was_not_touched() -> None:
    with memory_of("anonymous", 16) as array, memory_of("anonymous", 4) as other:
        array[:], other[:] = 1, 1
        targets = tuple(targets_of([array, other], {}))
        runs = [_runs.runs_of([(t.start + PAGE, t.start + 3 * PAGE)]) for t in targets]
        parts = tuple(Found(accessed, accessed, "test", PAGE, _runs.EMPTY) for accessed in runs)
        assert page_out(Touched(0, 1, targets, parts), advice="cold") == 16 * PAGE
        writes = tuple(Found(None, part.written, "test", PAGE, _runs.EMPTY) for part in parts)
        with pytest.raises(UntrackableError, match="use track_accesses"):
            page_out(Touched(0, 1, targets, writes))


def test_cold_pages_go_to_swap() -> None:
    needs_swap()
    with memory_of("anonymous", 64) as array:
        array[:] = 7
        start = array.ctypes.data

        def gone() -> bool:
            page_out(array)
            return smaps_bytes(start, "Swap") >= 32 * PAGE

        wait_until(gone, "pages are swapped out")
        assert (array == 7).all()


def test_pages_of_a_file_are_dropped_from_memory(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "data")
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * (16 * PAGE // 256))
        file.flush()
        os.fsync(file.fileno())
    array = np.memmap(path, np.uint8, "r")
    assert array.sum() > 0
    start = array.ctypes.data
    assert smaps_bytes(start, "Rss") == 16 * PAGE

    def gone() -> bool:
        page_out(array)
        return smaps_bytes(start, "Rss") == 0

    wait_until(gone, "its pages are no longer mapped")
    assert array[300] == 300 % 256


@contextmanager
def another_process() -> Iterator[tuple[int, int]]:
    """A process with 16 pages of memory: its pid, and their address."""
    code = (
        "import mmap, ctypes, sys\n"
        "m = mmap.mmap(-1, 16 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m.write(b'x' * len(m))\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)\n"
        "sys.stdin.read()\n"
        "assert m[:] == b'x' * len(m)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 30)[0]
        yield process.pid, int(process.stdout.readline())
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.mark.needs_privilege("advising another process (CAP_SYS_NICE)")
def test_another_process() -> None:
    with another_process() as (pid, address):
        for advice in ("cold", "pageout"):
            told = page_out(
                (address, address + 4 * PAGE),
                (address + 8 * PAGE, address + 9 * PAGE),
                pid=pid,
                advice=advice,
            )
            assert told == 5 * PAGE
        with pytest.raises(NoMemoryError, match="not mapped"):
            page_out((PAGE, 2 * PAGE), pid=pid)


def test_another_process_without_the_right() -> None:
    if os.geteuid() == 0:
        with another_process() as (pid, address):
            child = os.fork()
            if child == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                try:
                    page_out((address, address + PAGE), pid=pid)
                except UffdPermissionError as error:
                    os._exit(0 if "CAP_SYS_NICE" in str(error) else 2)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        with pytest.raises(UffdPermissionError, match="CAP_SYS_NICE"):
            page_out((PAGE, 2 * PAGE), pid=1)


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(TargetExitedError, match="no such process"):
        page_out((PAGE, 2 * PAGE), pid=process.pid)


def test_what_is_refused() -> None:
    with memory_of("anonymous", 4) as array:
        with pytest.raises(RangeError, match="advice 'swap' is not one of 'pageout', 'cold'"):
            page_out(array, advice="swap")  # type: ignore[arg-type]
        with pytest.raises(RangeError, match="given by pairs of addresses"):
            page_out(array, pid=os.getpid())
        with pytest.raises(RangeError, match="not whole pages"):
            page_out((PAGE + 1, 2 * PAGE))
        with pytest.raises(NoMemoryError, match="not mapped"):
            page_out((PAGE, 2 * PAGE))
    paged = userfault.empty(1 << 20, np.uint8)
    with pytest.raises(UntrackableError, match=r"evict its blocks with memory_of\(array\)\.evict\(\)"):
        page_out(paged)
    del paged
    with Mapping.anonymous(4 * PAGE) as memory:
        memory.mlock()
        with pytest.raises(InvalidRequestError, match="locked memory"):
            page_out((memory.address, memory.address + PAGE))


def test_it_says_how_much_was_done_before_an_error() -> None:
    memory = Mapping.anonymous(8 * PAGE)
    memory.unmap(4 * PAGE, PAGE)
    with pytest.raises(NoMemoryError) as caught:
        page_out(
            (memory.address, memory.address + 2 * PAGE),
            (memory.address + 4 * PAGE, memory.address + 6 * PAGE),
        )
    assert caught.value.done == 2 * PAGE
    assert caught.value.address == memory.address + 4 * PAGE


# --- shared arrays --------------------------------------------------------------------------------------------


def test_shared_arrays_are_ordinary_arrays() -> None:
    table = shared_array((30, 50), "f4", name="my table")
    assert table.shape == (30, 50)
    assert table.dtype == np.float32
    assert not table.any()
    table[3] = 5
    assert table.sum() == 250
    assert table.ctypes.data % PAGE == 0
    with open("/proc/self/maps") as maps:
        (line,) = [line for line in maps if "memfd:my table" in line]
    assert " rw-s " in line
    assert shared_array(0).shape == (0,)
    assert shared_array((), "i2").shape == ()
    assert shared_array([2, 3], "S5").nbytes == 30


def test_a_forked_child_shares_it() -> None:
    table = shared_array(10, "i8")
    pid = os.fork()
    if pid == 0:
        table[3] = 42
        os._exit(0)
    os.waitpid(pid, 0)
    assert table.tolist() == [0, 0, 0, 42, 0, 0, 0, 0, 0, 0]


def test_it_is_freed_with_its_last_view() -> None:
    view = shared_array(1000, "u1", name="short-lived")[10:20]
    view[:] = 3

    def mapped() -> bool:
        with open("/proc/self/maps") as maps:
            return "short-lived" in maps.read()

    assert mapped()
    assert view.tolist() == [3] * 10
    del view
    assert not mapped()


def test_what_no_shared_array_can_hold() -> None:
    with pytest.raises(TypeError, match="no Python objects"):
        shared_array(3, object)
    with pytest.raises(NoMemoryError):
        shared_array(1 << 62, "u1")
    with huge_pages(1), pytest.raises(NoMemoryError, match="huge pages"):
        shared_array(1 << 40, "u1", huge=True)
