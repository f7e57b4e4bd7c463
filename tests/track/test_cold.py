"""Cold pages: found, written to a store, dropped, and back with their bytes (Linux 7.3)."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import userfault
from support import kernel as support
from support.kernel import PAGE, in_child
from userfault.errors import ForkedError, RangeError, SourceError, TrackError, UntrackableError
from userfault.kernel import Feature
from userfault.track._cold import ColdPages

N = 64
traps = pytest.mark.usefixtures("rwp")


@pytest.fixture
def rwp() -> None:
    if not support.available_features() & Feature.RWP_ASYNC:
        pytest.skip("needs RWP_ASYNC (Linux 7.3)")


@pytest.fixture
def memory() -> mmap.mmap:
    """N pages, each filled with its number from 1 on."""
    made = mmap.mmap(-1, N * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for number in range(N):
        made[number * PAGE : (number + 1) * PAGE] = bytes([number + 1]) * PAGE
    return made


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {number for start, stop in ranges for number in range(start // PAGE, -(-stop // PAGE))}


def test_an_older_kernel_is_told_what_is_missing(memory: mmap.mmap) -> None:
    if support.available_features() & Feature.RWP_ASYNC:
        pytest.skip("this kernel has RWP")
    with pytest.raises(UntrackableError, match=r"Linux 7\.3.*page_out"):
        ColdPages(memory)


def test_objects_without_a_page_of_their_own() -> None:
    with pytest.raises(UntrackableError, match="no whole page"):
        ColdPages(bytearray(100))


def test_paged_memory_has_a_budget() -> None:
    with pytest.raises(UntrackableError, match="budget"):
        ColdPages(userfault.empty((100_000,), "u1"))


@pytest.mark.needs_kernel_faults
@traps
class TestCold:
    def test_what_was_not_accessed_is_cold_and_goes(self, memory: mmap.mmap, tmp_path: Path) -> None:
        told = {}
        with ColdPages(memory, tmp_path / "store", lambda offset, data: told.update({offset: data})) as cold:
            assert cold.cold() == []
            assert cold.evict() == []
            cold.detect()
            assert pages(cold.cold()) == set(range(N))
            hot = {3, 10, 11, N - 1}
            for number in hot:
                assert memory[number * PAGE] == number + 1
            memory[20 * PAGE] = 255
            hot.add(20)
            assert pages(cold.cold()) == set(range(N)) - hot
            went = cold.evict()
            assert pages(went) == set(range(N)) - hot
            assert cold.nbytes_evicted == (N - len(hot)) * PAGE
            assert cold.cold() == []
            for offset, data in told.items():
                for at in range(0, len(data), PAGE):
                    assert data[at : at + PAGE] == bytes([(offset + at) // PAGE + 1]) * PAGE
            assert sum(map(len, told.values())) == cold.nbytes_evicted
            stored = (tmp_path / "store").read_bytes()
            assert stored[5 * PAGE : 6 * PAGE] == bytes([6]) * PAGE
            assert memory[5 * PAGE : 7 * PAGE] == bytes([6]) * PAGE + bytes([7]) * PAGE
            assert cold.stats["loaded"] == 2
        assert cold.closed
        for number in range(N):
            want = bytes([255] + [21] * (PAGE - 1)) if number == 20 else bytes([number + 1]) * PAGE
            assert memory[number * PAGE : (number + 1) * PAGE] == want

    def test_ranges_and_again(self, memory: mmap.mmap) -> None:
        with ColdPages(memory) as cold:
            for _ in range(3):
                cold.detect()
                assert pages(cold.evict([(10, 3 * PAGE + 7), (8 * PAGE, 10 * PAGE)])) == {1, 2, 8, 9}
                assert cold.evict([(5, 6)]) == []
                assert memory[: 20 * PAGE] == b"".join(bytes([n + 1]) * PAGE for n in range(20))
            with pytest.raises(RangeError, match="not inside"):
                cold.evict([(0, N * PAGE + 1)])
        with pytest.raises(TrackError, match="closed"):
            cold.detect()

    def test_whole_pages_of_an_unaligned_array(self) -> None:
        whole = np.arange(N * PAGE, dtype="u1")
        array = whole[100 : -(PAGE // 2)]
        expected = array.copy()
        with os.fdopen(os.memfd_create("store"), "w+b") as store, ColdPages(array, store) as cold:
            cold.detect()
            went = cold.evict()
            assert went
            assert all((array.ctypes.data + edge) % PAGE == 0 for pair in went for edge in pair)
            start, stop = went[0]
            assert os.pread(store.fileno(), stop - start, start) == expected[start:stop].tobytes()
            assert (array == expected).all()

    def test_accesses_meanwhile(self, memory: mmap.mmap) -> None:
        stop = threading.Event()
        counts = np.frombuffer(memory, "u8")[:: PAGE // 8]
        first = counts.copy()
        rounds = 0

        def count() -> None:
            nonlocal rounds
            while not stop.is_set():
                counts[::3] += 1
                rounds += 1

        thread = threading.Thread(target=count)
        with ColdPages(memory) as cold:
            thread.start()
            try:
                for _ in range(100):
                    cold.detect()
                    cold.evict()
            finally:
                stop.set()
                thread.join()
            assert cold.stats["evicted"] > 0
        first[::3] += rounds
        assert (counts == first).all()

    def test_system_calls_wait_for_what_went(self, memory: mmap.mmap, tmp_path: Path) -> None:
        with ColdPages(memory) as cold:
            cold.detect()
            cold.evict()
            with (tmp_path / "out").open("wb", buffering=0) as out:
                view = memoryview(memory)[4 * PAGE : 6 * PAGE]
                assert out.write(view) == 2 * PAGE
                view.release()
        assert (tmp_path / "out").read_bytes() == bytes([5]) * PAGE + bytes([6]) * PAGE

    def test_a_forked_child_has_its_bytes(self, memory: mmap.mmap) -> None:
        with ColdPages(memory) as cold:
            cold.detect()
            cold.evict()

            def child() -> None:
                for number in range(N):
                    assert memory[number * PAGE : (number + 1) * PAGE] == bytes([number + 1]) * PAGE
                with pytest.raises(ForkedError):
                    cold.detect()
                cold.close()

            in_child(child)
            assert cold.nbytes_evicted == N * PAGE

    def test_a_store_that_is_full(self, memory: mmap.mmap) -> None:
        with Path("/dev/full").open("r+b", buffering=0) as full, ColdPages(memory, full) as cold:
            cold.detect()
            with pytest.raises(SourceError, match="No space left"):
                cold.evict()
            assert memory[7 * PAGE] == 8
            assert cold.nbytes_evicted == 0

    def test_memory_that_cannot_be_evicted(self, memory: mmap.mmap) -> None:
        with mmap.mmap(-1, N * PAGE) as shared, pytest.raises(UntrackableError, match="private anonymous"):
            ColdPages(shared)
        with ColdPages(memory), pytest.raises(UntrackableError, match="tracked"):
            ColdPages(memory)

    def test_forgotten_ones_bring_back_what_went(self, memory: mmap.mmap) -> None:
        cold = ColdPages(memory)
        cold.detect()
        cold.evict()
        del cold
        assert memory[:PAGE] == bytes([1]) * PAGE
        assert memory[-PAGE:] == bytes([N]) * PAGE
