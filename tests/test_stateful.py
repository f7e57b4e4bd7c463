"""Several memories at once, in any order of what can be done with them, against plain arrays."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil  # type: ignore[import-untyped,unused-ignore]
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import userfault
from support.page_sources import PatternSource, pattern
from support.page_stores import FileStore
from support.pagers import own_pager
from userfault.errors import BudgetError, ClosedError

KIB = 1 << 10
sizes = st.integers(1, 700_000)
blocks = st.sampled_from([4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB])
fractions = st.floats(0, 1)
READABLE = ("memory", "file", "zarr", "source")
WRITABLE = ("empty", "c", "r+", "w+", "store", "staged")
WRITTEN_BACK = ("r+", "w+", "store", "staged")
WORKED = ("source", "zarr", "store", "staged")


class Memories(RuleBasedStateMachine):
    """Arrays of all sources and modes: read, written, flushed, prefetched, evicted, squeezed, forked and closed.

    Their workers are killed now and then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.pager = own_pager(limit=8 << 20, linger_ns=10**11)
        self.pager.__enter__()
        self.arrays: dict[int, np.ndarray[Any, Any]] = {}
        self.right: dict[int, np.ndarray[Any, Any]] = {}
        self.kinds: dict[int, str] = {}
        self.count = 0

    arrays_of = Bundle("arrays")

    @initialize(target=arrays_of)
    def first(self) -> int:
        return self.opened("source", 200_000, 4 * KIB, False, False)

    @rule(
        target=arrays_of,
        kind=st.sampled_from(READABLE + WRITABLE),
        nbytes=sizes,
        block=blocks,
        own_budget=st.booleans(),
        direct=st.booleans(),
    )
    def make(self, kind: str, nbytes: int, block: int, own_budget: bool, direct: bool) -> int:
        return self.opened(kind, nbytes, block, own_budget, direct)

    def opened(self, kind: str, nbytes: int, block: int, own_budget: bool, direct: bool) -> int:
        number = self.count
        self.count += 1
        self.kinds[number] = kind
        right = np.frombuffer(pattern(0, nbytes, number), np.uint8)
        options: dict[str, Any] = {"block": block, "memory": 8 * block if own_budget else None}
        options["delivery"] = "direct" if direct else "thread"
        path = self.folder / str(number)
        if kind == "memory":
            array = userfault.open(right.copy(), **options)
        elif kind == "file":
            right.tofile(path)
            array = userfault.open(path, dtype="u1", **options)
        elif kind in ("c", "r+"):
            right = right.copy()
            right.tofile(path)
            mode: Literal["c", "r+"] = "c" if kind == "c" else "r+"
            array = userfault.open(path, dtype="u1", mode=mode, **options)
        elif kind == "w+":
            right = np.zeros(nbytes, np.uint8)
            array = userfault.open(path, dtype="u1", shape=(nbytes,), mode="w+", **options)
        elif kind in ("store", "staged"):
            right = right.copy()
            path.mkdir()
            store = FileStore(
                path, right.tobytes(), transactional=kind == "staged", concurrency=1 + number % 3
            )
            array = userfault.open(store, "r+", **options)
        elif kind == "empty":
            right = np.zeros(nbytes, np.uint8)
            array = userfault.empty(nbytes, np.uint8, **options)
        elif kind == "zarr":
            import zarr

            zarr.create_array(str(path), data=right, chunks=(min(nbytes, 33_333),))
            array = userfault.open(path, **options)
        else:
            array = userfault.open(PatternSource(nbytes, seed=number), **options)
        self.arrays[number], self.right[number] = array, right
        return number

    def stored(self, number: int) -> np.ndarray[Any, Any]:
        """Return what is in the file of an array that is written back."""
        path = self.folder / str(number)
        return np.fromfile(path / "content" if path.is_dir() else path, np.uint8)

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

    @rule(
        number=arrays_of,
        start=fractions,
        stop=fractions,
        step=st.sampled_from([1, 1, -1, 7, 4096]),
        value=st.integers(0, 255),
    )
    def write(self, number: int, start: float, stop: float, step: int, value: int) -> None:
        if self.kinds[number] not in WRITABLE:
            assert not self.arrays[number].flags.writeable
            return
        length = len(self.right[number])
        cut = slice(int(start * length), int(stop * length), step)
        # No two neighbours are alike, so that a byte in the wrong place shows.
        fresh = (np.arange(len(self.right[number][cut])) * 37 + value).astype(np.uint8)
        self.arrays[number][cut] = fresh
        self.right[number][cut] = fresh

    @rule(number=arrays_of)
    def flush(self, number: int) -> None:
        if self.kinds[number] not in WRITABLE:
            return
        userfault.memory_of(self.arrays[number]).flush()
        if self.kinds[number] in WRITTEN_BACK:
            assert np.array_equal(self.stored(number), self.right[number])

    @rule()
    def kill_a_worker(self) -> None:
        # One that has answered: after three that die before, a worker counts as one that does not start.
        sources = [number for number in self.arrays if self.kinds[number] in WORKED]
        for number in sources[:1]:
            memory = userfault.memory_of(self.arrays[number])
            memory.evict()
            assert self.arrays[number][0] == self.right[number][0]
            for worker in psutil.Process().children():
                with contextlib.suppress(psutil.Error, FileNotFoundError):  # it ended before
                    if "userfault.workers" in " ".join(worker.cmdline()):
                        worker.kill()
                        break

    @rule()
    def fork(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 70
            try:
                signal.alarm(100)
                good = True
                for number, array in self.arrays.items():
                    good &= np.array_equal(array, self.right[number])
                    if array.flags.writeable:
                        # The child's affair: the parent sees nothing of it.
                        array[::3000] ^= 0xFF
                        userfault.memory_of(array).evict()
                        good &= bool((array[::3000] == self.right[number][::3000] ^ 0xFF).all())
                status = 0 if good else 3
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

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
        right = self.right.pop(number)
        gc.collect()
        memory.close()
        if self.kinds[number] in WRITTEN_BACK:
            assert np.array_equal(self.stored(number), right)
        try:
            memory.prefetch()
        except ClosedError:
            return
        raise AssertionError("a closed memory was prefetched")

    @invariant()
    def counters_are_sane(self) -> None:
        told = userfault.pager_stats()
        assert told.memories == len(self.arrays)
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
assert settings.default is not None
_soaks = settings.default.max_examples > 1000
TestMemories.settings = settings(
    # In a soak an example takes some seconds: all of them are to end within its watchdog's hours.
    max_examples=settings.default.max_examples // 20 if _soaks else 14,
    stateful_step_count=100 if _soaks else 25,
    # The same sequences every time, but in a soak; and no shrinking, which takes longer than the watchdog lets a test.
    derandomize=not _soaks,
    phases=(Phase.generate, Phase.shrink) if _soaks else (Phase.generate,),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
