"""Several memories at once, in any order of what can be done with them, against plain arrays."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import userfault
from support.page_sources import PatternSource, pattern
from support.pagers import own_pager
from userfault.errors import BudgetError, ClosedError

KIB = 1 << 10
sizes = st.integers(1, 700_000)
blocks = st.sampled_from([4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB])
fractions = st.floats(0, 1)


class Memories(RuleBasedStateMachine):
    """Arrays of all sources, which are read, scanned, prefetched, evicted, squeezed and closed."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.pager = own_pager(limit=8 << 20, linger_ns=10**11)
        self.pager.__enter__()
        self.arrays: dict[int, np.ndarray[Any, Any]] = {}
        self.right: dict[int, np.ndarray[Any, Any]] = {}
        self.count = 0

    arrays_of = Bundle("arrays")

    @initialize(target=arrays_of)
    def first(self) -> int:
        return self.opened("source", 200_000, 4 * KIB, False)

    @rule(
        target=arrays_of,
        kind=st.sampled_from(["memory", "file", "zarr", "source"]),
        nbytes=sizes,
        block=blocks,
        own_budget=st.booleans(),
    )
    def make(self, kind: str, nbytes: int, block: int, own_budget: bool) -> int:
        return self.opened(kind, nbytes, block, own_budget)

    def opened(self, kind: str, nbytes: int, block: int, own_budget: bool) -> int:
        number = self.count
        self.count += 1
        right = np.frombuffer(pattern(0, nbytes, number), np.uint8)
        options: dict[str, Any] = {"block": block, "memory": 8 * block if own_budget else None}
        path = self.folder / str(number)
        if kind == "memory":
            array = userfault.open(right.copy(), **options)
        elif kind == "file":
            right.tofile(path)
            array = userfault.open(path, dtype="u1", **options)
        elif kind == "zarr":
            import zarr

            zarr.create_array(str(path), data=right, chunks=(min(nbytes, 33_333),))
            array = userfault.open(path, **options)
        else:
            array = userfault.open(PatternSource(nbytes, seed=number), **options)
        self.arrays[number], self.right[number] = array, right
        return number

    @rule(number=arrays_of, place=fractions)
    def read_one(self, number: int, place: float) -> None:
        at = int(place * (len(self.right[number]) - 1))
        assert self.arrays[number][at] == self.right[number][at]

    @rule(
        number=arrays_of,
        start=fractions,
        stop=fractions,
        step=st.sampled_from([1, 1, 1, -1, 7, 4096, -5000, 70_000]),
    )
    def read_some(self, number: int, start: float, stop: float, step: int) -> None:
        length = len(self.right[number])
        cut = slice(int(start * length), int(stop * length), step)
        assert np.array_equal(self.arrays[number][cut], self.right[number][cut])

    @rule(number=arrays_of)
    def read_all(self, number: int) -> None:
        assert np.array_equal(self.arrays[number], self.right[number])

    @rule(number=arrays_of, start=fractions, stop=fractions, wait=st.booleans())
    def prefetch(self, number: int, start: float, stop: float, wait: bool) -> None:
        memory = userfault.memory_of(self.arrays[number])
        low, high = sorted((int(start * memory.nbytes), int(stop * memory.nbytes)))
        try:
            memory.prefetch((low, high), wait=wait)
        except BudgetError:
            assert high - low + 2 * memory.block > memory.budget

    @rule(number=arrays_of, start=fractions, stop=fractions)
    def evict(self, number: int, start: float, stop: float) -> None:
        memory = userfault.memory_of(self.arrays[number])
        low, high = sorted((int(start * memory.nbytes), int(stop * memory.nbytes)))
        assert memory.evict((low, high)) <= (high - low) + 2 * memory.block

    @rule(number=arrays_of, advice=st.sampled_from(["normal", "random", "sequential"]))
    def advise(self, number: int, advice: Any) -> None:
        userfault.memory_of(self.arrays[number]).advise(advice)

    @rule(size=st.sampled_from([2 << 20, 3 << 20, 8 << 20, 1 << 30]))
    def limit(self, size: int) -> None:
        assert userfault.limit(size) == size

    @rule(number=consumes(arrays_of))
    def close(self, number: int) -> None:
        memory = userfault.memory_of(self.arrays.pop(number))
        del self.right[number]
        gc.collect()
        memory.close()
        try:
            memory.prefetch()
        except ClosedError:
            return
        raise AssertionError("a closed memory was prefetched")

    @invariant()
    def counters_are_sane(self) -> None:
        told = userfault.pager_stats()
        assert told.memories == len(self.arrays)
        assert told.workers_lost == 0
        for array in self.arrays.values():
            stats = userfault.memory_of(array).stats()
            assert stats.error_count == stats.poisoned_blocks == stats.retries == 0

    def teardown(self) -> None:
        wrong = [
            number for number in self.arrays if not np.array_equal(self.arrays[number], self.right[number])
        ]
        self.arrays.clear()
        self.pager.__exit__(None, None, None)
        shutil.rmtree(self.folder)
        assert wrong == []


TestMemories = Memories.TestCase
TestMemories.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
