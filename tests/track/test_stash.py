"""Accesses told by moving pages away: what is peculiar to this method. What holds for all is in test_accesses.py."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel import PAGE, in_child
from userfault import _mirror
from userfault.errors import PrivilegeError, UntrackableError
from userfault.kernel import _mman
from userfault.track import track_accesses
from userfault.track._method_stash import StashMethod

pytestmark = [pytest.mark.needs_feature("MOVE"), pytest.mark.needs_kernel_faults]

N = 256


def memory(count: int = N) -> NDArray[np.uint64]:
    """One number for each page, at its beginning."""
    made = mmap.mmap(-1, count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = np.frombuffer(made, np.uint64)[:: PAGE // 8]
    numbers[:] = np.arange(1, count + 1)
    return numbers


def whole(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The array of which `numbers` are the pages' first elements."""
    base = numbers.base
    assert isinstance(base, np.ndarray)
    return base


def pages(ranges: list[tuple[int, int]]) -> list[int]:
    return [page for start, stop in ranges for page in range(start // PAGE, -(-stop // PAGE))]


def test_faults_are_counted_and_nothing_is_left() -> None:
    numbers = memory()
    with track_accesses(whole(numbers), method="stash") as w:
        assert "userfault-track" in thread_names()
        assert w.granularity() == PAGE
        assert _mirror.stats()["pages"] == N
        assert numbers[3] == 4
        numbers[3] = 1
        numbers[9] = 2
        assert _mirror.stats() == {"reads": 1, "writes": 1, "upgrades": 1, "pages": N}
        assert pages(w.ranges(kind="read_only")) == []
        assert pages(w.ranges(kind="written")) == [3, 9]
    assert "userfault-track" not in thread_names()
    assert _mirror.stats()["pages"] == 0


def thread_names() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as text:
            names.append(text.read().strip())
    return names


def test_arrays_among_pythons_own_objects() -> None:
    # Small ones lie on the heap, beside all that the interpreter and the C library have there.
    arrays = [np.full(n, n, "u4") for n in range(100, 5000, 70)]
    lists = [[n, str(n)] for n in range(2000)]
    with track_accesses(*arrays, method="stash") as w:
        for _ in range(5):
            for n, array in zip(range(100, 5000, 70), arrays, strict=True):
                assert array[-1] == n
            found = w.take()
            assert all(found.ranges(array) for array in arrays)
            gc.collect()
            lists = [[*pair, object()] for pair in lists]
        done = subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True, check=True)
        assert done.stdout == b"3\n"
    assert all((array == n).all() for n, array in zip(range(100, 5000, 70), arrays, strict=True))


def test_the_parent_of_a_fork_goes_on_exactly() -> None:
    numbers = memory()
    with track_accesses(whole(numbers), method="stash") as w:
        for round_ in range(3):
            assert numbers[5] == 6
            numbers[7] = 8

            def child() -> int:
                assert (numbers == np.arange(1, N + 1)).all()
                numbers[:] = 0
                return int(numbers.sum())

            assert in_child(child) == 0
            assert numbers[11 + round_] == 12 + round_
            numbers[20] = 21
            found = w.take()
            assert pages(found.ranges(kind="read_only")) == [5, 11 + round_]
            assert pages(found.ranges(kind="written")) == [7, 20]
            # What is shared with a child is made exclusive when it is taken away again, and is not blind.
            assert found.blind() == []
            assert w.ranges() == []
        assert (numbers == np.arange(1, N + 1)).all()


def test_a_child_tracks_from_the_fork_on() -> None:
    numbers = memory()
    with track_accesses(whole(numbers), method="stash") as w:
        assert numbers[5] == 6

        def child() -> list[int]:
            assert numbers[9] == 10
            return pages(w.take().ranges())

        assert in_child(child) == [9]
        assert pages(w.ranges()) == [5]


def test_forks_while_threads_count() -> None:
    numbers = memory()
    start, stop = numbers.copy(), threading.Event()
    rounds = [0, 0]

    def count(which: int) -> None:
        while not stop.is_set():
            numbers[which::2] += np.uint64(2)
            rounds[which] += 1

    threads = [threading.Thread(target=count, args=(which,)) for which in range(2)]
    with track_accesses(whole(numbers), method="stash") as w:
        for thread in threads:
            thread.start()
        try:
            for _ in range(3 if os.environ.get("UF_TEST_SLOW") else 20):
                pid = os.fork()
                if not pid:
                    # Each thread was in one of its rounds: no page is more than one behind another of the same thread.
                    ahead = (numbers - start).reshape(-1, 2)
                    os._exit(int(not ((np.ptp(ahead, axis=0) <= 2).all() and (ahead % 2 == 0).all())))
                assert os.waitpid(pid, 0)[1] == 0
                w.take()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert (numbers[::2] == start[::2] + np.uint64(2 * rounds[0])).all()
    assert (numbers[1::2] == start[1::2] + np.uint64(2 * rounds[1])).all()


def test_memory_that_the_program_drops_reads_zeros() -> None:
    numbers = memory()
    with track_accesses(whole(numbers), method="stash") as w:
        numbers[2] = 9
        _mman.madvise(numbers.ctypes.data, 4 * PAGE, _mman.Advice.DONTNEED)
        assert numbers[:6].tolist() == [0, 0, 0, 0, 5, 6]
        w.take()
        assert numbers[:6].tolist() == [0, 0, 0, 0, 5, 6]
        assert pages(w.ranges()) == [0, 1, 2, 3, 4, 5]
        assert pages(w.ranges(kind="written")) == []


def test_memory_that_the_program_moves_keeps_its_bytes() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    numbers = memory()
    base = numbers.ctypes.data
    with track_accesses(whole(numbers), method="stash") as w:
        assert numbers[3] == 4
        moved = libc.mremap(
            ctypes.c_void_p(base + 64 * PAGE), ctypes.c_size_t(64 * PAGE), ctypes.c_size_t(128 * PAGE), 1
        )
        assert moved not in (None, ctypes.c_void_p(-1).value, base + 64 * PAGE)
        there = np.ctypeslib.as_array((ctypes.c_uint64 * (128 * PAGE // 8)).from_address(moved))[:: PAGE // 8]
        assert there.tolist() == [*range(65, 129), *[0] * 64]
        found = w.take()
        assert pages(found.ranges(kind="read_only")) == [3]
        assert pages(found.blind()) == list(range(64, 128))
    assert numbers[:64].tolist() == list(range(1, 65))
    libc.munmap(ctypes.c_void_p(moved), ctypes.c_size_t(128 * PAGE))


@pytest.mark.parametrize(
    ("flags", "prot"),
    [
        (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE),
        (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ),
    ],
)
def test_memory_that_cannot_be_moved(flags: int, prot: int) -> None:
    method = StashMethod()
    made = mmap.mmap(-1, 4 * PAGE, flags=flags, prot=prot)
    start = np.frombuffer(made, "u1").ctypes.data
    with pytest.raises(UntrackableError, match="private and anonymous"):
        method.begin(np.array([[start, start + 4 * PAGE]], np.uint64))
    assert made[:] == bytes(4 * PAGE)


def test_locked_memory_is_refused_whole() -> None:
    numbers = memory()
    libc = ctypes.CDLL(None, use_errno=True)
    place = ctypes.c_void_p(numbers.ctypes.data + 9 * PAGE), ctypes.c_size_t(PAGE)
    if libc.mlock(*place):
        pytest.skip("this user may not lock a page")
    with pytest.raises(UntrackableError, match="mlock"), track_accesses(whole(numbers), method="stash"):
        pass
    assert (numbers == np.arange(1, N + 1)).all()
    libc.munlock(*place)
    with track_accesses(whole(numbers), method="stash") as w:
        assert numbers[9] == 10
        assert pages(w.ranges()) == [9]


def test_a_user_without_faults_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(runs: NDArray[np.uint64]) -> None:
        raise _mirror.MirrorError(1)

    monkeypatch.setattr(_mirror, "begin", refused)
    with (
        pytest.raises(PrivilegeError, match=r"docs/privileges.md"),
        track_accesses(whole(memory()), method="stash"),
    ):
        pass


def test_transparent_huge_pages_are_told_apart() -> None:
    size = 8 << 20
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(made, "u1")
    data[:] = 3
    with track_accesses(data, method="stash") as w:
        for _ in range(3):
            assert data[700 * PAGE] == 3
            data[900 * PAGE] = 3
            found = w.take()
            assert pages(found.ranges(kind="read_only")) == [700]
            assert pages(found.ranges(kind="written")) == [900]
    assert (data == 3).all()
