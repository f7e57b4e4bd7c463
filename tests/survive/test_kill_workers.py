"""Workers killed at every point of a request: no wrong byte, no hang, an answer in bounded time."""

from __future__ import annotations

import pytest

from support.soak import rounds
from support.survival import KILLS, survive


def test_a_worker_that_dies_at_any_of_its_byte_codes() -> None:
    """From the read through the answer to the next claim, and on: the count goes on across requests."""
    done = survive(
        KILLS
        + """
source = KilledSource(64 * block, folder)
with own_pager(workers=1):
    array = userfault.open(source, readahead=False)
    memory = userfault.memory_of(array)
    step = max(1, 600 // kills)
    for number in range(kills):
        before = lost()
        source.kill_after(1 + number * step)
        rounds = 0
        while lost() == before:
            # One after the other: a worker that lives until its answer is asked again.
            for at in range(0, array.nbytes, block):
                checked(array, at, block)
                if lost() > before:
                    break
            memory.evict()
            rounds += 1
            assert rounds < 1000, "the point is never reached"
    stats, told = memory.stats(), userfault.pager_stats()
    assert lost() == kills and told.requests_reissued <= 2 * kills, told
    assert (stats.error_count, stats.poisoned_blocks) == (0, 0), stats.errors
    memory.evict()
    assert same(array, expected(array.nbytes))
    print("survived", kills)
    del array, memory
        """,
        str(rounds(20, 600)),
    )
    assert done.check() == f"survived {rounds(20, 600)}\n"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_workers_killed_at_any_moment_under_load(concurrency: int) -> None:
    done = survive(
        KILLS
        + """
import random
rng = random.Random(int(sys.argv[1]))
concurrency = int(sys.argv[2])
source = KilledSource(1 << 20, folder, block=16 << 10, concurrency=concurrency, fills=150 // concurrency)
with own_pager(limit=1 << 20, workers=2):
    arrays = [userfault.open(source, memory="256 KiB"), userfault.open(source, block=4096)]
    arrays.append(userfault.open(PatternSource(NBYTES), memory="1 MiB", block=65536))
    rights = [expected(array.nbytes) for array in arrays]
    killed = set()

    def ripe():
        # Those that have answered: three that die before their first answer count as a Python that does not start.
        return [pid for pid in workers() if pid not in killed and source.requests(pid) > concurrency]

    with readers(arrays, rights) as some:
        # Some of them die idle. Of ten times as many not one in the middle of a read is no chance.
        while len(killed) < kills or (userfault.pager_stats().requests_reissued == 0 and len(killed) < 10 * kills):
            wait_until(ripe, "a worker has answered")
            # The moment is what is tried here; nothing waits for it.
            time.sleep(rng.random() * 0.004)
            for pid in ripe()[:1]:
                kill(pid)
                killed.add(pid)
        before = list(some.passes)
        wait_until(lambda: all(now > then for now, then in zip(some.passes, before)), "all readers come on")
    wait_until(lambda: lost() >= len(killed), "the dead are counted")
    for array, right in zip(arrays, rights):
        stats = userfault.memory_of(array).stats()
        assert (stats.error_count, stats.poisoned_blocks) == (0, 0), stats.errors
        assert same(array, right)
    assert userfault.pager_stats().requests_reissued > 0, userfault.pager_stats()
    print("survived", lost() >= kills)
    del array, arrays
        """,
        str(rounds(16, 1000)),
        str(concurrency),
    )
    assert done.check() == "survived True\n"


def test_workers_killed_while_they_start() -> None:
    """Twice in a row each; the third attempt is let come up (see the test of a Python that always dies)."""
    done = survive(
        KILLS
        + """
source = KilledSource(64 * block, folder)
with own_pager(workers=1):
    array = userfault.open(source, readahead=False)
    memory = userfault.memory_of(array)
    delays = np.linspace(0, 0.06, kills)
    with readers([array], [expected(array.nbytes)], 2) as some:
        for number, delay in enumerate(delays):
            pid = psutil.Process().children()[0].pid
            wait_until(lambda: memory.evict() is not None and source.requests(pid) > 1, "a worker answers")
            kill(pid)
            killed = {pid}
            for _ in range(2):
                wait_until(lambda: set(workers()) - killed, "another one is started")
                (young,) = set(workers()) - killed
                time.sleep(delay)
                kill(young)
                killed.add(young)
            wait_until(lambda: set(workers()) - killed, "and another one")
    assert memory.stats().error_count == 0, memory.stats().errors
    memory.evict()
    assert same(array, expected(array.nbytes))
    print("survived")
    del array, memory
        """,
        str(rounds(3, 60)),
    )
    assert done.check() == "survived\n"
