"""Random faults and fills from the memory source, against bare C loops.

All of it on one CPU: there the handler runs where the fault happened, and what is left is the engine's own
work. Across CPUs both sides pay the same wake-up (60-130 µs on a virtual machine), which would hide it.
"""

import ctypes
import json
import mmap
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import machine, native
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_least, at_most

PAGE = mmap.PAGESIZE
KIB = 1024
MIB = 1024 * KIB


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


class Touched(ctypes.Structure):
    """`struct touch_result` of `bare/touch.h`."""

    _fields_ = (
        ("mean_ns", ctypes.c_double),
        ("p50_ns", ctypes.c_double),
        ("p99_ns", ctypes.c_double),
        ("checksum", ctypes.c_uint64),
    )


@contextmanager
def random_faults(pages: int, library: str) -> Iterator[Measure]:
    """Touches every page once, in random order, by the same C loop as the bare program."""
    import userfault

    source = _source(pages * PAGE)
    source[:: PAGE // 8] = _counting(pages)
    expected = int(source[:: PAGE // 8].sum())
    touch = ctypes.CDLL(library).touch
    touch.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.POINTER(Touched),
    )

    def measure(repetition: int) -> Sample:
        array = userfault.open(source, block=PAGE, memory=2 * pages * PAGE)
        result = Touched()
        with userfault.memory_of(array) as memory:
            memory.advise("random")
            if touch(array.ctypes.data, pages, PAGE, repetition + 1, ctypes.byref(result)):
                raise MemoryError("no memory for the times of the faults")
            del array
        if result.checksum != expected:
            raise AssertionError("wrong bytes: checksum differs")
        return Sample(
            result.p50_ns * 1e-3, extra={"mean": result.mean_ns * 1e-3, "p99": result.p99_ns * 1e-3}
        )

    yield measure


@contextmanager
def prefetch(nbytes: int, block: int) -> Iterator[Measure]:
    """Fills a whole memory by one `prefetch`."""
    import userfault

    source = _source(nbytes)
    source[:] = _counting(nbytes // 8)
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


def _counting(words: int) -> Any:
    import numpy as np

    return (np.arange(words, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def _source(nbytes: int) -> Any:
    """Anonymous memory in small pages, like the source of the bare programs.

    Not `np.empty`: NumPy asks for huge pages, which are faster to copy from.
    """
    import numpy as np

    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint64)
