"""Traces made by hand, and by chance; and a reader of trace files that knows docs/trace-format.md only."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from userfault._trace import Cost, Trace, TracedObject
from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE, SAMPLE_DTYPE

__all__ = [
    "PAGE",
    "anything",
    "by_the_document",
    "looks",
    "page_bytes",
    "same",
    "sampled",
    "thing",
    "trace_of",
]

PAGE = 4096
Sample = tuple[int, int, int, Sequence[tuple[int, int, int]]]
"""Object, start, stop, runs of (page, count, written)."""


def thing(number: int = 0, pages: int = 8, watched: Any = "accesses", **more: Any) -> TracedObject:
    facts: dict[str, Any] = {"name": f"o{number}", "nbytes": pages * PAGE, "granularity": PAGE, **more}
    return TracedObject(id=number, watched=watched, **facts)


def trace_of(
    things: Sequence[TracedObject],
    samples: Iterable[Sample] = (),
    events: Iterable[tuple[int, int, int, int, int]] = (),
    **more: Any,
) -> Trace:
    """Make a trace of samples and of events (object, t_ns, took_ns, block, kind)."""
    rows, runs = [], []
    for number, start, stop, touched in samples:
        rows.append((number, start, stop, len(runs), len(touched)))
        runs += touched
    made = np.array(list(events), EVENT_DTYPE)
    ends = [row[2] for row in rows] + made["t_ns"].tolist()
    more.setdefault("duration_ns", max(ends, default=0))
    return Trace(tuple(things), np.array(rows, SAMPLE_DTYPE), np.array(runs, RUN_DTYPE), made, **more)


def same(one: Trace, other: Trace) -> bool:
    """Whether two traces are equal in everything."""
    tables = all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("samples", "runs", "events")
    )
    plain = ("objects", "duration_ns", "started_ns", "lost", "cost", "about", "complete")
    return tables and all(getattr(one, name) == getattr(other, name) for name in plain)


_TIMES = st.integers(0, 2**61)
_U32 = st.integers(0, 2**32 - 1)
_TEXT = st.text(max_size=8)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_HISTOGRAM = st.fixed_dictionaries(
    {"count": _U32, "sum_ns": _TIMES, "buckets": st.lists(st.integers(0, 99), max_size=5)}
)


@st.composite
def _objects(draw: st.DrawFn, number: int) -> TracedObject:
    return TracedObject(
        id=number,
        name=draw(_TEXT),
        nbytes=draw(st.integers(1, 2**50)),
        granularity=draw(st.sampled_from([4096, 1 << 21])),
        watched=draw(st.sampled_from(["writes", "accesses", "faults"])),
        method=draw(_TEXT),
        lead=draw(st.integers(0, 4095)),
        dtype=draw(_TEXT),
        shape=tuple(draw(st.lists(_U32, max_size=3))),
        site=draw(_TEXT),
        source=draw(_TEXT),
        born_ns=draw(_TIMES),
        died_ns=draw(st.none() | _TIMES),
        latency=draw(st.dictionaries(_TEXT, _HISTOGRAM, max_size=2)),
        tells_writes=draw(st.booleans()),
    )


@st.composite
def _runs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    edges = sorted(draw(st.lists(_U32, max_size=12, unique=True)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return [(first, stop - first, draw(st.integers(0, 1))) for first, stop in pairs]


@st.composite
def anything(draw: st.DrawFn) -> Trace:
    """A trace of anything that the model allows."""
    count = draw(st.integers(0, 4))
    things = [draw(_objects(number)) for number in range(count)]
    samples: list[Sample] = []
    events: list[tuple[int, int, int, int, int]] = []
    if count:
        numbers = st.integers(0, count - 1)
        times = st.tuples(_TIMES, _TIMES).map(sorted)
        for start, stop in sorted(draw(st.lists(times, max_size=20)), key=lambda pair: pair[1]):
            samples.append((draw(numbers), start, stop, draw(_runs())))
        at = sorted(draw(st.lists(_TIMES, max_size=20)))
        events += [(draw(numbers), t_ns, draw(_U32), draw(_U32), draw(st.integers(1, 8))) for t_ns in at]
    return trace_of(
        things,
        samples,
        events,
        duration_ns=draw(_TIMES),
        started_ns=draw(_TIMES),
        lost=draw(_U32),
        cost=Cost(*(draw(_TIMES) for _ in range(4))),
        about=draw(st.dictionaries(_TEXT, _JSON, max_size=3)),
    )


@st.composite
def sampled(draw: st.DrawFn) -> Trace:
    """A trace of a few pages that were looked at a few times: small enough to count everything by hand."""
    things = []
    for number in range(draw(st.integers(1, 2))):
        pages, lead = draw(st.integers(1, 12)), draw(st.integers(0, PAGE - 1))
        nbytes = max(1, pages * PAGE - lead - draw(st.integers(0, PAGE - 1)))
        pages = -(-(lead + nbytes) // PAGE)
        things.append(thing(number, lead=lead, nbytes=nbytes))
    samples: list[Sample] = []
    for known in things:
        now = draw(st.integers(0, 20))
        for _ in range(draw(st.integers(1, 6))):
            stop = now + draw(st.integers(1, 30))
            touched = draw(st.lists(st.integers(0, 2), min_size=known.pages, max_size=known.pages))
            runs = [(page, 1, how - 1) for page, how in enumerate(touched) if how]
            samples.append((known.id, now, stop, runs))
            now = stop + draw(st.sampled_from([0, 0, 5]))
    return trace_of(things, sorted(samples, key=lambda sample: sample[2]))


def looks(trace: Trace, known: TracedObject, kind: str = "accessed") -> list[tuple[int, int, set[int]]]:
    """Return start, stop, and the pages that were touched, of each sample of an object."""
    wanted = {"accessed": (0, 1), "written": (1,), "read_only": (0,)}[kind]
    found = []
    for number, start, stop, first, count in trace.samples.tolist():
        if number == known.id:
            runs = trace.runs[first : first + count].tolist()
            pages = {page + i for page, n, written in runs if written in wanted for i in range(n)}
            found.append((start, stop, pages))
    return found


def page_bytes(known: TracedObject, page: int) -> int:
    """Return how many of the object's bytes lie on a page."""
    start = page * known.granularity - known.lead
    return min(start + known.granularity, known.nbytes) - max(start, 0)


def by_the_document(data: bytes) -> dict[str, Any]:
    """Read a trace file as docs/trace-format.md says, word by word and with none of userfault's code."""
    assert data[:8] == bytes.fromhex("89554654 0D0A1A0A")
    major, minor, zero = struct.unpack("<HHI", data[8:16])
    assert (major, minor, zero) == (1, 0, 0)
    at = 16
    found: dict[str, Any] = {"about": {}, "objects": {}, "samples": [], "events": []}
    while at < len(data):
        kind, flags, zero, length, crc, head_crc = struct.unpack("<BBHIII", data[at : at + 16])
        assert zlib.crc32(data[at : at + 12]) == head_crc
        stored = data[at + 16 : at + 16 + length]
        assert len(stored) == length
        assert zlib.crc32(stored) == crc
        payload = zlib.decompress(stored) if flags & 1 else stored
        at += 16 + length
        if kind == 1:
            facts = json.loads(payload.decode("utf-8"))
            found["about"].update(facts["about"])
            found.setdefault("started_ns", facts.get("started_ns"))
        elif kind == 2:
            facts = json.loads(payload.decode("utf-8"))
            found["objects"][facts["id"]] = facts
        elif kind == 3:
            facts = json.loads(payload.decode("utf-8"))
            found["objects"][facts["id"]].update(facts)
        elif kind == 4:
            found["samples"] += _Cursor(payload).samples()
        elif kind == 5:
            found["events"] += _Cursor(payload).events()
        elif kind in (6, 7):
            found.update(json.loads(payload.decode("utf-8")))
            found["whole"] = kind == 7
    found["samples"].sort(key=lambda sample: sample[2])
    found["events"].sort(key=lambda event: event[1])
    return found


class _Cursor:
    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.payload[self.at - 1]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value += (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def column(self, length: int) -> list[int]:
        if length == 0:
            return []
        form = self.byte()
        width, differences = form % 16, form & 16
        values = []
        if differences:
            values.append(self.number())
            length -= 1
        base = self.number()
        scale = self.number()
        planes = [[self.byte() for _ in range(length)] for _ in range(width)]
        for i in range(length):
            unsigned = sum(plane[i] << (8 * k) for k, plane in enumerate(planes))
            value = base + scale * unsigned
            values.append(values[-1] + value if differences else value)
        return values

    def samples(self) -> list[Sample]:
        n, m, base = self.number(), self.number(), self.number()
        objects, stops, waits, counts = (self.column(n) for _ in range(4))
        steps, lengths, written = (self.column(m) for _ in range(3))
        before: dict[int, int] = {}
        samples, run = [], 0
        for number, stop, wait, count in zip(objects, stops, waits, counts, strict=True):
            start = before.get(number, base) + wait
            before[number] = stop
            runs, page = [], 0
            for _ in range(count):
                page += steps[run]
                runs.append((page, lengths[run], written[run]))
                page += lengths[run]
                run += 1
            samples.append((number, start, stop, runs))
        assert self.at == len(self.payload)
        return samples

    def events(self) -> list[tuple[int, ...]]:
        n = self.number()
        events = list(zip(*(self.column(n) for _ in range(5)), strict=True))
        assert self.at == len(self.payload)
        return events
