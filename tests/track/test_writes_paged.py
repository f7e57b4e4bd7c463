"""Writes of arrays that userfault made: the engine watches their blocks."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import userfault
from support import run_python
from support.tracking import poke
from userfault.errors import TrackError, UntrackableError
from userfault.track import track_accesses, track_writes
from userfault.track._ledger import ledger

BLOCK = 65536
COUNT = 40


def make() -> np.ndarray:
    return userfault.zeros(COUNT * BLOCK - 1000, np.uint8, block="64 KiB")


def blocks(ranges: list[tuple[int, int]]) -> list[int]:
    return [block for start, stop in ranges for block in range(start // BLOCK, -(-stop // BLOCK))]


@pytest.mark.parametrize("every", [1, 3, 8])
def test_every_so_many_blocks(every: int) -> None:
    array = make()
    with track_writes(array) as w:
        for _ in range(3):
            assert array.sum() >= 0
            assert w.ranges() == []
            for block in range(0, COUNT, every):
                array[block * BLOCK + block] += 1
            expected = list(range(0, COUNT, every))
            assert blocks(w.ranges()) == expected
            assert np.flatnonzero(w.mask()).tolist() == expected
            assert w.mask().shape == (COUNT,)
            assert blocks(w.take().ranges()) == expected
        assert w.method() == "blocks"
        assert w.granularity() == BLOCK
        assert w.blind() == []
        assert w.shared() == []
        array[-1] = 1
        assert w.ranges() == [((COUNT - 1) * BLOCK, COUNT * BLOCK - 1000)], "and ends with the array"


def test_what_was_dirty_before_does_not_count() -> None:
    array = make()
    array[:] = 5
    with track_writes(array) as w:
        assert w.ranges() == []
        array[3 * BLOCK] = 1
        assert blocks(w.ranges()) == [3]
    assert int(array[4 * BLOCK]) == 5


def test_views_and_nested_trackers() -> None:
    array = make()
    part = array[10 * BLOCK + 100 : 13 * BLOCK]
    with track_writes(whole=array, part=part) as outer, track_writes(array[11 * BLOCK : 12 * BLOCK]) as inner:
        array[10 * BLOCK] = 1  # of another's, in its first block
        array[11 * BLOCK] = 1
        array[20 * BLOCK] = 1
        assert outer.ranges("part") == [(0, 2 * BLOCK - 100)]
        assert outer.shared("part") == [(0, BLOCK - 100)]
        assert outer.mask("part").tolist() == [True, True, False]
        assert inner.take().ranges() == [(0, BLOCK)]
        array[11 * BLOCK] = 1
        assert blocks(outer.take().ranges("whole")) == [10, 11, 20]
        assert inner.ranges() == [(0, BLOCK)]


def test_with_other_memory_in_one_tracker() -> None:
    array = make()
    plain = np.zeros(1 << 20, np.uint8)
    with track_writes(paged=array, plain=plain) as w:
        array[5 * BLOCK] = 1
        plain[500_000] = 1
    assert w.method("paged") == "blocks"
    assert w.method("plain") == "wp-async"
    assert w.nbytes["paged"] == BLOCK
    assert 0 < w.nbytes["plain"] < BLOCK


def test_writes_back_to_a_file_go_on(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.zeros((64, 16384), np.uint8))
    array = userfault.open(path, mode="r+", block="64 KiB")
    memory = userfault.memory_of(array)
    with track_writes(memory) as w:
        array[8] = 1
        memory.flush()
        taken = w.take()
        assert 0 < taken.nbytes[memory.name] <= 2 * memory.block
        array[8] = 2
        memory.evict()
        assert w.nbytes[memory.name] == taken.nbytes[memory.name], "evicted, and still known"
        assert (array[8] == 2).all()
    memory.flush()
    assert (np.load(path)[8] == 2).all()
    del array


def test_more_data_than_memory() -> None:
    array = userfault.zeros(COUNT * BLOCK, np.uint8, block="64 KiB", memory=8 * BLOCK)
    with track_writes(array) as w:
        for block in range(0, COUNT, 2):
            array[block * BLOCK] = 1
        assert int(array.sum()) == COUNT // 2
        assert blocks(w.ranges()) == list(range(0, COUNT, 2))
    del array


def test_six_threads_write_while_one_takes() -> None:
    array = make()
    stamps = array[: (COUNT - 1) * BLOCK].reshape(-1, BLOCK)
    stop = threading.Event()

    def write(number: int) -> None:
        turn = number
        while not stop.is_set():
            poke(array, turn % (COUNT - 1) * BLOCK, 1, 1 + turn % 250)
            turn += 6

    with track_writes(array) as w:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        try:
            seen, reported, changes = stamps[:, 0].copy(), np.zeros(COUNT - 1, np.bool_), 0
            for _ in range(200):
                now = stamps[:, 0].copy()
                taken = w.take().mask()[: COUNT - 1]
                changed = now != seen
                assert not (changed & ~(taken | reported)).any(), "a block was written and never reported"
                seen, reported, changes = now, taken, changes + int(changed.sum())
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert changes > 100


def test_a_forked_child_knows_its_own() -> None:
    run_python(
        """
        import os, warnings
        import numpy as np, userfault
        from userfault.track import track_writes

        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        a = userfault.zeros(16 * 65536, np.uint8, block="64 KiB")
        with track_writes(a) as w:
            a[2 * 65536] = 1
            pid = os.fork()
            if pid == 0:
                assert w.ranges() == [], w.ranges()
                a[5 * 65536] = 1
                assert w.take().ranges() == [(5 * 65536, 6 * 65536)], w.ranges()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert w.take().ranges() == [(2 * 65536, 3 * 65536)]
        """
    ).check()


def test_who_asks_for_more_comes_first() -> None:
    array = make()
    with (
        track_writes(array),
        pytest.raises(TrackError, match=r"track_accesses\(0\) needs .*track_writes\(0\)"),
    ):
        track_accesses(array).start()
    with track_accesses(array) as reads, track_writes(array) as writes:
        array[BLOCK] = 1
        assert int(array[3 * BLOCK]) == 0
        assert blocks(writes.ranges()) == blocks(reads.ranges(kind="written")) == [1]
        assert blocks(reads.ranges()) == [1, 3]


def test_a_memory_that_is_closed() -> None:
    array = make()
    memory = userfault.memory_of(array)
    del array
    tracker = track_writes(memory).start()
    memory.close()
    assert tracker.blind() == [(0, memory.nbytes)], "nobody can tell"
    tracker.stop()
    assert ledger.areas == []
    with pytest.raises(UntrackableError, match="closed"):
        tracker.start()
