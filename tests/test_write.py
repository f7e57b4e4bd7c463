"""Memory that can be written: where changes go, and when they are durable."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.page_sources import PatternSource
from support.written import (
    BLOCK,
    BLOCKS,
    CLEAN,
    CONTENT,
    DIRTY,
    NBYTES,
    changed,
    invert,
    mapped,
    matrix,
    new_file,
    new_store,
    of_file,
)
from userfault.errors import (
    ExportedError,
    RangeError,
)
from userfault.memory import Mode, PagedMemory
from userfault.sources._native import FileData, MemoryData, ZeroData
from userfault.sources._own import SourceRecipe
from userfault.sources._worker_data import WorkerData


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return new_file(tmp_path)


@pytest.mark.parametrize(("mode", "writable"), [("r", False), ("r+", True), ("c", True), ("w+", True)])
def test_the_buffer_is_writable_as_the_mode_says(file: Path, mode: Mode, writable: bool) -> None:
    with of_file(file, mode) as memory:
        assert (memory.mode, memory.writable, memory.delivery) == (mode, writable, "thread")
        with memoryview(memory) as view:
            assert view.readonly is not writable
        assert np.frombuffer(memory, np.uint8).flags.writeable is writable


def test_a_flushed_file_has_every_change_and_nothing_else(file: Path) -> None:
    with of_file(file) as memory:
        invert(memory, 0, 7, BLOCKS - 1)
        assert memory.stats().dirty_bytes == 3 * BLOCK
        memory.flush()
        assert file.read_bytes() == b"head" + changed(0, 7, BLOCKS - 1) + b"tail"
        stats = memory.stats()
        assert (stats.dirty_bytes, stats.blocks_written, stats.bytes_written) == (0, 3, 3 * BLOCK)
        assert stats.upgrades >= 1
        assert stats.latency["write"].count >= 1
        # A second flush has nothing to do, and a change after it is one again.
        memory.flush()
        assert memory.stats().blocks_written == 3
        invert(memory, 7)
        memory.flush()
        assert file.read_bytes() == b"head" + changed(0, BLOCKS - 1) + b"tail"
        assert memory.stats().blocks_written == 4


def test_a_part_can_be_flushed(file: Path) -> None:
    with of_file(file) as memory:
        invert(memory, 3, 20)
        memory.flush(matrix(memory)[3])
        assert file.read_bytes() == b"head" + changed(3) + b"tail"
        assert memory.residency()[[3, 20]].tolist() == [CLEAN, DIRTY]
        memory.flush((0, 0))
        assert memory.stats().dirty_bytes == BLOCK
        with pytest.raises(RangeError):
            memory.flush((0, NBYTES + 1))


def test_closing_writes_back(file: Path) -> None:
    with of_file(file) as memory:
        invert(memory, 5)
        array = matrix(memory)
        with pytest.raises(ExportedError):
            memory.close()
        del array
    assert memory.closed
    assert file.read_bytes() == b"head" + changed(5) + b"tail"


def test_evicting_writes_back(file: Path) -> None:
    with of_file(file) as memory:
        invert(memory, 5, 6)
        assert memory.evict((5 * BLOCK, 7 * BLOCK)) == 2 * BLOCK
        assert file.read_bytes() == b"head" + changed(5, 6) + b"tail"
        assert (memory.residency() == DIRTY).sum() == 0
        with memoryview(memory) as view:
            assert view == changed(5, 6)


@pytest.mark.parametrize("kind", ["file", "store", "staged"])
def test_more_is_written_than_the_budget_holds(kind: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = new_store(tmp_path / "store", transactional=kind == "staged")
    memory = (
        of_file(file, memory=8 * BLOCK)
        if kind == "file"
        else mapped(store, block=BLOCK, memory=8 * BLOCK, readahead=False)
    )
    with memory:
        invert(memory, *range(BLOCKS))
        assert memory.stats().evictions > 0
        memory.flush()
        assert memory.stats().resident_peak <= 8 * BLOCK + 4 * BLOCK
        with memoryview(memory) as view:
            assert view == changed(*range(BLOCKS))
        right = changed(*range(BLOCKS))
        assert (file.read_bytes()[4:-4] if kind == "file" else store.content()) == right


@pytest.mark.parametrize("kind", ["file", "memory", "zero", "worker"])
def test_private_changes_stay_private_and_survive_eviction(kind: str, file: Path) -> None:
    source: Any = {
        "file": FileData(str(file), 4, NBYTES),
        "memory": MemoryData(CONTENT, 0, NBYTES),
        "zero": ZeroData(NBYTES),
        "worker": WorkerData(SourceRecipe(PatternSource(NBYTES))),
    }[kind]
    right = (
        np.frombuffer(bytes(NBYTES) if kind == "zero" else CONTENT, np.uint8).reshape(BLOCKS, BLOCK).copy()
    )
    right[::2] ^= 0xFF
    with PagedMemory(source, name=kind, block=BLOCK, memory=8 * BLOCK, mode="c") as memory:
        array = matrix(memory)
        for block in range(0, BLOCKS, 2):
            array[block] ^= 0xFF
        memory.flush()  # does nothing
        memory.evict()
        assert memory.stats().scratch_bytes > 0
        assert np.array_equal(array, right)
        del array
    assert file.read_bytes() == b"head" + CONTENT + b"tail"


def test_a_store_is_written_then_flushed(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with mapped(store) as memory:
        assert memory.description is not None
        assert (memory.description.writable, memory.description.transactional) == (True, False)
        invert(memory, 1, 4)
        assert store.log() == []
        memory.flush()
        log = store.log()
        assert sorted(log[:-1]) == [("write", BLOCK, BLOCK), ("write", 4 * BLOCK, BLOCK)]
        assert log[-1] == ("flush", 0, 0)
        assert store.content() == changed(1, 4)


def test_a_transactional_store_changes_only_when_flushed(tmp_path: Path) -> None:
    store = new_store(tmp_path, transactional=True)
    with mapped(store) as memory:
        invert(memory, 1, 2)
        memory.evict()
        with memoryview(memory) as view:
            assert view == changed(1, 2)
        assert store.content() == CONTENT
        memory.flush()
        assert store.content() == changed(1, 2)
        invert(memory, 2)
        memory.flush()
        assert store.content() == changed(1)
        assert [what for what, _, _ in store.log()].count("flush") == 2


def test_blocks_of_a_unit_are_written_together(tmp_path: Path) -> None:
    store = new_store(tmp_path, write_unit=4 * BLOCK - 5)
    with mapped(store) as memory:
        invert(memory, *range(2, 7))
        memory.flush()
        assert store.content() == changed(*range(2, 7))
        # Units begin at multiples of their length, here four blocks.
        assert sorted(store.log()[:-1]) == [("write", 2 * BLOCK, 2 * BLOCK), ("write", 4 * BLOCK, 3 * BLOCK)]


def test_the_last_array_takes_its_changes_to_the_file(file: Path) -> None:
    memory = of_file(file)
    invert(memory, 2)
    cycle: list[Any] = [matrix(memory)]
    cycle.append(cycle)
    gone = weakref.ref(memory)
    del memory, cycle
    gc.collect()
    assert gone() is None
    assert file.read_bytes() == b"head" + changed(2) + b"tail"


def test_a_read_only_memory_has_nothing_to_flush(file: Path) -> None:
    with of_file(file, "r") as memory:
        memory.flush()
        assert memory.stats().blocks_written == 0
        with memoryview(memory) as view, pytest.raises(TypeError, match="cannot modify read-only memory"):
            view[0] = 1
        array = matrix(memory)
        with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
            array.flags.writeable = True
        del array
