"""Resident bytes stay within the budget, as the kernel counts them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from support.page_sources import PatternSource, pattern
from support.pagers import own_pager
from support.smaps import resident_bytes
from support.waiting import wait_until
from userfault import pager
from userfault._cgroups import memory_limit
from userfault.errors import BudgetError
from userfault.memory import PagedMemory

BLOCK = 16 << 10
NBYTES = 32 << 20
MIB = 1 << 20
READERS = 3


def in_flight(memory: PagedMemory) -> int:
    """Return how many bytes may be on their way in while the budget is full.

    Each reader may wait for a block, and the fault thread and a prefetch may install an extent.
    """
    return READERS * memory.block + 2 * (2 << 20)


def holds_at_most(memory: PagedMemory, nbytes: int) -> bool:
    return memory.stats().resident_bytes <= nbytes


class Watch:
    """The most bytes of some memories that were resident at the same moment."""

    def __init__(self, memories: list[PagedMemory]) -> None:
        self._ranges = [(memory.address, memory.address + memory.nbytes) for memory in memories]
        self.peak = 0
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, resident_bytes(self._ranges))
            self.looks += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        wait_until(lambda: self.looks > 2, "the watch has looked")
        self._stop.set()
        self._thread.join()


@contextmanager
def readers(arrays: list[np.ndarray[Any, Any]]) -> Iterator[None]:
    """Have threads scan the arrays and look things up in them, at random."""
    wrong: list[str] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(300):
            array = arrays[rng.integers(len(arrays))]
            if step % 40 == 0:
                start = int(rng.integers(0, len(array) // 2))
                got, at, n = array[start : start + (4 << 20)].tobytes(), start, 4 << 20
            else:
                at, n = int(rng.integers(0, len(array) - 100)), 100
                got = array[at : at + n].tobytes()
            if got != pattern(at, n):
                wrong.append(f"bytes from {at} on")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(READERS)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()
    assert wrong == []


def open_some(kind: str, folder: Path, **options: Any) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any]
    if kind == "memory":
        array = userfault.open(np.frombuffer(pattern(0, NBYTES), np.uint8).copy(), block=BLOCK, **options)
    elif kind == "file":
        path = folder / "content"
        if not path.exists():
            path.write_bytes(pattern(0, NBYTES))
        array = userfault.open(path, dtype="u1", format="raw", block=BLOCK, **options)
    else:
        array = userfault.open(PatternSource(NBYTES), block=BLOCK, **options)
    return array


@pytest.mark.parametrize("kind", ["memory", "file", "source"])
def test_a_budget_of_its_own_is_kept(kind: str, tmp_path: Path) -> None:
    array = open_some(kind, tmp_path, memory="4 MiB")
    memory = userfault.memory_of(array)
    with Watch([memory]) as watch, readers([array]):
        pass
    stats = memory.stats()
    assert stats.evictions > 0
    assert 2 * MIB <= stats.resident_peak <= 4 * MIB + in_flight(memory)
    assert MIB < watch.peak <= 4 * MIB + in_flight(memory)
    # When nothing is on its way any more, the budget holds exactly.
    wait_until(lambda: memory.stats().resident_bytes <= 4 * MIB, "what was on its way has been evicted")
    assert resident_bytes([(memory.address, memory.address + memory.nbytes)]) <= 4 * MIB


def test_prefetch_keeps_the_budget(tmp_path: Path) -> None:
    array = open_some("memory", tmp_path, memory="4 MiB")
    memory = userfault.memory_of(array)
    with Watch([memory]) as watch:
        for start in range(0, NBYTES, 4 * MIB):
            memory.prefetch((start, start + 4 * MIB))
            assert array[start : start + 100].tobytes() == pattern(start, 100)
    assert watch.peak <= 4 * MIB + in_flight(memory)
    assert memory.stats().resident_peak <= 4 * MIB + in_flight(memory)


def _adds_up(memories: list[userfault.PagedMemory]) -> bool:
    together = userfault.pager_stats().resident_bytes
    return together == sum(memory.stats().resident_bytes for memory in memories)


def test_the_limit_of_the_process_holds_for_all_arrays_together(tmp_path: Path) -> None:
    with own_pager(limit=64 * MIB):
        assert userfault.limit() == 64 * MIB
        assert userfault.limit("6 MiB") == userfault.limit() == 6 * MIB
        arrays = [open_some(kind, tmp_path) for kind in ("memory", "file", "source")]
        arrays.append(open_some("memory", tmp_path, memory="3 MiB"))
        memories = [userfault.memory_of(array) for array in arrays]
        with Watch(memories) as watch, readers(arrays):
            pass
        flight = max(in_flight(memory) for memory in memories)
        assert watch.peak <= 6 * MIB + flight
        told = userfault.pager_stats()
        assert (told.limit, told.memories) == (6 * MIB, 4)
        assert told.resident_peak <= 6 * MIB + flight
        # Readahead may still bring blocks between the one look and the others.
        wait_until(partial(_adds_up, memories), "the pager's count is the sum of its memories'")
        del arrays, memories


def test_a_lower_limit_evicts(tmp_path: Path) -> None:
    with own_pager(limit=16 * MIB):
        array = open_some("memory", tmp_path)
        memory = userfault.memory_of(array)
        memory.prefetch((0, 16 * MIB))
        assert memory.stats().resident_bytes == 16 * MIB
        userfault.limit(4 * MIB)
        wait_until(partial(holds_at_most, memory, 4 * MIB), "the limit holds")
        assert resident_bytes([(memory.address, memory.address + memory.nbytes)]) <= 4 * MIB
        assert memory.budget == 4 * MIB
        assert array.tobytes() == pattern(0, NBYTES)
        userfault.limit(16 * MIB)
        memory.prefetch((0, 16 * MIB))
        assert memory.stats().resident_bytes == 16 * MIB
        del array, memory


def test_a_limit_lower_than_a_budget_counts(tmp_path: Path) -> None:
    with own_pager(limit=4 * MIB):
        array = open_some("memory", tmp_path, memory="16 MiB")
        memory = userfault.memory_of(array)
        assert memory.budget == 4 * MIB
        with pytest.raises(BudgetError, match="its budget holds 4 MiB"):
            memory.prefetch((0, 8 * MIB))
        assert array.tobytes() == pattern(0, NBYTES)
        assert memory.stats().resident_bytes <= 4 * MIB
        del array, memory


def test_a_limit_of_next_to_nothing_still_serves(tmp_path: Path) -> None:
    with own_pager(limit=16 * MIB):
        array = open_some("source", tmp_path)
        memory = userfault.memory_of(array)
        userfault.limit(1)
        # Eight blocks: one instruction may need more than one of them.
        assert array.tobytes() == pattern(0, NBYTES)
        wait_until(partial(holds_at_most, memory, 8 * BLOCK), "all but eight blocks were evicted")
        del array, memory


def test_an_array_that_is_used_again_and_again_survives_a_scan(tmp_path: Path) -> None:
    array = open_some("memory", tmp_path, memory="8 MiB", readahead=False)
    memory = userfault.memory_of(array)
    hot = array[: 2 * MIB : 4096]
    hot.sum()
    for start in range(4 * MIB, NBYTES, MIB):
        array[start : start + MIB : 4096].sum()
        hot.sum()
    before = memory.stats().faults
    hot.sum()
    # The scan went through the other part of the budget.
    assert memory.stats().faults - before < len(hot) // 8


@pytest.mark.parametrize("size", [-1, "-1 B", "much", 1.5, "5 XB", True, b"1"])
def test_a_limit_that_is_no_size_is_refused(size: Any) -> None:
    before = userfault.limit()
    with pytest.raises(BudgetError, match="limit: "):
        userfault.limit(size)
    assert userfault.limit() == before


def test_the_default_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USERFAULT_MEMORY", raising=False)
    monkeypatch.setattr(pager, "memory_limit", lambda: None)
    whole = pager.default_limit()
    assert whole > 0
    monkeypatch.setattr(pager, "memory_limit", lambda: 300 * MIB)
    assert pager.default_limit() == 150 * MIB
    monkeypatch.setattr(pager, "memory_limit", lambda: 1 << 60)
    assert pager.default_limit() == whole
    monkeypatch.setenv("USERFAULT_MEMORY", "77 MiB")
    assert pager.default_limit() == 77 * MIB
    monkeypatch.setenv("USERFAULT_MEMORY", "lots")
    with pytest.raises(BudgetError, match="USERFAULT_MEMORY: 'lots'"):
        pager.default_limit()


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "1000"}, 1000),
        ("0::/a/b\n", {"a/b/memory.max": "300", "a/memory.max": "500", "memory.max": "max"}, 300),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "500"}, 500),
        # As seen from inside a container: the path is not there, the group's own files are at the root.
        ("0::/system.slice/docker-1.scope\n", {"memory.max": "700"}, 700),
        (
            "12:cpu,cpuacct:/x\n5:memory:/job/1\n0::/\n",
            {"memory/job/1/memory.limit_in_bytes": "400", "memory/memory.limit_in_bytes": str(1 << 63)},
            400,
        ),
        ("5:hugetlb,memory:/\n", {"memory/memory.limit_in_bytes": "400"}, 400),
        ("0::/a\n", {"a/memory.max": "what"}, None),
        (None, {"memory.max": "700"}, None),
    ],
    ids=str,
)
def test_the_limit_of_control_groups(
    cgroup: str | None, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    if cgroup is not None:
        membership.write_text(cgroup)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert memory_limit(str(root), str(membership)) == limit
