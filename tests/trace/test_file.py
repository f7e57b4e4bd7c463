"""Trace files: nothing is lost on the way, whatever becomes of the file later."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from support import run_python
from support.trace_data import anything, by_the_document, same, thing, trace_of
from userfault._trace import Cost, Trace, TraceWriter, read_trace, write_trace
from userfault._trace._frames import FrameKind, file_header, frame, frames_of
from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE
from userfault.errors import ClosedError, TraceError


def written(trace: Trace) -> bytes:
    out = io.BytesIO()
    write_trace(trace, out)
    return out.getvalue()


def small() -> Trace:
    samples = [(0, 0, 10, [(0, 2, 1), (5, 1, 0)]), (1, 2, 12, []), (0, 10, 20, [(3, 1, 1)])]
    events = [(2, 5, 700, 3, 1), (2, 9, 0, 4, 2)]
    return trace_of(
        [thing(0), thing(1), thing(2, watched="faults")], samples, events, about={"command": ["a.py"]}, lost=3
    )


@given(anything())
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(trace: Trace) -> None:
    assert same(read_trace(written(trace)), trace)


@given(anything())
@settings(max_examples=60, deadline=None)
def test_the_document_suffices_to_read_a_file(trace: Trace) -> None:
    found = by_the_document(written(trace))
    assert found["whole"]
    assert found["started_ns"] == trace.started_ns
    assert found["about"] == trace.about
    assert (found["duration_ns"], found["lost"]) == (trace.duration_ns, trace.lost)
    assert Cost(**found["cost"]) == trace.cost
    assert found["events"] == [tuple(event) for event in trace.events.tolist()]
    runs = trace.runs.tolist()
    assert found["samples"] == [
        (number, start, stop, [tuple(run) for run in runs[first : first + count]])
        for number, start, stop, first, count in trace.samples.tolist()
    ]
    for known in trace.objects:
        said = found["objects"][known.id]
        for name in ("name", "nbytes", "granularity", "watched", "method", "lead", "dtype", "site", "source"):
            assert said[name] == getattr(known, name)
        assert (said["born_ns"], said["tells_writes"]) == (known.born_ns, known.tells_writes)
        assert tuple(said["shape"]) == known.shape
        assert said.get("died_ns") == known.died_ns
        assert said.get("latency", {}) == known.latency


def test_a_file_on_disk_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    path.write_bytes(b"what was there before" * 1000)
    write_trace(small(), path)
    assert same(read_trace(path), small())
    with path.open("rb") as file:
        assert same(read_trace(file), small())


def test_a_cut_file_has_all_that_is_whole() -> None:
    data = written(small())
    seen = set()
    for length in range(16, len(data)):
        trace = read_trace(data[:length])
        assert not trace.complete
        seen.add((len(trace.objects), len(trace.samples), len(trace.events)))
        if len(trace.samples):
            assert np.array_equal(trace.runs, small().runs)
            assert trace.duration_ns == 20
    assert seen == {(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 3, 0), (3, 3, 2)}
    assert read_trace(data).complete


def test_zeros_behind_the_last_frame_are_a_cut() -> None:
    data = written(small())
    last = [offset for offset, kind, _ in frames_of(memoryview(data), "it") if kind == FrameKind.END]
    trace = read_trace(data[: last[0]] + bytes(5000))
    assert not trace.complete
    assert len(trace.events) == 2


def test_every_changed_byte_is_noticed() -> None:
    data = written(small())
    for at in range(16, len(data)):
        broken = bytearray(data)
        broken[at] ^= 0x40
        with pytest.raises(TraceError, match=r"damaged at byte \d+: .*salvage=True") as caught:
            read_trace(bytes(broken))
        # The offset is that of the frame, so at most this byte's.
        assert int(str(caught.value).split("at byte ")[1].split(":")[0]) <= at


def test_salvage_keeps_what_stands_before_the_damage() -> None:
    data = bytearray(written(small()))
    data[-1] ^= 1
    trace = read_trace(bytes(data), salvage=True)
    assert not trace.complete
    assert np.array_equal(trace.samples, small().samples)
    assert np.array_equal(trace.events, small().events)
    data[3] ^= 1
    with pytest.raises(TraceError, match="no trace"):
        read_trace(bytes(data), salvage=True)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x89UFT\n\x1a\n" + bytes(30), bytes(100)])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=r"other (is no trace|ends after 0 bytes)"):
        read_trace(path)


def test_versions() -> None:
    data = bytearray(written(small()))
    struct.pack_into("<HH", data, 8, 1, 7)
    assert same(read_trace(bytes(data)), small())
    struct.pack_into("<HH", data, 8, 2, 0)
    with pytest.raises(TraceError, match=r"format 2\.0; .* upgrade userfault"):
        read_trace(bytes(data))


def test_what_a_newer_writer_adds_is_skipped() -> None:
    data = written(small())
    stored = zlib.compress(b"news")
    head = struct.pack("<BBHII", 99, 1, 0, len(stored), zlib.crc32(stored))
    unknown = head + struct.pack("<I", zlib.crc32(head)) + stored
    assert same(read_trace(data[:16] + unknown + data[16:] + unknown), small())
    more = frame(
        FrameKind.OBJECT,
        b'{"id":9,"name":"n","nbytes":1,"granularity":1,"watched":"writes","colour":"red","shape":[]}',
    )
    assert read_trace(data + more).objects[-1].name == "n"


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (FrameKind.OBJECT, b"{"),
        (FrameKind.OBJECT, b"[]"),
        (FrameKind.OBJECT_END, b'{"id":7,"died_ns":null}'),
        (FrameKind.SAMPLES, b""),
        (FrameKind.SAMPLES, b"\x02\x00\x00\x00\x0e\x00"),  # of an object 7 that is not there
        (FrameKind.EVENTS, b"\x02\x0f"),
        (FrameKind.EVENTS, b"\x01"),
        (FrameKind.ABOUT, b'{"started_ns":"x"}'),
    ],
)
def test_frames_that_make_no_sense_are_damage(kind: FrameKind, payload: bytes) -> None:
    with pytest.raises(TraceError, match=f"damaged at byte 16: a frame of kind {kind:d} makes no sense"):
        read_trace(file_header() + frame(kind, payload))


def test_what_a_writer_was_given_stands_in_the_file_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    writer = TraceWriter(path, started_ns=7, about={"a": 1})
    writer.add_object(thing(0))
    runs = np.array([(1, 2, 1)], RUN_DTYPE)
    for tick in range(40):
        writer.add_sample(0, tick * 100_000_000, (tick + 1) * 100_000_000, runs)
    trace = read_trace(path)
    assert not trace.complete
    assert 20 <= len(trace.samples) < 40
    writer.note(b=2)
    writer.state(4_000_000_000, 5, Cost(samples=40))
    writer.flush()
    trace = read_trace(path)
    assert (len(trace.samples), trace.lost, trace.cost.samples, trace.about) == (40, 5, 40, {"a": 1, "b": 2})
    writer.close(5_000_000_000, 6)
    writer.close(0)
    trace = read_trace(path)
    assert trace.complete
    assert (trace.duration_ns, trace.lost, trace.started_ns) == (5_000_000_000, 6, 7)
    with pytest.raises(ClosedError):
        writer.note(c=3)


def test_samples_and_events_come_out_by_time(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.uft")
    for number in range(2):
        writer.add_object(thing(number))
    writer.add_sample(1, 0, 30, np.array([(5, 1, 1)], RUN_DTYPE))
    writer.add_events(np.array([(1, 30, 0, 3, 1)], EVENT_DTYPE))
    writer.flush()
    writer.add_sample(0, 0, 20, np.array([(6, 1, 1), (8, 2, 0)], RUN_DTYPE))
    writer.add_events(np.array([(0, 20, 0, 4, 1)], EVENT_DTYPE))
    writer.close(30)
    trace = read_trace(tmp_path / "x.uft")
    assert trace.samples["stop_ns"].tolist() == [20, 30]
    firsts = [trace.runs["page"][row["first"]] for row in trace.samples]
    assert firsts == [6, 5]
    assert trace.events["block"].tolist() == [4, 3]


def test_a_million_intervals_stay_small() -> None:
    out = io.BytesIO()
    writer = TraceWriter(out)
    writer.add_object(thing(0))
    nothing = np.zeros(0, RUN_DTYPE)
    times = np.cumsum(np.random.default_rng(1).integers(99_900_000, 100_100_000, 100_000)).tolist()
    for start, stop in zip([0, *times], times, strict=False):
        writer.add_sample(0, start, stop, nothing)
    writer.close(times[-1])
    # The times alone are random numbers of 18 bits.
    assert len(out.getvalue()) < 3.5 * len(times)
    assert len(read_trace(out.getvalue()).samples) == len(times)


def test_runs_take_little_more_than_what_they_say() -> None:
    pages, share = 1 << 16, 0.02
    random = np.random.default_rng(2)
    samples = []
    for tick in range(50):
        mask = random.random(pages) < share
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0])))).reshape(-1, 2)
        samples.append((0, tick, tick + 1, [(int(a), int(b - a), 1) for a, b in edges]))
    entropy = -pages * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8 * len(samples)
    data = written(trace_of([thing(0, pages)], samples))
    assert len(data) < 1.25 * entropy


def test_a_full_disk_ends_the_file_at_a_whole_frame() -> None:
    class Disk(io.BytesIO):
        room = 600

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            if not self.room:
                raise OSError(28, "No space left on device")
            part = data[: self.room]
            self.room -= len(part)
            return super().write(part)

    disk = Disk()
    writer = TraceWriter(disk)
    writer.add_object(thing(0))

    def fill() -> None:
        for tick in range(100):
            writer.add_sample(0, tick, tick + 1, np.array([(tick, 1, 1)], RUN_DTYPE))
            writer.flush()

    with pytest.raises(OSError, match="No space"):
        fill()
    disk.room = 10_000
    with pytest.raises(OSError, match="No space"):
        writer.close(100)
    trace = read_trace(disk.getvalue())
    assert not trace.complete
    assert 0 < len(trace.samples) < 100


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    code = """
        import os, sys
        import numpy as np
        from userfault._trace import TraceWriter, TracedObject, read_trace
        from userfault._trace._model import RUN_DTYPE
        writer = TraceWriter(sys.argv[1])
        writer.add_object(TracedObject(0, "a", 4096, 4096, "writes"))
        writer.add_sample(0, 0, 1, np.array([(0, 1, 1)], RUN_DTYPE))
        if not (pid := os.fork()):
            writer.add_sample(0, 1, 2, np.array([(0, 1, 1)], RUN_DTYPE))
            writer.close(5)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        writer.close(7)
        trace = read_trace(sys.argv[1])
        print(trace.duration_ns, len(trace.samples), trace.complete)
    """
    assert run_python(code, arguments=[str(tmp_path / "x.uft")]).check().split() == ["7", "1", "True"]
