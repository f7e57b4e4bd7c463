"""Worker processes that write: how many at once, in which order, and what a source that cannot be written says."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import userfault
from support.page_sources import PatternSource
from support.page_stores import CrowdStore
from support.pagers import own_pager
from userfault.sources import PageStore
from userfault.sources._abc import flush_all, write_all
from userfault.workers._main import _Writes

BLOCK = 4096
NBYTES = 64 * BLOCK


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_calls_at_once_than_the_store_allows(concurrency: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with own_pager(workers=2):
        array = userfault.open(
            CrowdStore(NBYTES, log, block=BLOCK, concurrency=concurrency), "r+", readahead=False
        )
        array[::BLOCK] = 1
        memory = userfault.memory_of(array)
        threads = [
            threading.Thread(target=memory.evict, args=((n * BLOCK, NBYTES),)) for n in range(0, 64, 16)
        ]
        threads += [threading.Thread(target=memory.flush)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del array, memory
    calls = [line.split() for line in log.read_text().splitlines()]
    assert {"read", "write", "flush"} == {what for what, _, _ in calls}
    assert len({pid for _, pid, _ in calls}) == 1
    most = max(int(inside) for _, _, inside in calls)
    assert most <= concurrency
    assert concurrency == 1 or most > 1


def test_a_flush_waits_for_earlier_writes_only() -> None:
    writes = _Writes()
    begun, go, waited = threading.Event(), threading.Event(), threading.Event()

    def write() -> None:
        with writes.one():
            begun.set()
            go.wait(30)

    def flush() -> None:
        writes.wait()
        waited.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert begun.wait(30)
    flusher = threading.Thread(target=flush)
    flusher.start()
    assert not waited.wait(0.05)
    with writes.one():
        go.set()
        # The later write is still under way.
        assert waited.wait(30)
    writer.join()
    flusher.join()
    writes.wait()


def test_a_source_that_is_no_store_says_so() -> None:
    source = PatternSource(100)
    with pytest.raises(TypeError, match="PatternSource cannot be written: it is no PageStore"):
        write_all(source, 0, memoryview(b"a"))
    with pytest.raises(TypeError, match="it is no PageStore"):
        flush_all(source)


def test_a_store_that_counts_too_little_has_failed() -> None:
    class Counts(PatternSource, PageStore):
        count: object = None

        def write_from(self, offset: int, buffer: memoryview) -> object:  # type: ignore[override]
            return self.count

    store = Counts(100)
    for count in (None, 3, True, np.int64(3)):
        store.count = count
        write_all(store, 0, memoryview(b"abc"))
    store.count = 2
    with pytest.raises(OSError, match="write_from returned 2, but was to store 3 bytes"):
        write_all(store, 0, memoryview(b"abc"))
