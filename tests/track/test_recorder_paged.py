"""Recordings of paged memories: every event, up to the memory's end."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import userfault
from userfault._trace import LOADS, EventKind, Trace, fault_latency, plan
from userfault.errors import RangeError, TrackError
from userfault.track import Recorder, _sampling

NEVER = 1e6
BLOCK = 16 * 4096
COUNT = 32


def opened(**more: object) -> np.ndarray:
    data = np.arange(COUNT * BLOCK // 8, dtype="f8")
    return userfault.open(data, name="numbers", block=BLOCK, **more)


def blocks(trace: Trace, *kinds: EventKind) -> list[int]:
    return sorted(trace.events["block"][np.isin(trace.events["kind"], kinds)].tolist())


def touch(array: np.ndarray, *which: int) -> None:
    for block in which:
        assert array[block * BLOCK // 8] == block * BLOCK // 8


def test_every_load_is_recorded_with_its_kind() -> None:
    array = opened()
    memory = userfault.memory_of(array)
    memory.advise("random")
    touch(array, 1)
    with Recorder(array, every=NEVER) as recorder:
        touch(array, 3, 30, 4)
        memory.prefetch(array[8 * BLOCK // 8 : 10 * BLOCK // 8], wait=True)
        recorder.look()
        touch(array, 5)
    trace = recorder.trace
    thing = trace.object("numbers")
    assert (thing.watched, thing.granularity, thing.nbytes) == ("faults", BLOCK, memory.nbytes)
    assert (thing.dtype, thing.shape, thing.source) == ("<f8", array.shape, "numbers")
    assert blocks(trace, EventKind.DEMAND) == [3, 4, 5, 30]
    assert blocks(trace, EventKind.PREFETCH) == [8, 9]
    assert np.all(np.diff(trace.events["t_ns"]) >= 0)
    assert trace.events["t_ns"][0] >= 0
    assert trace.events["t_ns"][-1] <= trace.duration_ns
    latency = fault_latency(trace)
    # Block 1 was loaded before the recording began.
    assert latency.stages["fault"].count == 4 == latency.count
    assert (trace.lost, trace.cost.traps) == (0, 0)
    assert sorted(block for first, count in plan(trace) for block in range(first, first + count)) == [
        3,
        4,
        5,
        8,
        9,
        30,
    ]
    memory.trace_start()
    memory.trace_stop()


def test_writes_and_evictions_are_events() -> None:
    changed = userfault.zeros((COUNT, BLOCK), "u1", memory=8 * BLOCK, block=BLOCK, name="changed")
    read = opened(memory=8 * BLOCK)
    with Recorder([read], changed=changed, every=NEVER) as recorder:
        for row in range(COUNT):
            changed[row, 0] = 1
            touch(read, row)
    trace = recorder.trace
    assert [thing.name for thing in trace.objects] == ["numbers", "changed"]
    found = {kind: trace.events[trace.events["kind"] == kind] for kind in EventKind}
    assert sorted(found[EventKind.DIRTY]["block"]) == list(range(COUNT))
    assert set(found[EventKind.DIRTY]["object"]) == set(found[EventKind.WRITE]["object"]) == {1}
    assert len(found[EventKind.WRITE]) >= COUNT - 8
    assert len(found[EventKind.EVICT]) >= COUNT - 8


def test_a_memory_that_is_dropped_is_recorded_to_its_end() -> None:
    array = opened()
    with Recorder(array, every=NEVER) as recorder:
        touch(array, 2, 9)
        del array
        gc.collect()
        other = opened()
        assert recorder.add(other) == "numbers#2"
        touch(other, 7)
        recorder.look()
        assert recorder.names == ("numbers#2",)
    trace = recorder.trace
    assert {2, 9} <= set(trace.events["block"][trace.events["object"] == 0].tolist())
    first, second = trace.objects
    assert first.died_ns is not None
    assert first.died_ns <= trace.duration_ns
    assert first.latency["fault"]["count"] == 2
    assert second.died_ns is None
    assert second.latency["fault"]["count"] == 1


def test_a_memory_that_is_closed_is_recorded_to_its_end() -> None:
    array = opened()
    memory = userfault.memory_of(array)
    with Recorder(memory, every=NEVER) as recorder:
        touch(array, 5)
        del array
        gc.collect()
        memory.close()
    trace = recorder.trace
    assert 5 in blocks(trace, *LOADS)
    assert trace.object("numbers").died_ns is not None


def test_events_that_were_overwritten_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sampling, "_RING", 4)
    array = opened()
    userfault.memory_of(array).advise("random")
    with Recorder(array, every=NEVER) as recorder:
        touch(array, *range(17))
    trace = recorder.trace
    assert blocks(trace, EventKind.DEMAND) == [13, 14, 15, 16]
    assert trace.lost == 13


def test_there_is_one_reader_of_a_trace() -> None:
    array = opened()
    memory = userfault.memory_of(array)
    memory.trace_start()
    with pytest.raises(TrackError, match="numbers: the program has its trace"):
        Recorder(array).start()
    memory.trace_stop()
    with Recorder(array, every=NEVER) as recorder:
        for call in (memory.trace_start, memory.trace_read, memory.trace_stop):
            with pytest.raises(TrackError, match="numbers: a recorder has its trace"):
                call()
        with pytest.raises(TrackError, match="a recorder has its trace"):
            Recorder(memory).start()
        with pytest.raises(RangeError, match="recorded already, as 'numbers'"):
            recorder.add(memory)
        touch(array, 1)
        recorder.remove(array)
        memory.trace_start()
        touch(array, 2)
        _sampling._settle(memory)
        assert 2 in memory.trace_read()["block"]
        memory.trace_stop()
    assert 1 in blocks(recorder.trace, EventKind.DEMAND)
    assert 2 not in blocks(recorder.trace, EventKind.DEMAND)
