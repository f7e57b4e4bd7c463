"""open(replay=): what an earlier run needed comes before it is asked for, and a wrong plan does no harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from support.page_sources import PatternSource
from userfault._trace import Trace, TracedObject, write_trace
from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE, SAMPLE_DTYPE
from userfault.errors import SourceNotFoundError, TraceError

BLOCK = 64 * 1024
ROWS = BLOCK // 8
BLOCKS = 200
DATA = np.arange(BLOCKS * ROWS, dtype="u8")
WANTED = np.random.default_rng(3).permutation(BLOCKS)[:60]


def opened(**options: Any) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = userfault.open(DATA, name="data", readahead=False, **options)
    return result


def look_up(array: np.ndarray[Any, Any], blocks: np.ndarray[Any, Any]) -> int:
    return sum(int(array[block * ROWS + 5]) for block in blocks.tolist())


def traced(*arrays: np.ndarray[Any, Any], blocks: np.ndarray[Any, Any] = WANTED) -> Trace:
    """A trace of looking up `blocks` in each array, made by hand: what a Recorder writes."""
    events, objects = [], []
    for number, array in enumerate(arrays):
        memory = userfault.memory_of(array)
        memory.trace_start()
        look_up(array, blocks)
        found = memory.trace_read()
        memory.trace_stop()
        rows = np.zeros(len(found), EVENT_DTYPE)
        rows["object"], rows["t_ns"] = number, found["t_ns"].astype(np.int64) - int(found["t_ns"][0])
        rows["block"], rows["kind"], rows["took_ns"] = found["block"], found["kind"], found["took_ns"]
        events.append(rows)
        objects.append(TracedObject(number, memory.name, memory.nbytes, memory.block, "faults"))
    return Trace(
        tuple(objects), np.zeros(0, SAMPLE_DTYPE), np.zeros(0, RUN_DTYPE), np.concatenate(events), 10**9
    )


def arrived(array: np.ndarray[Any, Any], blocks: int) -> userfault.MemoryStats:
    memory = userfault.memory_of(array)
    deadline = time.monotonic() + 20
    while memory.stats().blocks_replay < blocks and time.monotonic() < deadline:
        time.sleep(0.002)
    return memory.stats()


def test_a_second_run_finds_all_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "first.uft"
    write_trace(traced(opened()), path)
    array = opened(replay=path)
    stats = arrived(array, len(WANTED))
    assert (stats.blocks_replay, stats.faults) == (len(WANTED), 0)
    assert stats.blocks_read == len(WANTED)
    assert look_up(array, WANTED) == int(DATA[WANTED * ROWS + 5].sum())
    assert userfault.memory_of(array).stats().faults == 0


def test_events_say_that_it_was_a_replay() -> None:
    trace = traced(opened())
    array = opened(replay=trace)
    memory = userfault.memory_of(array)
    arrived(array, len(WANTED))
    memory.evict()
    memory.trace_start()
    memory._replay(np.array([[3, 2]], np.uint64).data)
    arrived(array, len(WANTED) + 2)
    events = memory.trace_read()
    assert events["block"].tolist() == [3, 4]
    assert set(events["kind"].tolist()) == {8}
    assert memory.trace_lost == 0


@pytest.mark.parametrize("block", [BLOCK // 4, BLOCK * 4])
def test_blocks_of_another_size(block: int) -> None:
    array = opened(replay=traced(opened()), block=block)
    need = {int(b) * BLOCK // block + k for b in WANTED for k in range(max(1, BLOCK // block))}
    assert arrived(array, len(need)).blocks_replay == len(need)
    assert look_up(array, WANTED) == int(DATA[WANTED * ROWS + 5].sum())
    assert userfault.memory_of(array).stats().faults == 0


def test_a_source_in_a_worker() -> None:
    def of_worker(**options: Any) -> Any:
        source = PatternSource(BLOCKS * BLOCK)
        return userfault.open(
            source, dtype="u8", shape=DATA.shape, name="late", block=BLOCK, readahead=False, **options
        )

    first = of_worker()
    array = of_worker(replay=traced(first))
    assert arrived(array, len(WANTED)).blocks_replay == len(WANTED)
    assert look_up(array, WANTED) == look_up(first, WANTED)
    assert userfault.memory_of(array).stats().faults == 0


def test_more_than_the_budget_comes_in_parts() -> None:
    everything = np.arange(BLOCKS)
    array = opened(replay=traced(opened(), blocks=everything), memory=BLOCK * 32)
    assert arrived(array, 16).blocks_replay == 16
    for block in range(BLOCKS):
        assert int(array[block * ROWS]) == block * ROWS
    stats = userfault.memory_of(array).stats()
    assert stats.blocks_replay > BLOCKS // 2
    assert stats.resident_peak <= stats.budget + (4 << 20)


def test_another_run_is_left_alone() -> None:
    # All within the budget but a window at a time, so that there is a rest to be dropped.
    array = opened(replay=traced(opened(), blocks=np.arange(100, 200)), memory=BLOCK * 32)
    before = arrived(array, 16).blocks_replay
    others = np.arange(0, 90)
    assert look_up(array, others) == int(DATA[others * ROWS + 5].sum())
    stats = userfault.memory_of(array).stats()
    assert stats.replays_dropped == 1
    assert stats.blocks_replay == before
    assert stats.as_dict()["replays_dropped"] == 1


def test_the_memory_of_the_same_name_is_meant() -> None:
    one, two = opened(), userfault.open(DATA, name="other", readahead=False)
    both = traced(one, two)
    array = opened(replay=both)
    assert arrived(array, len(WANTED)).blocks_replay == len(WANTED)
    with pytest.raises(TraceError, match=r"'data', 'other'|say which"):
        userfault.open(DATA, name="third", replay=both)


def test_what_is_no_recording_of_it(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"no trace .*absent\.uft.*Recorder"):
        opened(replay=tmp_path / "absent.uft")
    (tmp_path / "not.uft").write_bytes(b"something else")
    with pytest.raises(TraceError):
        opened(replay=tmp_path / "not.uft")
    with pytest.raises(TraceError, match="8192 bytes"):
        userfault.open(np.zeros(1024), replay=traced(opened()))
    empty = Trace((), np.zeros(0, SAMPLE_DTYPE), np.zeros(0, RUN_DTYPE), np.zeros(0, EVENT_DTYPE), 0)
    with pytest.raises(TraceError):
        opened(replay=empty)


def test_an_array_without_elements_needs_no_plan() -> None:
    assert userfault.open(np.zeros(0), replay=traced(opened())).shape == (0,)
