"""The cache of decoded chunks: bounds, waiting, failures, and passes that do not fit."""

from __future__ import annotations

import threading

import pytest

from userfault.sources._chunk_cache import CacheEntry, ChunkCache

CHUNK = 1000


def load(cache: ChunkCache, number: int, need: int = CHUNK) -> bool:
    """Use a chunk as a reader does; return whether it had to be decoded."""
    taken = cache.take([(number, need)])
    assert not taken.busy
    for entry in taken.mine:
        buffer = cache.lend()
        buffer[:] = number % 256
        cache.commit(entry, buffer, need)
    for entry in (*taken.mine, *taken.ready):
        assert entry.buffer is not None
        assert entry.buffer[0] == number % 256
        cache.release(entry)
    return bool(taken.mine)


def test_keeps_what_was_used_last() -> None:
    cache = ChunkCache(CHUNK, 3 * CHUNK)
    assert [load(cache, n) for n in (0, 1, 2, 0)] == [True, True, True, False]
    assert load(cache, 3)  # drops 1
    assert not load(cache, 0)
    assert not load(cache, 2)
    assert load(cache, 1)


def test_never_keeps_more_than_its_capacity() -> None:
    cache = ChunkCache(CHUNK, 5 * CHUNK)
    for number in range(50):
        load(cache, number)
        assert cache.used <= 5 * CHUNK
    cache.resize(2 * CHUNK)
    assert cache.used <= 2 * CHUNK
    cache.clear()
    assert cache.used == 0


def test_without_capacity_it_still_serves() -> None:
    cache = ChunkCache(CHUNK, 0)
    assert load(cache, 7)
    assert load(cache, 7)
    assert cache.used == 0


def test_chunks_in_use_stay() -> None:
    cache = ChunkCache(CHUNK, CHUNK)
    (held,) = cache.take([(0, CHUNK)]).mine
    buffer = cache.lend()
    buffer[:] = 42
    cache.commit(held, buffer, CHUNK)
    for number in range(1, 10):
        load(cache, number)
    assert held.buffer is not None
    assert (held.buffer == 42).all()
    cache.release(held)
    assert cache.used <= CHUNK


def test_a_prefix_is_loaded_again_when_more_is_needed() -> None:
    cache = ChunkCache(CHUNK, 10 * CHUNK)
    assert load(cache, 0, 10)
    assert not load(cache, 0, 10)
    assert load(cache, 0, 11)
    assert not load(cache, 0, 11)
    assert cache.used == CHUNK


def test_a_buffer_that_is_read_is_not_written_again() -> None:
    cache = ChunkCache(CHUNK, 10 * CHUNK)
    load(cache, 0, 10)
    (reader,) = cache.take([(0, 10)]).ready
    old = reader.buffer
    (again,) = cache.take([(0, CHUNK)]).mine
    assert again is reader
    fresh = cache.lend()
    assert fresh is not old
    cache.commit(again, fresh, CHUNK)
    # Others get new buffers, as long as the reader copies from the old one.
    assert all(cache.lend() is not old for _ in range(10))


def test_missing_chunks_cost_next_to_nothing() -> None:
    cache = ChunkCache(1 << 20, 1 << 20)
    for number in range(100):
        (entry,) = cache.take([(number, 1)]).mine
        cache.commit(entry, None, 1 << 20)
        cache.release(entry)
    assert cache.used < 1 << 20
    assert len(cache.take([(number, 1 << 20) for number in range(100)]).ready) == 100


def test_waits_for_the_thread_that_loads() -> None:
    cache = ChunkCache(CHUNK, 10 * CHUNK)
    (mine,) = cache.take([(0, CHUNK)]).mine
    (theirs,) = cache.take([(0, CHUNK)]).busy
    seen: list[int] = []

    def wait() -> None:
        cache.wait(theirs)
        assert theirs.buffer is not None
        seen.append(int(theirs.buffer[0]))

    waiter = threading.Thread(target=wait)
    waiter.start()
    buffer = cache.lend()
    buffer[:] = 9
    cache.commit(mine, buffer, CHUNK)
    waiter.join()
    assert seen == [9]


def test_who_waits_gets_the_error_and_the_next_one_tries_again() -> None:
    cache = ChunkCache(CHUNK, 10 * CHUNK)
    (mine,) = cache.take([(0, CHUNK)]).mine
    (theirs,) = cache.take([(0, CHUNK)]).busy
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            cache.wait(theirs)
        except OSError as error:
            raised.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    error = OSError("no")
    cache.fail(mine, error)
    waiter.join()
    assert raised == [error]
    assert load(cache, 0)


@pytest.mark.parametrize("band", [12, 16, 24])
def test_a_band_that_does_not_fit_is_kept_in_part(band: int) -> None:
    """Each pass over a band needs every chunk once; with LRU none would ever be there."""
    cache = ChunkCache(CHUNK, 8 * CHUNK)
    passes = 40
    decoded = sum(load(cache, number) for _ in range(passes) for number in range(band))
    # The best that is possible is 8 hits in each pass.
    hits = band * passes - decoded
    assert hits > 0.5 * 8 * passes


def test_entries_start_empty() -> None:
    entry = CacheEntry(3)
    assert (entry.number, entry.buffer, entry.filled, entry.error) == (3, None, 0, None)
