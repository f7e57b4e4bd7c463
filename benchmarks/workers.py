"""Workers that are killed while they read: how long a reader waits at the worst."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import native, touching
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, figure_at_most

KIB = 1024
BLOCK = 64 * KIB
KILLS = 5
GAP_S = 0.3
"""Between two kills: several times what a new worker takes to come up."""
LOST_NS = 400_000_000
"""What a kill may delay is looked for until then."""


def comparisons(scale: Scale) -> Iterator[Comparison]:
    touch = str(native.build("touch", scale.data, shared=True))
    kills = 2 if scale.quick else KILLS
    for name, workers in (("killed", 1), ("killed-of-two", 2)):
        yield Comparison(
            name=name,
            unit="ms",
            ours=Side("benchmarks.workers:killed", {"library": touch, "kills": kills, "workers": workers}),
            references=(
                Reference("python", Side("benchmarks.workers:python_starts", {}), figure_at_most(100, "ms")),
            ),
            source=f"a PageSource in Python with a dtype, {workers} worker(s), 4 reading threads; SIGKILL to a worker "
            f"{kills} times; the longest wait of any read afterwards, the worst of all; "
            "reference: start and end of an interpreter that does nothing",
        )


@contextmanager
def killed(library: str, kills: int, workers: int) -> Iterator[Measure]:
    """Kills workers while four native threads read at random through a small budget: nearly each read is a request."""
    os.environ["USERFAULT_WORKERS"] = str(workers)
    import numpy as np

    import userfault
    from benchmarks.pattern import Numbered

    blocks = 4096
    array = userfault.open(
        Numbered(blocks), dtype="<u8", shape=(blocks * BLOCK // 8,), memory=32 * BLOCK, block=BLOCK
    )
    memory = userfault.memory_of(array)
    memory.advise("random")
    address = array.ctypes.data
    log = np.zeros((blocks, 2), np.uint64)
    stop = threading.Event()
    rounds: list[Any] = []

    def read(seed: int) -> None:
        while not stop.is_set():
            _, found = touching.touch_by_threads(library, [address], 4, blocks, BLOCK, seed, log=log)
            touching.check_sum(found, blocks * (blocks + 1) // 2)
            rounds.append(log.copy())
            seed += 1

    def measure(repetition: int) -> Sample:
        rounds.clear()
        stop.clear()
        reader = threading.Thread(target=read, args=(repetition,))
        reader.start()
        killed_ns = []
        for _ in range(kills):
            time.sleep(GAP_S)
            victim = max(_workers())
            killed_ns.append(time.monotonic_ns())
            os.kill(victim, signal.SIGKILL)
        time.sleep(GAP_S)
        stop.set()
        reader.join()
        waits = _longest_waits(np.concatenate(rounds).astype(np.int64), killed_ns)
        return Sample(max(waits), extra={"median": sorted(waits)[len(waits) // 2]})

    yield measure
    del array
    memory.close()


def _longest_waits(log: Any, killed_ns: list[int]) -> list[float]:
    """For each kill the longest wait, from the kill on, of the reads that were under way or came soon after; in ms."""
    begun, ended = log[:, 0], log[:, 1]
    waits = []
    for at in killed_ns:
        near = (ended > at) & (begun < at + LOST_NS)
        if not near.any():
            raise RuntimeError("nobody read when the worker was killed")
        waits.append(float((ended[near] - begun[near].clip(min=at)).max()) * 1e-6)
    return waits


def _workers() -> list[int]:
    """Process ids of this process's workers."""
    children = [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    return [pid for pid in children if b"userfault.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextmanager
def python_starts() -> Iterator[Measure]:
    def measure(_repetition: int) -> Sample:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True, stdin=subprocess.DEVNULL)
        elapsed = (time.perf_counter() - start) * 1e3
        return Sample(elapsed, extra={"median": elapsed})

    yield measure
