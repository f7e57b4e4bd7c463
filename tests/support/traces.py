"""Traces of made-up programs whose access patterns are known, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np

from userfault._trace import Cost, EventKind, Trace, TracedObject
from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE, SAMPLE_DTYPE, Watched

__all__ = ["MS", "PAGE", "TraceMaker", "matmul", "nothing", "paged", "stencil", "temporaries", "walk"]

MS = 1_000_000
PAGE = 4096


class TraceMaker:
    """Makes a trace, sample by sample, in any order."""

    def __init__(self) -> None:
        self._objects: list[TracedObject] = []
        self._samples: list[tuple[int, int, int, list[tuple[int, int, int]]]] = []
        self._events: list[tuple[int, int, int, int, int]] = []

    def add(self, name: str, nbytes: int, watched: Watched = "accesses", **facts: Any) -> TracedObject:
        facts.setdefault("granularity", PAGE)
        facts.setdefault("method", {"writes": "wp-async", "accesses": "drop", "faults": "blocks"}[watched])
        made = TracedObject(len(self._objects), name, nbytes, watched=watched, **facts)
        self._objects.append(made)
        return made

    def sample(
        self, made: TracedObject, start_ms: float, stop_ms: float, *runs: tuple[int, int, int]
    ) -> None:
        """Add a sample; a run is a first page, a number of pages, and 1 if they were written."""
        self._samples.append((made.id, round(start_ms * MS), round(stop_ms * MS), sorted(runs)))

    def event(
        self, made: TracedObject, at_ms: float, block: int, kind: EventKind, took_ms: float = 0
    ) -> None:
        self._events.append((made.id, round(at_ms * MS), round(took_ms * MS), block, kind))

    def build(self, duration_ms: float, **facts: Any) -> Trace:
        self._samples.sort(key=lambda sample: sample[2])
        samples, runs = [], []
        for number, start, stop, those in self._samples:
            samples.append((number, start, stop, len(runs), len(those)))
            runs += those
        events = np.array(self._events, EVENT_DTYPE)
        facts.setdefault("cost", Cost(round(duration_ms * MS * 0.004), round(duration_ms * MS), len(samples)))
        facts.setdefault("about", {"command": "python made-up.py"})
        return Trace(
            tuple(self._objects),
            np.array(samples, SAMPLE_DTYPE),
            np.array(runs, RUN_DTYPE),
            events[np.argsort(events["t_ns"], kind="stable")],
            round(duration_ms * MS),
            **facts,
        )


def stencil(steps: int = 20) -> Trace:
    """Two grids that are read and written in turn, and coefficients of which a part is read."""
    make = TraceMaker()
    a = make.add("a", 1024 * PAGE, dtype="float64", shape=(1024, 512))
    b = make.add("b", 1024 * PAGE, dtype="float64", shape=(1024, 512))
    coefficients = make.add("coefficients", 200 * PAGE, dtype="float64", shape=(102400,))
    for step in range(steps):
        start, stop = step * 100, step * 100 + 100
        new, old = (a, b) if step % 2 else (b, a)
        make.sample(new, start, stop, (0, 1, 0), (1, 1022, 1), (1023, 1, 0))
        make.sample(old, start, stop, (0, 1024, 0))
        make.sample(coefficients, start, stop, (50, 6, 0))
    return make.build(steps * 100)


def walk(steps: int = 40) -> Trace:
    """A random walk over neighbours, which is read, and counts, which are written."""
    make = TraceMaker()
    edges = make.add("edges", 4096 * PAGE, dtype="int32", shape=(4194304,))
    visits = make.add("visits", 256 * PAGE, dtype="int64", shape=(131072,))
    random = np.random.default_rng(3)
    at = 2000.0
    for step in range(steps):
        at = float(np.clip(at + random.normal(0, 220), 200, 3890))
        pages = np.unique(np.clip(random.normal(at, 80, 60), 0, 4095).astype(int))
        make.sample(edges, step * 50, step * 50 + 50, *((int(page), 1, 0) for page in pages))
        hot = np.unique(pages // 16)
        make.sample(visits, step * 50, step * 50 + 50, *((int(page), 1, 1) for page in hot))
    return make.build(steps * 50)


def matmul(steps: int = 32) -> Trace:
    """C = A B by blocks of rows: A is swept once, B is read over and over, C is written as it grows."""
    make = TraceMaker()
    left, right, result = (
        make.add(name, 512 * PAGE, dtype="float64", shape=(512, 512)) for name in ("A", "B", "C")
    )
    for step in range(steps):
        start, stop, rows = step * 25, step * 25 + 25, 512 // steps
        make.sample(left, start, stop, (step * rows, rows, 0))
        make.sample(right, start, stop, (0, 512, 0))
        make.sample(result, start, stop, (step * rows, rows, 1))
    return make.build(steps * 25)


def temporaries(count: int = 30) -> Trace:
    """A small result that stays, and temporaries of one size that come and go, one after another."""
    make = TraceMaker()
    total = make.add("total [bold]", 16 * PAGE, "writes", dtype="float64", shape=(8192,))
    for number in range(count):
        start = number * 20
        died = start + 18 if number < count - 1 else None
        made = make.add(
            "temporary",
            256 * PAGE,
            "writes",
            born_ns=start * MS,
            died_ns=died and died * MS,
            site="loop.py:4",
        )
        make.sample(made, start, start + 18, (0, 256, 1))
        make.sample(total, start, start + 20, (number % 16, 1, 1))
    return make.build(count * 20)


def paged(blocks: int = 256, budget: int = 64) -> Trace:
    """A memory within a budget: look-ups at random, then a scan with readahead, then a replayed part."""
    make = TraceMaker()
    buckets = [0] * 160
    buckets[76], buckets[78], buckets[82], buckets[86] = 40, 90, 20, 2
    latency = {"fault": {"count": 152, "sum_ns": 152 * MS, "buckets": buckets}}
    memory = make.add(
        "weights", blocks * 65536, "faults", granularity=65536, source="file weights.bin", latency=latency
    )
    random = np.random.default_rng(5)
    resident: list[int] = []

    def load(at: float, block: int, kind: EventKind, took: float) -> None:
        if block in resident:
            return
        if len(resident) == budget:
            make.event(memory, at, resident.pop(0), EventKind.EVICT)
        resident.append(block)
        make.event(memory, at, block, kind, took)

    for number, block in enumerate(random.integers(0, blocks, 80).tolist()):
        load(number * 10, block, EventKind.DEMAND, float(random.gamma(3, 0.4)))
    for block in range(blocks):
        kind = EventKind.DEMAND if block % 8 == 0 else EventKind.READAHEAD
        load(800 + block * 4, block, kind, float(random.gamma(3, 0.4)))
    for number, block in enumerate(range(40, 72)):
        load(1900 + number, block, EventKind.REPLAY, 0.5)
        make.event(memory, 1950 + number, block, EventKind.DIRTY)
    for number, block in enumerate(range(40, 72)):
        make.event(memory, 2050 + number, block, EventKind.WRITE, 2.0)
    return make.build(2200)


def nothing() -> Trace:
    """A recording of nothing at all."""
    return TraceMaker().build(0, cost=Cost())
