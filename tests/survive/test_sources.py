"""Sources and stores that fail, lie, hang and recover, while threads read and write what is good of them."""

from __future__ import annotations

from typing import get_args

import pytest

from support.bad_sources import Failing
from support.survival import survive

TELLS = {
    "raises at once": "EOFError: there is nothing at",
    "raises in the middle": "EOFError: there is nothing at",
    "returns short": "EOFError: read_into returned",
    "too much": "ValueError: memoryview assignment",
    "hangs": "did not answer before the deadline",
}


@pytest.mark.parametrize("how", get_args(Failing))
def test_a_source_that_holds_less_than_it_says(how: str) -> None:
    """What it holds is read on by others, what it lacks is a typed error each time, and comes when it is mended."""
    done = survive(
        """
        from support.bad_sources import BadSource
        how, tells = sys.argv[1:3]
        held, nbytes, block = 300_000, 600_000, 16 << 10
        good = held // block * block
        # Short only where it is waited for: on a busy machine a worker takes its time to start, too.
        with own_pager(deadline_ns=(SECOND // 2 if how == "hangs" else 60 * SECOND), attempts=2, workers=2):
            # Read ahead, a scan of what is good would end its worker again and again.
            source = BadSource(nbytes, held, how, folder)
            array = userfault.open(source, memory="256 KiB", block=block, readahead=how != "hangs")
            memory = userfault.memory_of(array)
            with readers([array[:good]], [right[:good]]) as some:
                for start in (good,) if how == "hangs" else (good, 500_000):
                    for _ in range(2):
                        try:
                            memory.prefetch((start, start + block))
                        except userfault.SourceError as error:
                            assert tells in error.detail, error.detail
                            assert start // block * block <= error.offset <= start + block, error
                            assert error.length <= block, error
                        else:
                            raise AssertionError("it was read")
                # In the background nobody is told, and nothing is poisoned.
                errors = memory.stats().error_count
                memory.prefetch((good, good + block), wait=False)
                wait_until(lambda: memory.stats().error_count > errors, "errors are recorded")
                seen = list(some.passes)
                wait_until(lambda: all(now > then for now, then in zip(some.passes, seen)), "all readers come on")
            assert memory.stats().poisoned_blocks == 0, memory.stats()
            (folder / "mended").touch()
            assert same(array, right[:nbytes])
            print("read")
            del array, memory, some
        """,
        how,
        TELLS[how],
    )
    assert done.check() == "read\n"


@pytest.mark.parametrize("kind", ["raises", "short", "hangs", "commit", "commit hangs"])
def test_a_store_that_fails_while_threads_write(kind: str) -> None:
    """Nothing is lost, the rest is stored meanwhile, and the first flush after it is mended has everything."""
    done = survive(
        """
        from support.page_stores import FileStore
        kind, nbytes, block = sys.argv[1], 512 << 10, 16 << 10
        store = FileStore(folder, expected(nbytes).tobytes(), block=block)
        with own_pager(deadline_ns=(SECOND // 2 if "hangs" in kind else 60 * SECOND), attempts=2, workers=1):
            array = userfault.open(store, "r+", memory="256 KiB")
            memory = userfault.memory_of(array)
            bad = nbytes // 2
            with writers(array[:bad]) as some:
                wait_until(lambda: min(some.passes) > 50, "they write")
                store.trouble(kind, bad, bad + 2 * block)
                for turn in range(1 if "hangs" in kind else 2):
                    array[bad : bad + 5 * block] = turn
                    try:
                        memory.flush()
                    except userfault.FlushError as error:
                        ranges = [(failure.offset, failure.offset + failure.length) for failure in error.failures]
                        assert ranges == ([] if kind.startswith("commit") else [(bad, bad + 2 * block)]), ranges
                    else:
                        raise AssertionError("it was stored")
                # They come on though some of the budget cannot be given back.
                seen = list(some.passes)
                wait_until(lambda: all(now > then + 50 for now, then in zip(some.passes, seen)), "the writers come on")
                assert memory.stats().dirty_bytes > 0
                store.trouble(None)
                memory.flush()
            memory.flush()
            want = np.concatenate([some.want, expected(nbytes)[bad:]])
            want[bad : bad + 5 * block] = turn
            assert store.content() == want.tobytes()
            memory.evict()
            assert same(array, want)
            print("stored", memory.stats().poisoned_blocks)
            del array, memory, some
        """,
        kind,
    )
    assert done.check() == "stored 0\n"


def test_a_store_that_hangs_and_recovers_is_asked_again() -> None:
    """A write that hangs costs its worker, once for each time; the flush itself goes through."""
    done = survive(
        """
        from support.page_stores import FileStore
        times, nbytes, block = 2, 128 << 10, 16 << 10
        store = FileStore(folder, expected(nbytes).tobytes(), block=block)
        with own_pager(deadline_ns=SECOND, attempts=times + 3, workers=1):
            array = userfault.open(store, "r+")
            array[:] = 7
            store.trouble("hangs", 3 * block, 4 * block, times)
            userfault.memory_of(array).flush()
            assert store.content() == array.tobytes() == bytes([7]) * nbytes
            assert store.log().count(("fail", 3 * block, block)) == times
            print("lost", userfault.pager_stats().workers_lost >= times)
            del array
        """
    )
    assert done.check() == "lost True\n"
