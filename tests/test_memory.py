"""PagedMemory: what is loaded, what leaves, what is counted, and how it ends."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from support import run_python
from support.page_sources import PatternSource, pattern
from support.waiting import wait_until
from userfault.errors import (
    BudgetError,
    ClosedError,
    ExportedError,
    KernelError,
    RangeError,
    SourceNotFoundError,
    TruncatedError,
)
from userfault.memory import PagedMemory, find
from userfault.sources._native import FileData, MemoryData, ZeroData
from userfault.sources._own import SourceRecipe
from userfault.sources._worker_data import WorkerData

PAGE = os.sysconf("SC_PAGE_SIZE")
BLOCK = 16 << 10
BLOCKS = 64
NBYTES = BLOCKS * BLOCK
CONTENT = pattern(0, NBYTES)
RESIDENT = 2


def mapped(content: bytes = CONTENT, **options: Any) -> PagedMemory:
    return PagedMemory(MemoryData(content, 0, len(content)), name="content", **{"block": BLOCK, **options})


def settle(memory: PagedMemory) -> None:
    """Wait until nothing is under way: a reader is woken a moment before its block counts as resident."""
    wait_until(lambda: not np.isin(memory.residency(), (1, 5)).any(), "nothing is loading or leaving")


def resident(memory: PagedMemory) -> list[int]:
    settle(memory)
    return np.flatnonzero(memory.residency() == RESIDENT).tolist()


def matrix(memory: PagedMemory) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the memory as an array with a block in each row."""
    return np.frombuffer(memory, np.uint8).reshape(BLOCKS, BLOCK)


def test_its_bytes_are_those_of_the_source() -> None:
    with mapped(readahead=False) as memory:
        assert (memory.nbytes, memory.block, memory.nblocks) == (NBYTES, BLOCK, BLOCKS)
        assert resident(memory) == []
        with memoryview(memory) as view:
            assert (view.readonly, view.format, view.nbytes) == (True, "B", NBYTES)
            assert view[5 * BLOCK + 7] == CONTENT[5 * BLOCK + 7]
            assert resident(memory) == [5]
            assert view == CONTENT
        assert resident(memory) == list(range(BLOCKS))


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, BLOCK, 3 * BLOCK + 5, (2 << 20) + 17])
@pytest.mark.parametrize("kind", ["memory", "file", "worker", "zero"])
def test_the_last_block_may_be_cut_short(kind: str, nbytes: int, tmp_path: Path) -> None:
    content = pattern(0, nbytes)
    source: Any
    if kind == "memory":
        source = MemoryData(b"head" + content, 4, nbytes)
    elif kind == "file":
        (tmp_path / "file").write_bytes(b"head" + content + b"tail")
        source = FileData(str(tmp_path / "file"), 4, nbytes)
    elif kind == "worker":
        source = WorkerData(SourceRecipe(PatternSource(nbytes)))
    else:
        content, source = bytes(nbytes), ZeroData(nbytes)
    with PagedMemory(source, name=kind, block=BLOCK) as memory:
        with memoryview(memory) as view:
            assert view == content
        # What lies between the last byte and the end of its page is nobody's, but always zeros.
        memory.evict()
        memory.prefetch()
        with memoryview(memory) as view:
            assert view == content
        assert memory.stats().resident_bytes == memory.nblocks * BLOCK


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        (None, range(BLOCKS)),
        ((0, 0), []),
        ((0, 1), [0]),
        ((BLOCK - 1, BLOCK + 1), [0, 1]),
        ((BLOCK, 2 * BLOCK), [1]),
        ((NBYTES - 1, NBYTES), [BLOCKS - 1]),
        ((NBYTES, NBYTES), []),
        (slice(3 * BLOCK, 5 * BLOCK), [3, 4]),
        (slice(-BLOCK, None), [BLOCKS - 1]),
        (slice(None, 1), [0]),
        (slice(NBYTES - 1, 10 * NBYTES), [BLOCKS - 1]),
        (slice(10, 5), []),
        (range(2 * BLOCK, 2 * BLOCK + 1), [2]),
        (range(5, 5), []),
    ],
)
@pytest.mark.parametrize("kind", ["memory", "worker"])
def test_prefetch_loads_the_blocks_of_a_range(kind: str, where: Any, blocks: Any) -> None:
    source = (
        MemoryData(CONTENT, 0, NBYTES)
        if kind == "memory"
        else WorkerData(SourceRecipe(PatternSource(NBYTES)))
    )
    with PagedMemory(source, name=kind, block=BLOCK) as memory:
        memory.prefetch(where)
        assert resident(memory) == list(blocks)
        stats = memory.stats()
        assert (stats.faults, stats.blocks_prefetch) == (0, len(blocks))
        with memoryview(memory) as view:
            assert all(
                view[b * BLOCK : (b + 1) * BLOCK] == CONTENT[b * BLOCK : (b + 1) * BLOCK] for b in blocks
            )
        assert memory.stats().faults == 0
        assert memory.evict(where) == len(blocks) * BLOCK
        assert resident(memory) == []


@pytest.mark.parametrize(
    ("cut", "blocks"),
    [
        (lambda m: m, range(BLOCKS)),
        (lambda m: m[7], [7]),
        (lambda m: m[7, 3:4], [7]),
        (lambda m: m[7:9, 5:6], [7, 8]),
        (lambda m: m[::8], range(0, BLOCKS, 8)),
        (lambda m: m[::-8], range(BLOCKS - 1, -1, -8)),
        (lambda m: m[60::-20, ::-1], [0, 20, 40, 60]),
        (lambda m: m[10:20:5, 100:200].T, [10, 15]),
        (lambda m: m.reshape(4, 16, BLOCK)[:, 3, :10], [3, 19, 35, 51]),
        (lambda m: m.reshape(4, 16, BLOCK)[::2, ::-15], [0, 15, 32, 47]),
        (lambda m: m[3:3], []),
        (lambda m: m[5].view("<f8")[:1], [5]),
        (lambda m: np.lib.stride_tricks.as_strided(m[9], (1000, 1000), (0, 0)), [9]),
        (lambda m: np.broadcast_to(m[11, :4], (3, 4)), [11]),
        (lambda m: np.lib.stride_tricks.sliding_window_view(m[20:22].ravel(), 100), [20, 21]),
    ],
)
def test_prefetch_loads_the_blocks_of_a_view(cut: Any, blocks: Any) -> None:
    memory = mapped()
    view = cut(matrix(memory))
    memory.prefetch(view)
    assert resident(memory) == sorted(blocks)
    before = memory.stats().faults
    expected = np.array(cut(np.frombuffer(CONTENT, np.uint8).reshape(BLOCKS, BLOCK)))
    assert np.array_equal(view, expected)
    assert memory.stats().faults == before
    memory.evict(view)
    assert resident(memory) == []


def test_a_view_of_too_many_pieces_is_taken_from_its_first_byte_to_its_last() -> None:
    nbytes = 1 << 23
    with PagedMemory(ZeroData(nbytes), name="zeros", block=1 << 20) as memory:
        every_fourth = np.frombuffer(memory, np.uint8)[1 << 20 : 7 << 20 : 4]
        memory.prefetch(every_fourth)
        assert resident(memory) == [1, 2, 3, 4, 5, 6]
        del every_fourth


@pytest.mark.parametrize(
    "where",
    [
        (-1, 5),
        (0, NBYTES + 1),
        (5, 4),
        (1, 2, 3),
        (1,),
        slice(0, 10, 2),
        range(0, 10, 3),
        range(10, 0, -1),
        range(NBYTES, NBYTES + 1),
        np.zeros(3),
        np.zeros((2, 2))[::-1],
    ],
)
def test_a_bad_range_is_refused(where: Any) -> None:
    with mapped() as memory:
        for call in (memory.prefetch, memory.populate, memory.evict):
            with pytest.raises(RangeError, match=r"bytes|step 1|view"):
                call(where)
        assert resident(memory) == []


@pytest.mark.parametrize("where", [5, "all", 1.5, [1, 2], {1}])
def test_what_is_no_range_is_refused(where: Any) -> None:
    with mapped() as memory, pytest.raises(TypeError, match="says no part of a memory"):
        memory.prefetch(where)


def test_a_view_of_another_memory_is_refused() -> None:
    with mapped() as memory, mapped() as other:
        view = matrix(other)[3]
        with pytest.raises(RangeError, match="not a view of content"):
            memory.prefetch(view)
        del view


def test_prefetch_again_reads_nothing_twice() -> None:
    with mapped() as memory:
        memory.prefetch((0, 4 * BLOCK))
        memory.prefetch((2 * BLOCK, 6 * BLOCK))
        memory.prefetch()
        assert memory.stats().bytes_read == NBYTES


@pytest.mark.parametrize("kind", ["memory", "worker"])
def test_prefetch_in_the_background(kind: str) -> None:
    source = (
        MemoryData(CONTENT, 0, NBYTES)
        if kind == "memory"
        else WorkerData(SourceRecipe(PatternSource(NBYTES)))
    )
    with PagedMemory(source, name=kind, block=BLOCK) as memory:
        memory.prefetch((0, 8 * BLOCK), wait=False)
        memory.prefetch((0, 8 * BLOCK))
        assert resident(memory) == list(range(8))
        assert memory.stats().bytes_read == 8 * BLOCK


def test_more_than_the_budget_is_refused_before_anything_is_read() -> None:
    with mapped(memory=8 * BLOCK) as memory:
        for call in (memory.prefetch, memory.populate):
            with pytest.raises(
                BudgetError, match=r"prefetch of 144 KiB of content: its budget holds 128 KiB"
            ):
                call((0, 9 * BLOCK))
        assert memory.stats().bytes_read == 0
        memory.prefetch((0, 8 * BLOCK))
        assert resident(memory) == list(range(8))


def test_populate_makes_all_of_it_resident() -> None:
    with mapped(memory=16 * BLOCK) as memory:
        memory.prefetch((40 * BLOCK, 56 * BLOCK))
        memory.populate((0, 16 * BLOCK))
        assert resident(memory) == list(range(16))


def test_evicted_blocks_are_read_again() -> None:
    with mapped(readahead=False) as memory, memoryview(memory) as view:
        assert view[BLOCK] == CONTENT[BLOCK]
        settle(memory)
        assert memory.evict((0, NBYTES)) == BLOCK
        assert memory.evict() == 0
        assert memory.stats().resident_bytes == 0
        assert view[BLOCK : 2 * BLOCK] == CONTENT[BLOCK : 2 * BLOCK]
        assert memory.stats().blocks_demand == 2
        assert memory.stats().evictions == 1


def test_evict_in_the_middle_of_an_extent() -> None:
    nbytes = 6 << 20
    content = pattern(0, nbytes)
    with mapped(content, block=64 << 10) as memory:
        memory.prefetch()
        extents = memory.stats().bytes_extent
        assert memory.evict(((2 << 20) + 1, (2 << 20) + 2)) == 64 << 10
        assert resident(memory) == [b for b in range(96) if b != 32]
        with memoryview(memory) as view:
            assert view == content
        assert memory.stats().bytes_read == nbytes + (64 << 10)
        assert not memory.extents or extents == nbytes


def test_random_advice_reads_nothing_ahead() -> None:
    with mapped() as memory, memoryview(memory) as view:
        memory.advise("random")
        assert bytes(view) == CONTENT
        assert memory.stats().blocks_readahead == 0
        assert memory.stats().faults == memory.stats().blocks_demand == BLOCKS


def test_a_scan_is_read_ahead() -> None:
    with mapped() as memory, memoryview(memory) as view:
        assert bytes(view) == CONTENT
        stats = memory.stats()
        assert stats.blocks_read == BLOCKS
        assert stats.faults < BLOCKS


def test_sequential_advice_reads_ahead_from_the_first_fault() -> None:
    with mapped() as memory:
        memory.advise("sequential")
        with memoryview(memory) as view:
            assert view[0] == CONTENT[0]
        # The blocks after it come in the background: those that are asked for now are there, or on their way.
        memory.prefetch((0, 4 * BLOCK))
        assert memory.stats().blocks_readahead > 0


def test_unknown_advice_is_refused() -> None:
    with (
        mapped() as memory,
        pytest.raises(ValueError, match="'often' is not one of 'normal', 'random', 'sequential'"),
    ):
        memory.advise("often")  # type: ignore[arg-type]


def test_stats_add_up() -> None:
    with mapped(readahead=False, memory=8 * BLOCK) as memory, memoryview(memory) as view:
        fresh = memory.stats()
        assert (fresh.faults, fresh.bytes_read, fresh.resident_bytes, fresh.resident_peak) == (0, 0, 0, 0)
        assert (fresh.error_count, fresh.errors, fresh.poisoned_blocks, fresh.retries) == (0, (), 0, 0)
        assert fresh.budget == memory.budget == 8 * BLOCK
        for b in range(BLOCKS):
            assert view[b * BLOCK] == CONTENT[b * BLOCK]
        settle(memory)
        stats = memory.stats()
        assert stats.faults == stats.blocks_demand == stats.blocks_read == BLOCKS
        assert stats.bytes_read == NBYTES
        assert stats.resident_bytes == (stats.blocks_read - stats.evictions) * BLOCK <= 8 * BLOCK
        assert stats.resident_peak <= 8 * BLOCK
        assert stats.resident_bytes == len(resident(memory)) * BLOCK
        for stage in ("queue", "source", "install", "fault"):
            histogram = stats.latency[stage]
            assert histogram.count == sum(histogram.buckets) == BLOCKS
            assert histogram.sum_ns >= 0
        assert stats.latency["fault"].mean > 0


def test_stats_are_plain_data() -> None:
    with mapped() as memory:
        memory.prefetch()
        told = json.loads(json.dumps(memory.stats().as_dict()))
        assert told["blocks_prefetch"] == told["blocks_read"] == BLOCKS
        assert told["errors"] == []
        assert set(told["latency"]) == {"queue", "source", "install", "fault", "write"}
        assert set(told["latency"]["install"]) == {"count", "mean_ns", "p50_ns", "p90_ns", "p99_ns"}
        with pytest.raises(AttributeError):
            memory.stats().faults = 3  # type: ignore[misc]


def test_percentiles() -> None:
    def histogram(**counts: int) -> userfault.Histogram:
        buckets = [0] * 160
        for name, n in counts.items():
            buckets[int(name[1:])] = n
        return userfault.Histogram(sum(buckets), 5000, tuple(buckets))

    assert userfault.Histogram(0, 0, (0,) * 160).percentile(99) == 0
    assert userfault.Histogram(0, 0, (0,) * 160).mean == 0
    # Buckets 0 to 3 are one nanosecond each; 4 to 7 make up the octave from 4 on.
    assert histogram(b3=10).percentile(100) == 4
    assert histogram(b4=10).percentile(50) == 4.5
    # Bucket 40: octave 11, first quarter: from 2048 to 2560 nanoseconds.
    assert histogram(b40=4).percentile(0) == 2048
    assert histogram(b40=4).percentile(100) == 2560
    assert histogram(b4=99, b40=1).percentile(99) == 5
    assert histogram(b4=99, b40=1).percentile(100) == 2560
    assert histogram(b40=5).mean == 1000
    values = [histogram(b4=3, b20=9, b40=1, b159=1).percentile(p) for p in range(101)]
    assert values == sorted(values)


def test_a_trace_tells_what_happened_to_blocks() -> None:
    with mapped(readahead=False) as memory, memoryview(memory) as view:
        assert len(memory.trace_read()) == 0
        memory.trace_start()
        assert view[3 * BLOCK] == CONTENT[3 * BLOCK]
        settle(memory)
        memory.prefetch((5 * BLOCK, 7 * BLOCK))
        memory.evict((3 * BLOCK, 4 * BLOCK))
        events = memory.trace_read()
        assert events.dtype.names == ("t_ns", "block", "kind", "took_ns")
        assert events["block"].tolist() == [3, 5, 6, 3]
        assert events["kind"].tolist() == [1, 3, 3, 4]
        assert np.all(np.diff(events["t_ns"].astype(np.int64)) >= 0)
        assert len(memory.trace_read()) == 0
        memory.trace_stop()
        memory.prefetch()
        assert len(memory.trace_read()) == 0


def test_a_trace_keeps_the_newest() -> None:
    with mapped(readahead=False) as memory:
        memory.trace_start(16)
        for b in range(40):
            memory.prefetch((b * BLOCK, b * BLOCK + 1))
        assert memory.trace_read()["block"].tolist() == list(range(24, 40))


@pytest.mark.parametrize("budget", [0, "0 B", "-1 B", -1, "many", 1.5, "1.5 B", True, b"1 MiB"])
def test_a_budget_that_is_no_size_is_refused(budget: Any) -> None:
    with pytest.raises(BudgetError, match="memory: "):
        mapped(memory=budget)


def test_a_budget_that_holds_too_few_blocks_is_refused() -> None:
    with pytest.raises(
        BudgetError, match=r"112 KiB is too small for content: blocks have 16 KiB, so give 128 KiB or more"
    ):
        mapped(memory=7 * BLOCK)
    mapped(memory=8 * BLOCK).close()
    # All of a small memory fits, whatever the number of blocks.
    mapped(CONTENT[: 3 * BLOCK], memory=3 * BLOCK).close()


@pytest.mark.parametrize("block", [0, 1, PAGE // 2, PAGE + 1, 3 * PAGE, 4 << 20, "5 KiB", "big", -PAGE, 2.0])
def test_an_impossible_block_is_refused(block: Any) -> None:
    with pytest.raises(BudgetError, match="block: "):
        mapped(block=block)


@pytest.mark.parametrize("block", [PAGE, "64 KiB", 2 << 20])
def test_every_possible_block(block: Any) -> None:
    content = pattern(0, (5 << 20) + 1)
    with mapped(content, block=block) as memory, memoryview(memory) as view:
        assert view[(3 << 20) + 1] == content[(3 << 20) + 1]
        assert view == content


@pytest.mark.parametrize(
    ("preferred", "block"), [(1, PAGE), (5000, 8192), (64 << 10, 64 << 10), (1 << 30, 2 << 20)]
)
def test_the_block_that_a_source_prefers_is_rounded(preferred: int, block: int) -> None:
    source = PatternSource(1 << 20, block=preferred)
    with PagedMemory(WorkerData(SourceRecipe(source)), name="source") as memory:
        assert memory.block == block
    # A budget bounds it: sixteen blocks fit.
    with PagedMemory(WorkerData(SourceRecipe(source)), name="source", memory="256 KiB") as memory:
        assert memory.block == min(block, 16 << 10)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with PagedMemory(FileData(str(path), 100, 1000), name="part") as memory, memoryview(memory) as view:
        path.unlink()
        assert view == CONTENT[100:1100]
    with pytest.raises(SourceNotFoundError, match="does not exist"):
        PagedMemory(FileData(str(path), 0, 10), name="gone")
    path.write_bytes(CONTENT)
    with pytest.raises(TruncatedError, match=f"has {NBYTES} bytes, but part needs bytes up to {NBYTES + 1}"):
        PagedMemory(FileData(str(path), 1, NBYTES), name="part")
    with pytest.raises(RangeError, match="nothing to map"):
        PagedMemory(FileData(str(path), 0, 0), name="nothing")


def test_more_address_space_than_there_is_is_refused() -> None:
    with pytest.raises(KernelError):
        PagedMemory(ZeroData(1 << 50), name="huge")
    with PagedMemory(ZeroData(1 << 44), name="large", block=2 << 20) as memory, memoryview(memory) as view:
        assert view[(1 << 43) + 1] == 0
        assert memory.stats().resident_bytes == 2 << 20


def test_close_is_refused_while_arrays_are_alive() -> None:
    memory = mapped()
    array = matrix(memory)
    row = array[3]
    with pytest.raises(ExportedError, match=r"1 array\(s\) or other buffer\(s\) of it are alive"):
        memory.close()
    del array
    with pytest.raises(BufferError):
        memory.close()
    assert not memory.closed
    assert row.tobytes() == CONTENT[3 * BLOCK : 4 * BLOCK]
    del row
    memory.close()
    assert memory.closed


def test_a_closed_memory() -> None:
    memory = mapped(readahead=False)
    address = memory.address
    memory.prefetch((0, 2 * BLOCK))
    assert find(address) is memory
    memory.close()
    memory.close()
    memory.close(force=True)
    assert memory.closed
    calls: list[Any] = [
        memory.prefetch,
        memory.populate,
        memory.evict,
        lambda: memory.advise("random"),
        memory.trace_start,
        memory.__enter__,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="content is closed"):
            call()
    with pytest.raises(BufferError, match="closed"):
        memoryview(memory)
    # What it counted is still told.
    assert memory.stats().blocks_prefetch == 2
    assert memory.stats().resident_bytes == 0
    assert repr(memory) == "<userfault.PagedMemory 'content', closed>"
    assert resident(memory) == []


def test_repr() -> None:
    with mapped() as memory:
        assert repr(memory) == "<userfault.PagedMemory 'content', 1 MiB in blocks of 16 KiB>"


def test_a_with_block_closes() -> None:
    with mapped() as memory:
        assert not memory.closed
    assert memory.closed
    with pytest.raises(ExportedError), mapped() as memory:
        kept = matrix(memory)
    assert not memory.closed
    # An error that passes through is not hidden by that of an array it keeps alive.
    with pytest.raises(ZeroDivisionError), memory:
        1 / 0  # noqa: B018
    assert not memory.closed
    del kept
    with pytest.raises(ZeroDivisionError), memory:
        1 / 0  # noqa: B018
    assert memory.closed


def test_a_forced_close_kills_who_reads_on() -> None:
    done = run_python(
        """
        import numpy as np, userfault
        a = userfault.open(np.arange(1 << 16))
        memory = userfault.memory_of(a)
        assert a[5] == 5
        memory.close(force=True)
        assert memory.closed
        print("closed", flush=True)
        print(a[6])
        """
    )
    assert (done.returncode, done.stdout) == (-11, "closed\n")


def test_a_forced_close_kills_who_waits() -> None:
    done = run_python(
        """
        import threading, userfault
        from support.page_sources import Trouble, TroubleSource
        import pathlib, sys, tempfile

        with tempfile.TemporaryDirectory() as folder:
            source = TroubleSource(1 << 16, pathlib.Path(folder))
            source.trouble(Trouble("hangs"))
            a = userfault.open(source)
            memory = userfault.memory_of(a)
            import ctypes
            # Without the GIL, so that this thread can go on and close.
            copy = ctypes.create_string_buffer(1)
            read = lambda: ctypes.CDLL(None).memcpy(copy, ctypes.c_void_p(memory.address), 1)
            threading.Thread(target=read, daemon=True).start()
            from support.waiting import wait_until
            wait_until(source.reads, "the worker reads")
            print("waits", flush=True)
        memory.close(force=True)
        threading.Event().wait()
        """,
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert (done.returncode, done.stdout) == (-11, "waits\n")


@pytest.mark.parametrize("resident_first", [False, True])
def test_writing_to_it_kills_and_says_where(resident_first: bool) -> None:
    done = run_python(
        f"""
        import ctypes, numpy as np, userfault
        a = userfault.open(np.arange(1 << 16), name="numbers")
        memory = userfault.memory_of(a)
        if {resident_first}:
            assert a[1000] == 1000
        ctypes.memset(memory.address + 8004, 1, 1)
        """
    )
    assert done.returncode == -11
    assert "Segmentation fault" in done.stderr
    if "a write to this read-only memory" in done.stderr:
        assert "userfault: numbers: a write to this read-only memory at byte" in done.stderr


def test_writing_is_refused_in_python() -> None:
    array = userfault.open(np.arange(100))
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[3] = 5
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    with pytest.raises(ValueError, match="read-only"):
        array += 1
    view = memoryview(userfault.memory_of(array))
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1


def test_memory_of_views() -> None:
    array = userfault.open(np.arange(10_000).reshape(100, 100))
    memory = userfault.memory_of(array)
    assert userfault.memory_of(memory) is memory
    views: list[Any] = [
        array[3],
        array[5, 5:6],
        array[::-1, ::-1],
        array.T,
        array.view(np.uint8),
        array[3].view(np.recarray),
        memoryview(array),
        memoryview(memory)[100:200],
        np.asarray(array[50:])[3:],
    ]
    for view in views:
        assert userfault.memory_of(view) is memory
    for other in (
        array + 1,
        array.copy(),
        array[3:3],
        np.arange(3),
        b"bytes",
        bytearray(),
        5,
        None,
        "text",
        array[0, 0],
    ):
        with pytest.raises(RangeError, match="is in no open memory"):
            userfault.memory_of(other)


def test_memory_of_several() -> None:
    arrays = [userfault.open(np.full(100 + i, i)) for i in range(5)]
    memories = [userfault.memory_of(array) for array in arrays]
    assert len(set(memories)) == 5
    for i, array in enumerate(arrays):
        assert userfault.memory_of(array[i:]) is memories[i]
    gone = memories.pop(2)
    arrays.pop(2)
    address = gone.address
    gone.close()
    assert find(address) is None
    assert [userfault.memory_of(array) for array in arrays] == memories


def test_the_last_view_takes_the_memory_along() -> None:
    def holdings() -> int:
        return len(os.listdir("/proc/self/fd"))

    userfault.open(np.arange(10))
    gc.collect()
    before = holdings()
    array = userfault.open(np.arange(1 << 16))
    memory = weakref.ref(userfault.memory_of(array))
    address = userfault.memory_of(array).address
    assert holdings() == before + 1
    part = array[1000:2000:7]
    del array
    gc.collect()
    assert memory() is not None
    assert part[1] == 1007
    del part
    gc.collect()
    assert memory() is None
    assert find(address) is None
    assert holdings() == before


def test_a_source_in_memory_is_kept_alive() -> None:
    class Bytes(bytearray):
        pass

    content = Bytes(CONTENT)
    alive = weakref.ref(content)
    memory = PagedMemory(MemoryData(content, 0, NBYTES), name="content")
    del content
    gc.collect()
    with memoryview(memory) as view:
        assert view[NBYTES - 1] == CONTENT[NBYTES - 1]
    memory.close()
    del memory
    gc.collect()
    assert alive() is None


def test_paged_memory_of_paged_memory_is_refused() -> None:
    array = userfault.open(np.arange(1 << 16))
    with pytest.raises(userfault.SourceError, match="itself paged memory"):
        userfault.open(array)
    with pytest.raises(userfault.SourceError, match="itself paged memory"):
        userfault.open(memoryview(array)[8:])


def test_an_unfinished_memory_is_harmless() -> None:
    with pytest.raises(BudgetError):
        mapped(memory=PAGE)
    bare = PagedMemory.__new__(PagedMemory)
    assert bare.closed is False
    del bare
    gc.collect()
