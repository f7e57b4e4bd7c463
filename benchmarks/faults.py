"""Random faults and fills from the memory source, against bare C loops.

All of it on one CPU: there the handler runs where the fault happened, and what is left is the engine's own
work. Across CPUs both sides pay the same wake-up (60-130 µs on a virtual machine), which would hide it.
"""

import json
import mmap
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import machine, native, touching
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_least, at_most

PAGE = mmap.PAGESIZE
KIB = 1024
MIB = 1024 * KIB
PASSES = 5


def comparisons(scale: Scale) -> Iterator[Comparison]:
    pages = 1024 if scale.quick else 16384
    nbytes = 8 * MIB if scale.quick else 256 * MIB
    faults = str(native.build("faults", scale.data))
    fill = str(native.build("fill", scale.data))
    touch = str(native.build("touch", scale.data, shared=True))

    def bare(*command: str, scale_by: float = 1.0) -> Side:
        return Side("benchmarks.faults:bare", {"command": command, "scale_by": scale_by})

    yield Comparison(
        name="random-page",
        unit="µs/fault",
        ours=Side("benchmarks.faults:random_faults", {"pages": pages, "library": touch}),
        references=(
            Reference("bare-read", bare(faults, str(pages), "{seed}", "read", scale_by=1e-3), at_most(1.15)),
            Reference("bare-poll", bare(faults, str(pages), "{seed}", "poll", scale_by=1e-3)),
        ),
        source=f"memory source, {pages} random faults of one page of {PAGE} bytes; medians",
        one_cpu=True,
        rounds=3,
    )
    for block in (64 * KIB, 256 * KIB, MIB):
        yield Comparison(
            name=f"fill-{block // KIB}k",
            unit="GB/s",
            ours=Side("benchmarks.faults:prefetch", {"nbytes": nbytes, "block": block}),
            references=(Reference("bare-copy", bare(fill, "copy", str(nbytes), str(block)), at_least(0.9)),),
            source=f"memory source, {nbytes // MIB} MiB in blocks of {block // KIB} KiB; "
            "bare: one UFFDIO_COPY a block",
            one_cpu=True,
        )
    references = [Reference("bare-copy", bare(fill, "copy", str(nbytes), str(MIB)), at_least(2.0))]
    if machine.can_move():
        references.append(Reference("bare-move", bare(fill, "move", str(nbytes), "0")))
    yield Comparison(
        name="fill-2m",
        unit="GB/s",
        ours=Side("benchmarks.faults:prefetch", {"nbytes": nbytes, "block": 2 * MIB}),
        references=tuple(references),
        source=f"memory source, {nbytes // MIB} MiB in extents of 2 MiB; bare: UFFDIO_COPY of 1 MiB, "
        "or huge staging and UFFDIO_MOVE",
        one_cpu=True,
    )

    for delivery in ("thread", "direct"):
        arguments = {"nbytes": nbytes, "block": 64 * KIB, "library": touch, "delivery": delivery}
        yield Comparison(
            name=f"budget-{delivery}",
            unit="GB/s",
            ours=Side("benchmarks.faults:random_blocks", {**arguments, "budget": nbytes // 4}),
            references=(
                # Eviction costs at most 35 % of the throughput.
                Reference(
                    "no-eviction",
                    Side("benchmarks.faults:random_blocks", {**arguments, "budget": 2 * nbytes}),
                    at_least(0.65),
                ),
            ),
            source=f"memory source, random faults of 64 KiB over {nbytes // MIB} MiB within a budget of a quarter, "
            f"against a budget for all of it, delivery {delivery!r}; what was loaded, best of {PASSES} passes",
            one_cpu=True,
        )


@contextmanager
def bare(command: list[str], scale_by: float) -> Iterator[Measure]:
    """Runs a bare program; it prints its figures as JSON."""

    def measure(repetition: int) -> Sample:
        line = [part.replace("{seed}", str(repetition + 1)) for part in command]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        figures = {name: value * scale_by for name, value in json.loads(done.stdout).items()}
        return Sample(figures.pop("value"), extra=figures)

    yield measure


@contextmanager
def random_faults(pages: int, library: str, delivery: Any = "thread") -> Iterator[Measure]:
    """Touches every page once, in random order, by the same C loop as the bare program."""
    import userfault

    source, expected = touching.numbered(pages)

    def measure(repetition: int) -> Sample:
        array = userfault.open(source, block=PAGE, memory=2 * pages * PAGE, delivery=delivery)
        with userfault.memory_of(array) as memory:
            memory.advise("random")
            result = touching.touch(library, array.ctypes.data, pages, PAGE, repetition + 1)
            del array
        touching.check_sum(result.checksum, expected)
        return result.sample()

    yield measure


@contextmanager
def prefetch(nbytes: int, block: int) -> Iterator[Measure]:
    """Fills a whole memory by one `prefetch`."""
    import userfault

    source = touching.small_pages(nbytes)
    source[:] = touching.counting(nbytes // 8)
    expected = int(source.sum())

    def measure(repetition: int) -> Sample:
        array = userfault.open(source, block=block, memory=2 * nbytes)
        with userfault.memory_of(array) as memory:
            start = time.perf_counter()
            memory.prefetch(wait=True)
            elapsed = time.perf_counter() - start
            if int(array.sum()) != expected:
                raise AssertionError("wrong bytes: checksum differs")
            del array
        return Sample(nbytes / elapsed / 1e9)

    yield measure


@contextmanager
def random_blocks(nbytes: int, block: int, library: str, delivery: Any, budget: int) -> Iterator[Measure]:
    """Touches every block once in each pass, in random order, and counts what had to be loaded."""
    import userfault

    blocks = nbytes // block
    source, expected = touching.numbered(blocks, block)

    def one_pass(array: Any, memory: Any, seed: int) -> float:
        before = memory.stats().bytes_read
        result = touching.touch(library, array.ctypes.data, blocks, block, seed)
        touching.check_sum(result.checksum, expected)
        return float((memory.stats().bytes_read - before) / (result.mean_ns * blocks))

    def measure(repetition: int) -> Sample:
        array = userfault.open(source, block=block, memory=budget, delivery=delivery)
        with userfault.memory_of(array) as memory:
            memory.advise("random")
            evicts = budget < nbytes
            if evicts:
                one_pass(array, memory, 0)  # until the budget is full
            speeds = []
            for seed in range(repetition * PASSES, (repetition + 1) * PASSES):
                speeds.append(one_pass(array, memory, seed))
                if not evicts:
                    memory.evict()
            del array
        return touching.fastest(speeds)

    yield measure
