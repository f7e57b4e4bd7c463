"""First writes against bare write-protect faults; write-back of a file and of scratch against numpy.memmap."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import native, touching
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most
from benchmarks.touching import PAGE

KIB = 1024
MIB = 1024 * KIB
SLAB = 4 * MIB


def comparisons(scale: Scale) -> Iterator[Comparison]:
    touch = str(native.build("touch", scale.data, shared=True))
    program = str(native.build("firstwrite", scale.data))
    for block in (PAGE, 64 * KIB):
        blocks = 256 if scale.quick else 256 * MIB // max(block, 16 * KIB)
        for delivery in ("thread", "direct"):
            arguments = {"blocks": blocks, "block": block, "library": touch, "delivery": delivery}
            command = (program, str(blocks), str(block), "{seed}", delivery)
            yield Comparison(
                name=f"first-{delivery}-{block // KIB}k",
                unit="µs/block",
                ours=Side("benchmarks.writing:first_writes", arguments),
                references=(
                    Reference(
                        "bare-protect",
                        Side("benchmarks.faults:bare", {"command": command, "scale_by": 1e-3}),
                        at_most(1.2),
                    ),
                ),
                source=f"memory source, mode 'c', {blocks} first writes to resident blocks of {block // KIB} KiB in "
                f"random order, delivery {delivery!r}; bare: UFFDIO_WRITEPROTECT off for each block; medians",
                one_cpu=True,
                rounds=3,
            )
    nbytes = (16 if scale.quick else 512) * MIB
    common = {"nbytes": nbytes, "folder": str(scale.data)}
    words = f"{nbytes // MIB} MiB of float64 written in slabs of {SLAB // MIB} MiB, budget {nbytes // 4 // MIB} MiB"
    yield Comparison(
        name="file",
        unit="GB/s",
        ours=Side("benchmarks.writing:userfault_file", common),
        references=(Reference("memmap", Side("benchmarks.writing:memmap_file", common)),),
        source=f"a raw file opened r+, {words}, then flush; numpy.memmap: the same without a budget",
    )
    for kind in ("smooth", "random"):
        arguments = {**common, "kind": kind}
        yield Comparison(
            name=f"scratch-{kind}",
            unit="GB/s",
            ours=Side("benchmarks.writing:userfault_scratch", arguments),
            references=(Reference("memmap", Side("benchmarks.writing:memmap_scratch", arguments)),),
            source=f"userfault.empty, {words}, {kind} values, then all of it read; "
            "numpy.memmap: a new file without a budget",
        )


@contextmanager
def first_writes(blocks: int, block: int, library: str, delivery: Any) -> Iterator[Measure]:
    """Writes to one word of each block, all of which are resident and clean."""
    import userfault

    source, expected = touching.numbered(blocks, block)

    def measure(repetition: int) -> Sample:
        array = userfault.open(source, "c", block=block, memory=2 * blocks * block, delivery=delivery)
        with userfault.memory_of(array) as memory:
            memory.prefetch(wait=True)
            result = touching.touch(library, array.ctypes.data, blocks, block, repetition + 1, write=True)
            touching.check_sum(result.checksum, expected)
            if memory.stats().dirty_bytes != blocks * block:
                raise AssertionError(f"{memory.stats().dirty_bytes} bytes are dirty, not {blocks * block}")
            del array
        return result.sample()

    yield measure


def _slabs(kind: str) -> Callable[[int], Any]:
    """Values for slab `number`, float64: smooth ones compress well, random ones not at all."""
    import numpy as np

    count = SLAB // 8
    noise = np.random.default_rng(1).random(count)
    waves = np.round(np.sin(np.arange(count) / 5000) * 1000)

    def slab(number: int) -> Any:
        values = noise if kind == "random" else waves
        values[0] = number
        return values

    return slab


def _write(array: Any, slab: Callable[[int], Any]) -> None:
    for number in range(array.nbytes // SLAB):
        array[number * (SLAB // 8) : (number + 1) * (SLAB // 8)] = slab(number)


def _sum(array: Any) -> float:
    """In slabs on both sides: NumPy sums large arrays pairwise."""
    return float(sum(float(array[at : at + SLAB // 8].sum()) for at in range(0, len(array), SLAB // 8)))


def _file(folder: str, nbytes: int) -> Path:
    """A file of its own for each side, all of it there."""
    path = Path(folder) / f"written-{os.getpid()}.bin"
    path.write_bytes(bytes(nbytes))
    return path


@contextmanager
def userfault_file(nbytes: int, folder: str) -> Iterator[Measure]:
    import userfault

    path, slab = _file(folder, nbytes), _slabs("random")

    def measure(repetition: int) -> Sample:
        array = userfault.open(path, "r+", dtype="f8", memory=nbytes // 4)
        with userfault.memory_of(array) as memory:
            start = time.perf_counter()
            _write(array, slab)
            memory.flush()
            elapsed = time.perf_counter() - start
            del array
        return Sample(nbytes / elapsed / 1e9, check=_content(path))

    yield measure
    path.unlink()


@contextmanager
def memmap_file(nbytes: int, folder: str) -> Iterator[Measure]:
    import numpy as np

    path, slab = _file(folder, nbytes), _slabs("random")

    def measure(repetition: int) -> Sample:
        array = np.memmap(path, "f8", "r+")
        start = time.perf_counter()
        _write(array, slab)
        array.flush()
        elapsed = time.perf_counter() - start
        del array
        return Sample(nbytes / elapsed / 1e9, check=_content(path))

    yield measure
    path.unlink()


def _content(path: Path) -> float:
    import numpy as np

    return _sum(np.fromfile(path, "f8"))


@contextmanager
def userfault_scratch(nbytes: int, folder: str, kind: str) -> Iterator[Measure]:
    import userfault

    os.environ["USERFAULT_SCRATCH"] = folder
    slab = _slabs(kind)

    def measure(repetition: int) -> Sample:
        array = userfault.empty(nbytes // 8, memory=nbytes // 4)
        with userfault.memory_of(array):
            start = time.perf_counter()
            _write(array, slab)
            written = time.perf_counter()
            total = _sum(array)
            ended = time.perf_counter()
            del array
        return _both(nbytes, start, written, ended, total)

    yield measure


@contextmanager
def memmap_scratch(nbytes: int, folder: str, kind: str) -> Iterator[Measure]:
    import numpy as np

    slab = _slabs(kind)
    path = Path(folder) / f"scratch-{os.getpid()}.bin"

    def measure(repetition: int) -> Sample:
        array = np.memmap(path, "f8", "w+", shape=(nbytes // 8,))
        path.unlink()
        start = time.perf_counter()
        _write(array, slab)
        written = time.perf_counter()
        total = _sum(array)
        ended = time.perf_counter()
        return _both(nbytes, start, written, ended, total)

    yield measure


def _both(nbytes: int, start: float, written: float, ended: float, total: float) -> Sample:
    """Throughput of writing and reading back together, and of each."""
    return Sample(
        nbytes / (ended - start) / 1e9,
        check=total,
        extra={"write": nbytes / (written - start) / 1e9, "read": nbytes / (ended - written) / 1e9},
    )
