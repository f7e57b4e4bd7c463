"""Which pages are written: programs with known patterns are reported exactly."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.kernel import in_child
from support.tracking import KINDS, PAGE, memory_of, pages, poke, written_by_read
from userfault.errors import RangeError, TrackError, UntrackableError
from userfault.track import track_writes
from userfault.track._ledger import ledger

pytestmark = pytest.mark.needs_feature("WP_ASYNC")

COUNT = 257


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("there", [False, True], ids=["empty", "there"])
@pytest.mark.parametrize("every", [1, 2, 7, 64])
def test_every_so_many_pages(kind: str, there: bool, every: int) -> None:
    with memory_of(kind, COUNT) as array:
        if there:
            array[:] = 9
        with track_writes(array) as w:
            assert array.sum() == (9 * array.size if there else 0), "reading all of it is no write"
            assert w.ranges() == []
            for page in range(0, COUNT, every):
                array[page * PAGE + page % PAGE] = 1
            expected = list(range(0, COUNT, every))
            assert pages(w.ranges()) == expected
            assert np.flatnonzero(w.mask()).tolist() == expected
            assert w.mask().shape == (COUNT,)
            assert w.nbytes == {"0": len(expected) * PAGE}
            assert w.method() == "wp-async"
            assert w.granularity() == PAGE
            assert w.blind() == []
            assert w.shared() == []
        assert pages(w.ranges()) == expected, "and it answers after its end"
        array[-1] = 2
        assert pages(w.ranges()) == expected, "nothing is added any more"


@pytest.mark.parametrize("kind", KINDS)
def test_random_pages_in_intervals(kind: str) -> None:
    chance = random.Random(kind)
    with memory_of(kind, COUNT) as array, track_writes(array) as w:
        for _ in range(30):
            chosen = sorted(chance.sample(range(COUNT), chance.choice([0, 1, 5, 100, COUNT])))
            for page in chosen:
                array[page * PAGE + chance.randrange(PAGE)] += 1
            peeked = w.peek()
            taken = w.take()
            assert pages(peeked.ranges()) == pages(taken.ranges()) == chosen
            assert taken.start_ns < taken.stop_ns
            assert w.ranges() == []


def test_threads() -> None:
    with memory_of("anonymous", 8 * 64) as array, track_writes(array) as w:

        def work(number: int) -> None:
            for page in range(number, 8 * 64, 16):
                poke(array, page * PAGE + number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pages(w.ranges()) == [page for page in range(8 * 64) if page % 16 < 8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("there", [False, True], ids=["empty", "there"])
def test_writes_of_the_kernel(kind: str, there: bool, tmp_path: Path) -> None:
    with memory_of(kind, 64) as array:
        if there:
            array[:] = 1
        with track_writes(array) as w:
            written_by_read(array, 3 * PAGE + 5, PAGE)  # pages 3 and 4
            left, right = socket.socketpair()
            with left, right:
                left.sendall(bytes(100))
                right.recv_into(memoryview(array)[10 * PAGE : 10 * PAGE + 100])
            (tmp_path / "data").write_bytes(bytes(2 * PAGE))
            with open(tmp_path / "data", "rb", buffering=0) as file:
                file.readinto(memoryview(array)[20 * PAGE : 22 * PAGE])
            fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
            os.pwrite(fd, b"x", array.ctypes.data + 30 * PAGE)
            os.close(fd)
            with open("/dev/null", "wb") as sink:
                sink.write(memoryview(array)[40 * PAGE : 50 * PAGE])  # this one reads it
            assert pages(w.ranges()) == [3, 4, 10, 20, 21, 30]


def test_direct_reads_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(4 * PAGE))
    with memory_of("anonymous", 16) as array, track_writes(array) as w:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            pytest.skip("needs a file system with O_DIRECT")
        try:
            os.preadv(fd, [memoryview(array)[4 * PAGE : 8 * PAGE]], 0)
        finally:
            os.close(fd)
        assert pages(w.ranges()) == [4, 5, 6, 7]


def test_copies_of_memory() -> None:
    with memory_of("anonymous", 64) as array, memory_of("anonymous", 64) as other, track_writes(array) as w:
        ctypes.memmove(array.ctypes.data + 7 * PAGE - 1, other.ctypes.data, 2 * PAGE)  # touches three pages
        ctypes.memmove(other.ctypes.data, array.ctypes.data + 40 * PAGE, 5 * PAGE)
        np.copyto(array[20 * PAGE : 22 * PAGE], other[: 2 * PAGE])
        assert pages(w.ranges()) == [6, 7, 8, 20, 21]


def test_the_same_bytes_count_as_a_write() -> None:
    with memory_of("anonymous", 4) as array, track_writes(array) as w:
        array[PAGE] = array[PAGE]
        assert pages(w.ranges()) == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_children(kind: str) -> None:
    with memory_of(kind, 32) as array:
        array[:] = 1
        with track_writes(array) as w:
            poke(array, 3 * PAGE)

            def inherited() -> tuple[list[int], list[int]]:
                at_first = pages(w.ranges())
                poke(array, 9 * PAGE)
                poke(array, 3 * PAGE)
                poke(array, 31 * PAGE)
                return at_first, pages(w.take().ranges())

            def own() -> list[int]:
                with track_writes(array[8 * PAGE :]) as mine:
                    poke(array, 5 * PAGE)
                    poke(array, 10 * PAGE)
                return pages(mine.ranges())

            assert in_child(inherited) == ([], [3, 9, 31])
            assert in_child(own) == [2]
            assert pages(w.ranges()) == [3], "what children write is theirs"
            poke(array, 4 * PAGE)
            poke(array, 10 * PAGE)
            assert pages(w.take().ranges()) == [3, 4, 10]
            poke(array, 3 * PAGE)
        assert pages(w.ranges()) == [3]


def test_a_grandchild_goes_on_too() -> None:
    with memory_of("anonymous", 8) as array, track_writes(array) as w:

        def grandchild() -> list[int]:
            poke(array, 2 * PAGE)
            return pages(w.ranges())

        def child() -> tuple[list[int], list[int]]:
            poke(array, 1 * PAGE)
            return in_child(grandchild), pages(w.ranges())

        assert in_child(child) == ([2], [1])


@pytest.mark.parametrize("size", [1, 100, PAGE + 1, 5 * PAGE + 77])
def test_unaligned_objects_say_what_they_share(size: int) -> None:
    with memory_of("anonymous", 16) as array:
        part = array[PAGE + 100 : PAGE + 100 + size]
        with track_writes(part=part) as w:
            array[PAGE] = 1  # the neighbour, on the first page
            array[0] = 1  # not on a page of it
        first = min(PAGE - 100, size)
        assert w.ranges() == w.shared() == [(0, first)]
        with track_writes(part=part) as w:
            part[:] = 1
        assert w.ranges("part") == [(0, size)]
        inner = (size + 100) // PAGE * PAGE - 100
        expected = [(0, size)] if inner <= first else [(0, first), (inner, size)]
        assert w.shared() == [pair for pair in expected if pair[0] < pair[1]]
        assert w.nbytes == {"part": size}


def test_bytearrays() -> None:
    small, large = bytearray(10), bytearray(100 * PAGE)
    with track_writes(small, large) as w:
        small[3] = 1
        large[50 * PAGE] = 1
        with pytest.raises(BufferError):
            large.append(1)  # it would move
    assert w.ranges(small) == w.shared(small) == [(0, 10)]
    ((start, stop),) = [pair for pair in w.ranges(large) if pair not in w.shared(large)]
    assert start <= 50 * PAGE < stop <= start + PAGE
    del w
    large.append(1)


def test_anonymous_mmap() -> None:
    with mmap.mmap(-1, 8 * PAGE) as memory:
        with track_writes(memory) as w:
            memory[5 * PAGE] = 1
            with pytest.raises(BufferError):
                memory.close()
        assert pages(w.ranges()) == [5]
        del w
        gc.collect()


def test_mapped_files(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * PAGE))
    for mode in ("r+", "c"):
        array = np.memmap(path, np.uint8, mode)
        with track_writes(array) as w:
            array[5 * PAGE] = 1
            array.sum()
        assert pages(w.ranges()) == [5]
        assert any("shared memory" in note for note in w.notes()) == (mode == "r+")
        del array, w


def test_a_file_that_is_mapped_for_reading_only(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * PAGE))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        with pytest.raises(UntrackableError, match=r"file: .*reading only"):
            track_writes(file=memory).start()
        gc.collect()


def test_strides() -> None:
    with memory_of("anonymous", 64) as raw:
        table = raw.reshape(64, PAGE)
        fortran = raw.view(np.uint16).reshape((PAGE // 2, 64), order="F")
        backwards = table[::-1]
        gaps = table[::8]
        with track_writes(table=table, fortran=fortran, backwards=backwards, gaps=gaps) as w:
            fortran[:, 5] = 1
            table[17:19, 3] = 1
        assert w.slices("table") == [slice(5, 6), slice(17, 19)]
        assert w.slices("fortran") == [slice(5, 6), slice(17, 19)]
        assert w.peek()._of("fortran")[0].array is fortran
        assert w.peek().axis("fortran") == 1
        assert w.slices("backwards") == [slice(45, 47), slice(58, 59)]
        assert w.ranges("backwards") == w.ranges("table")
        # Its rows are 0, 8, 16, ...; what lies between them is reported as bytes, but no row has it.
        assert w.slices("gaps") == []
        assert pages(w.ranges("gaps")) == [5, 17, 18]


class _Tensor:
    """What PyTorch's tensors look like from here."""

    def __init__(self, array: np.ndarray, error: str = "") -> None:
        self.array, self.error = array, error

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def detach(self) -> _Tensor:
        return self

    def numpy(self) -> np.ndarray:
        if self.error:
            raise TypeError(self.error)
        return self.array


def test_tensors() -> None:
    with memory_of("anonymous", 8) as array:
        tensor = _Tensor(array)
        with track_writes(weights=tensor) as w:
            array[6 * PAGE] = 1
        assert pages(w.ranges(tensor)) == pages(w.ranges(array)) == [6]
        with pytest.raises(UntrackableError, match=r"no memory of this process.*can't convert cuda"):
            track_writes(_Tensor(array, "can't convert cuda:0 device type tensor to numpy"))


def test_nested_trackers() -> None:
    with memory_of("anonymous", 16) as array, track_writes(outer=array) as outer:
        array[0] = 1
        with track_writes(inner=array[4 * PAGE : 8 * PAGE]) as inner:
            array[5 * PAGE] = 1
            assert pages(inner.take().ranges()) == [1]
            array[9 * PAGE] = 1
            assert pages(outer.take().ranges()) == [0, 5, 9]
            array[6 * PAGE] = 1
        assert pages(inner.ranges()) == [2]
        array[5 * PAGE] = 1
        assert pages(outer.take().ranges()) == [5, 6]


def test_the_same_bytes_under_several_names() -> None:
    with memory_of("anonymous", 4) as array, track_writes(a=array, b=array, c=array[2 * PAGE :]) as w:
        array[3 * PAGE] = 1
        assert w.nbytes == {"a": PAGE, "b": PAGE, "c": PAGE}


def test_pages_that_were_dropped_count_as_written() -> None:
    with memory_of("anonymous", 8) as array:
        array[:] = 1
        with track_writes(array) as w:
            start = array.ctypes.data + 2 * PAGE
            assert ctypes.CDLL(None).madvise(ctypes.c_void_p(start), PAGE, mmap.MADV_DONTNEED) == 0
            assert array[2 * PAGE] == 0
            assert pages(w.ranges()) == [2]


def test_life_of_a_tracker() -> None:
    with memory_of("anonymous", 4) as array:
        w = track_writes(array)
        for question in (w.take, w.peek, w.ranges, w.stop):
            with pytest.raises(TrackError, match="is not open"):
                question()
        assert "not started" in repr(w)
        assert w.start() is w
        assert w.open
        with pytest.raises(TrackError, match="is open already"):
            w.start()
        array[PAGE] = 1
        assert pages(w.stop().ranges()) == [1]
        assert not w.open
        assert pages(w.ranges()) == [1]
        with pytest.raises(TrackError, match="is not open"):
            w.take()
        with w:
            assert w.ranges() == []
            w.stop()
        assert "ended" in repr(w)


def test_a_tracker_that_is_dropped_ends() -> None:
    with memory_of("anonymous", 4) as array:
        track_writes(array).start()
        gc.collect()
        assert ledger.areas == []


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (5, UntrackableError, "arrays, CPU tensors, and objects with the buffer protocol"),
        (np.array([object()]), UntrackableError, "Python objects"),
        (np.zeros(0), UntrackableError, "no bytes"),
        (b"", UntrackableError, "no bytes"),
    ],
)
def test_what_cannot_be_tracked(what: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^thing.*{message}"):
        track_writes(thing=what)


def test_names() -> None:
    array = np.zeros(10)
    with pytest.raises(RangeError, match="at least one"):
        track_writes()
    with track_writes(array, b=array[:5]) as w:
        assert w.names == ("0", "b")
        with pytest.raises(RangeError, match="'c' is not tracked here; the objects are '0', 'b'"):
            w.ranges("c")
        with pytest.raises(UntrackableError, match="only writes were tracked"):
            w.ranges("b", "read_only")
