"""Workers killed at every point of a write or a flush: nothing that was written is lost, nothing hangs."""

from __future__ import annotations

import pytest

from support.soak import rounds
from support.survival import KILLS, survive

STORES = """
from support.kill_points import KilledStore
transactional = sys.argv[2] == "transactional"

def flushed(memory):
    began = time.monotonic()
    memory.flush()
    assert time.monotonic() - began < BOUND_S
"""


@pytest.mark.parametrize("kind", ["stores at once", "transactional"])
def test_a_worker_that_dies_at_any_byte_code_of_a_write(kind: str) -> None:
    done = survive(
        KILLS
        + STORES
        + """
blocks = 16
want = expected(blocks * block).copy()
store = KilledStore(folder, want.tobytes(), block=block, transactional=transactional)
with own_pager(workers=1):
    array = userfault.open(store, "r+", memory="32 KiB", readahead=False)
    memory = userfault.memory_of(array)
    step = max(1, 1500 // kills)
    version = 0
    for number in range(kills):
        before, turns = lost(), 0
        store.kill_after(1 + number * step)
        while lost() == before:
            # More than the budget holds: some of it is written back, or to scratch, before the flush.
            for at in range(version % 3 * block, array.nbytes, 3 * block):
                version += 1
                array[at + 7 : at + 4000] = want[at + 7 : at + 4000] = version % 251
            flushed(memory)
            assert store.content() == want.tobytes(), (number, turns)
            memory.evict()
            assert same(array, want), (number, turns)
            turns += 1
            assert turns < 1000, "the point is never reached"
    stats = memory.stats()
    assert lost() == kills and stats.dirty_bytes == 0, stats
    assert (stats.error_count, stats.poisoned_blocks) == (0, 0), stats.errors
    print("survived", kills)
    del array, memory
        """,
        str(rounds(10, 1500)),
        kind,
    )
    assert done.check() == f"survived {rounds(10, 1500)}\n"


@pytest.mark.parametrize("kind", ["stores at once", "transactional"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_workers_killed_at_any_moment_while_threads_write(kind: str, concurrency: int) -> None:
    done = survive(
        KILLS
        + STORES
        + """
import random
rng, concurrency = random.Random(kills), int(sys.argv[3])
store = KilledStore(
    folder, expected(1 << 20).tobytes(), block=16 << 10, transactional=transactional, concurrency=concurrency
)
with own_pager(workers=2):
    array = userfault.open(store, "r+", memory="256 KiB")
    memory = userfault.memory_of(array)
    killed = set()
    with writers(array) as some:
        while len(killed) < kills:
            # In the middle of write-backs, and of flushes by turns.
            flusher = threading.Thread(target=flushed, args=(memory,))
            if len(killed) % 2:
                flusher.start()
            ripe = lambda: [pid for pid in workers() if pid not in killed and store.requests(pid) > concurrency]
            wait_until(ripe, "a worker has answered")
            time.sleep(rng.random() * 0.01)
            for pid in ripe()[:1]:
                kill(pid)
                killed.add(pid)
            if flusher.ident:
                flusher.join()
        before = list(some.passes)
        wait_until(lambda: all(now > then for now, then in zip(some.passes, before)), "all writers come on")
    wait_until(lambda: lost() >= len(killed), "the dead are counted")
    flushed(memory)
    assert store.content() == some.want.tobytes()
    memory.evict()
    assert same(array, some.want)
    stats = memory.stats()
    assert (stats.error_count, stats.poisoned_blocks, stats.dirty_bytes) == (0, 0, 0), stats.errors
    print("survived", lost() >= kills)
    del array, memory, some
        """,
        str(rounds(6, 500)),
        kind,
        str(concurrency),
    )
    assert done.check() == "survived True\n"
