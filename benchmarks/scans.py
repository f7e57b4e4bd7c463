"""Sequential scans: zstd Zarr against zarr reading in bulk, a Python source against the memory source.

Every repetition opens a fresh array, so nothing of it is resident; the files are in the page cache for both.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import data
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_least

MIB = 2**20


def comparisons(scale: Scale) -> Iterator[Comparison]:
    shape = data.QUICK_CUBE if scale.quick else data.CUBE
    # Half of the array: no scan gets away with keeping it.
    budget = (8 if scale.quick else 256) * MIB
    for name, chunk in (("zarr-rows", (1, *shape[1:])), ("zarr-cubes", (64, 64, 64))):
        path = str(data.zarr_field(scale.data, shape, chunk))
        yield Comparison(
            name=name,
            unit="GB/s",
            ours=Side("benchmarks.scans:userfault_scan", {"path": path, "budget": budget}),
            references=(
                Reference("zarr-bulk", Side("benchmarks.scans:zarr_scan", {"path": path}), at_least(0.9)),
                Reference("zarr-whole", Side("benchmarks.scans:zarr_whole", {"path": path})),
            ),
            source=f"zstd Zarr v3, {data.nbytes(shape) // MIB} MiB of float32 in chunks of {chunk}, "
            f"budget {budget // MIB} MiB; zarr: slabs of {data.SLAB} rows, or all at once without a budget",
        )
    nbytes = (8 if scale.quick else 256) * MIB
    yield Comparison(
        name="python-source",
        unit="GB/s",
        ours=Side("benchmarks.scans:python_source_scan", {"nbytes": nbytes}),
        references=(
            Reference(
                "memory-source",
                Side("benchmarks.scans:memory_source_scan", {"nbytes": nbytes}),
                at_least(0.5),
            ),
        ),
        source=f"a PageSource in Python (one worker), {nbytes // MIB} MiB in blocks of 64 KiB; "
        "reference: userfault too, the same bytes from its memory source",
    )


@contextmanager
def userfault_scan(path: str, budget: int) -> Iterator[Measure]:
    import numpy as np

    import userfault

    def measure(_repetition: int) -> Sample:
        array = userfault.open(path, memory=budget)
        with userfault.memory_of(array):
            start = time.perf_counter()
            total = 0.0
            for row in range(0, array.shape[0], data.SLAB):
                total += float(array[row : row + data.SLAB].sum(dtype=np.float64))
            elapsed = time.perf_counter() - start
            nbytes = array.nbytes
            del array
        return Sample(nbytes / elapsed / 1e9, check=total)

    yield measure


@contextmanager
def zarr_scan(path: str) -> Iterator[Measure]:
    import numpy as np
    import zarr

    def measure(_repetition: int) -> Sample:
        array = zarr.open_array(path, mode="r")
        start = time.perf_counter()
        total = 0.0
        for row in range(0, array.shape[0], data.SLAB):
            total += float(np.asarray(array[row : row + data.SLAB]).sum(dtype=np.float64))
        elapsed = time.perf_counter() - start
        return Sample(array.nbytes / elapsed / 1e9, check=total)

    yield measure


@contextmanager
def zarr_whole(path: str) -> Iterator[Measure]:
    """All of it into one array: what someone does who has the memory."""
    import numpy as np
    import zarr

    def measure(_repetition: int) -> Sample:
        array = zarr.open_array(path, mode="r")
        start = time.perf_counter()
        whole = np.asarray(array[:])
        total = 0.0
        for row in range(0, array.shape[0], data.SLAB):
            total += float(whole[row : row + data.SLAB].sum(dtype=np.float64))
        elapsed = time.perf_counter() - start
        return Sample(array.nbytes / elapsed / 1e9, check=total)

    yield measure


@contextmanager
def python_source_scan(nbytes: int) -> Iterator[Measure]:
    import numpy as np

    from benchmarks.pattern import Pattern

    yield _scan_of(lambda: Pattern(nbytes), nbytes, dtype=np.uint64, shape=(nbytes // 8,))


@contextmanager
def memory_source_scan(nbytes: int) -> Iterator[Measure]:
    import numpy as np

    from benchmarks.pattern import pattern

    words = np.frombuffer(pattern(nbytes), dtype=np.uint64)
    yield _scan_of(lambda: words, nbytes)


def _scan_of(make: Callable[[], Any], nbytes: int, **description: Any) -> Measure:
    import userfault

    def measure(_repetition: int) -> Sample:
        array = userfault.open(make(), block="64 KiB", memory=nbytes // 2, **description)
        with userfault.memory_of(array):
            start = time.perf_counter()
            total = int(array.sum())
            elapsed = time.perf_counter() - start
            del array
        return Sample(nbytes / elapsed / 1e9, check=total)

    return measure
