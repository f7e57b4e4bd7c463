"""Recordings of memory that is sampled: each look has what was touched since the one before."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from support.tracking import PAGE, memory_of, poke
from userfault.errors import RangeError, TrackError, UntrackableError
from userfault.kernel import pagemap
from userfault.track import Recorder, Trace, read_trace, record_to, shared_array
from userfault.track._ledger import ledger
from userfault.track._pacing import Pace

pytestmark = pytest.mark.needs_feature("WP_ASYNC")

# It looks when it is told to.
NEVER = 1e6


def samples(trace: Trace, name: str) -> list[list[tuple[int, int, int]]]:
    """Return the runs of each sample of an object."""
    number = trace.object(name).id
    return [
        [tuple(run) for run in trace.runs[row["first"] : row["first"] + row["runs"]].tolist()]
        for row in trace.samples
        if row["object"] == number
    ]


def test_each_look_has_what_was_written_since_the_last_one() -> None:
    with memory_of("anonymous", 64) as memory:
        with Recorder(memory, every=NEVER) as recorder:
            poke(memory, 3 * PAGE)
            poke(memory, 10 * PAGE, 4 * PAGE)
            recorder.look()
            recorder.look()
            poke(memory, 10 * PAGE + 5)
        trace = recorder.trace
    assert samples(trace, "0") == [[(3, 1, 1), (10, 4, 1)], [], [(10, 1, 1)]]
    rows = trace.samples
    assert rows["start_ns"][1:].tolist() == rows["stop_ns"][:-1].tolist()
    assert 0 <= trace.object(0).born_ns <= rows["start_ns"][0] <= rows["stop_ns"][-1] <= trace.duration_ns
    assert trace.complete
    assert (trace.cost.samples, trace.cost.traps) == (3, 6)
    assert 0 < trace.cost.cpu_ns < trace.cost.wall_ns <= trace.duration_ns
    thing = trace.object("0")
    assert (thing.nbytes, thing.granularity, thing.watched, thing.method) == (
        64 * PAGE,
        PAGE,
        "writes",
        "wp-async",
    )
    assert (thing.dtype, thing.shape, thing.lead, thing.died_ns) == ("|u1", (64 * PAGE,), 0, None)
    assert trace.about["page_size"] == PAGE
    assert trace.about["every"] == NEVER


def test_reads_and_writes_are_told_apart() -> None:
    table = shared_array((16, PAGE), "uint8")
    with Recorder(table=table, what="accesses", every=NEVER) as recorder:
        table[4:8, 0].sum()
        table[5, 0] = 1
        recorder.look()
        table[6, 0] = 1
    trace = recorder.trace
    assert samples(trace, "table") == [[(4, 1, 0), (5, 1, 1), (6, 2, 0)], [(6, 1, 1)]]
    assert trace.object("table").watched == "accesses"
    assert trace.object("table").tells_writes


def test_an_unaligned_object_begins_on_its_first_page() -> None:
    with memory_of("anonymous", 8) as memory:
        part = memory[PAGE + 100 : 3 * PAGE + 50].view()
        with Recorder({"part": part}, every=NEVER) as recorder:
            poke(memory, 0)
            poke(memory, PAGE)  # a neighbour's byte on the first page
            poke(memory, 3 * PAGE + 49)
        trace = recorder.trace
    thing = trace.object("part")
    assert (thing.lead, thing.pages) == (100, 3)
    assert samples(trace, "part") == [[(0, 1, 1), (2, 1, 1)]]


def test_objects_come_and_go() -> None:
    with memory_of("anonymous", 4) as one, memory_of("memfd", 4) as two:
        with Recorder(every=NEVER) as recorder:
            assert recorder.add(one, "grid", site="stencil.py:12") == "grid"
            poke(one, 0)
            recorder.look()
            assert recorder.add(two, "grid", what="accesses") == "grid#2"
            with pytest.raises(RangeError, match="recorded already, as 'grid'"):
                recorder.add(one, "again")
            poke(one, PAGE)
            recorder.remove(one)
            poke(one, 2 * PAGE)
            assert recorder.names == ("grid#2",)
            assert recorder.add(one) == "2"
            two[PAGE]
            poke(one, 3 * PAGE)
            recorder.remove("2")
            with pytest.raises(RangeError, match="'grid' is not recorded; the objects are 'grid#2'"):
                recorder.remove("grid")
            with pytest.raises(RangeError, match="this ndarray is not recorded"):
                recorder.remove(one)
        trace = recorder.trace
    assert [thing.name for thing in trace.objects] == ["grid", "grid#2", "2"]
    assert samples(trace, "grid") == [[(0, 1, 1)], [(1, 1, 1)]]
    assert samples(trace, "2") == [[(3, 1, 1)]]
    assert samples(trace, "grid#2") == [[(1, 1, 0)]]
    first = trace.object("grid")
    assert first.site == "stencil.py:12"
    assert first.died_ns is not None
    assert first.born_ns < first.died_ns <= trace.object("2").born_ns
    assert trace.object("grid#2").died_ns is None
    assert any(note.startswith("grid#2: shared memory") for note in trace.about["notes"])


def test_a_recording_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    with memory_of("anonymous", 4) as memory:
        recorder = record_to(path, memory, every=NEVER).start()
        assert recorder.running
        poke(memory, 0)
        recorder.look()
        assert not recorder.trace.complete
        assert samples(recorder.trace, "0") == [[(0, 1, 1)]]
        assert recorder.stop() == path
        assert recorder.stop() == path
        assert not recorder.running
    trace = read_trace(path)
    assert trace.complete
    assert samples(trace, "0") == [[(0, 1, 1)], []]
    assert samples(recorder.trace, "0") == samples(trace, "0")


def test_the_thread_looks_by_itself_and_loses_nothing() -> None:
    with memory_of("anonymous", 512) as memory, memory_of("numpy", 512) as other:
        done = threading.Event()

        def write(array: np.ndarray, step: int) -> None:
            for page in range(0, 512, step):
                poke(array, page * PAGE)
            done.wait(0)

        with Recorder([memory], other=other, every=0.001, budget=1) as recorder:
            threads = [threading.Thread(target=write, args=pair) for pair in ((memory, 1), (other, 3))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            while recorder.cost.samples < 5:
                done.wait(0.001)
        trace = recorder.trace
    for name, expected in (("0", range(512)), ("other", range(0, 512, 3))):
        seen = [
            page for runs in samples(trace, name) for first, n, _ in runs for page in range(first, first + n)
        ]
        assert sorted(set(seen)) == list(expected)
        # Written once, so found once; but for the write that is under way in a look, which may be in both intervals.
        assert len(seen) - len(set(seen)) <= len(trace.samples)


def test_nothing_of_the_memory_is_touched() -> None:
    with memory_of("anonymous", 256) as memory:
        poke(memory, 7 * PAGE)
        with Recorder(memory, every=NEVER) as recorder:
            recorder.look()
        found = pagemap.scan(memory, mask=pagemap.PageCategory.PRESENT)
        assert found.pages == 1
        assert samples(recorder.trace, "0") == [[], []]


def test_the_interval_grows_until_the_cost_fits_and_shrinks_slowly() -> None:
    pace = Pace(0.1, 0.03)
    pace.looked(1_000_000)
    assert pace.interval == 0.1
    assert not pace.held_back
    pace.looked(9_000_000)
    assert pace.interval == pytest.approx(0.3)
    pace.looked(9_000_000)
    assert pace.interval == pytest.approx(0.3)
    pace.looked(6_000_000)
    assert 0.2 < pace.interval < 0.3
    assert pace.held_back
    for _ in range(100):
        pace.looked(0)
    assert pace.interval == pytest.approx(0.1)


def test_a_budget_that_is_too_small_for_the_interval_is_kept_and_told() -> None:
    with memory_of("anonymous", 4) as memory:
        with Recorder(memory, every=0.0005, budget=0.001) as recorder:
            for _ in range(4):
                recorder.look()
            assert recorder.interval > 0.0005
            while recorder.cost.samples < 8:
                threading.Event().wait(0.001)
        trace = recorder.trace
    assert trace.about["every_used"] > trace.about["every"]
    assert any(
        "instead of every 0.0005 s: more would have taken over 0.1%" in note for note in trace.about["notes"]
    )


def test_mistakes() -> None:
    for options, message in (
        ({"every": 0}, "every=0 is no interval"),
        ({"budget": 0}, "budget=0 is no share"),
        ({"budget": 1.5}, "budget=1.5 is no share"),
        ({"what": "reads"}, "what='reads' is neither"),
    ):
        with pytest.raises(RangeError, match=message):
            Recorder(**options)
    recorder = Recorder()
    for call in (
        recorder.stop,
        recorder.look,
        lambda: recorder.add(b"1"),
        lambda: recorder.remove("x"),
        lambda: recorder.trace,
    ):
        with pytest.raises(TrackError, match="start it first"):
            call()
    with recorder:
        with pytest.raises(TrackError, match="was started before"):
            recorder.start()
        with pytest.raises(RangeError, match="neither"):
            recorder.add(np.zeros(9), what="x")  # type: ignore[arg-type]
    with pytest.raises(TrackError, match="was started before: make another"):
        recorder.start()
    assert recorder.trace.objects == ()


def test_a_recorder_that_cannot_start_leaves_nothing_behind() -> None:
    with memory_of("anonymous", 4) as memory:
        recorder = Recorder([memory, np.array([None])])
        with pytest.raises(UntrackableError, match="1: an array of Python objects"):
            recorder.start()
        assert ledger.areas == []
        assert not recorder.running


def test_what_fails_in_the_thread_is_raised_by_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with memory_of("anonymous", 4) as memory:
        recorder = Recorder(memory, every=0.001).start()
        poke(memory, 0)
        recorder.look()
        assert recorder._writer is not None
        failed = threading.Event()

        def fail(*arguments: object) -> None:
            failed.set()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(recorder._writer, "add_sample", fail)
        assert failed.wait(10)
        with pytest.raises(TrackError, match=r"recording ended early: .*No space left") as caught:
            recorder.stop()
        assert isinstance(caught.value.__cause__, OSError)
        assert ledger.areas == []
        assert samples(recorder.trace, "0")[0] == [(0, 1, 1)]
