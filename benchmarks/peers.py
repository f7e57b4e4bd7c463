"""The plain bytes through userfault's file source and through what people use today. No targets: to know.

userfault and `numpy.memmap` read a `.npy` file, fsspec's block cache the bytes of the same file, zarr and
tensorstore an uncompressed Zarr array of the same values. Caches have a budget of a quarter of the data;
`numpy.memmap` has none (it uses the page cache). Everything is in the page cache before it starts.
"""

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from benchmarks import data
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side

MIB = 2**20
KIB = 1024


def comparisons(scale: Scale) -> Iterator[Comparison]:
    shape = data.QUICK_CUBE if scale.quick else data.CUBE
    side, nbytes = shape[0], data.nbytes(shape)
    npy = str(data.npy_field(scale.data, shape))
    plain = str(data.zarr_field(scale.data, shape, (1, side, side), compressed=False))
    budget = nbytes // 4
    readers: dict[str, tuple[str, dict[str, Any]]] = {
        "memmap": ("benchmarks.peers:memmap", {"path": npy}),
        "zarr": ("benchmarks.peers:zarr_slicing", {"path": plain}),
        "tensorstore": ("benchmarks.peers:tensorstore_cache", {"path": plain, "budget": budget}),
        "fsspec": ("benchmarks.peers:fsspec_block_cache", {"path": npy, "budget": budget, "side": side}),
    }
    for name, unit, reads in (("random-4k", "µs/read", 50 if scale.quick else 1000), ("scan", "GB/s", 0)):
        yield Comparison(
            name=name,
            unit=unit,
            ours=Side("benchmarks.peers:userfault_file", {"path": npy, "budget": budget, "reads": reads}),
            references=tuple(
                Reference(label, Side(factory, {**arguments, "reads": reads}))
                for label, (factory, arguments) in readers.items()
            ),
            source=f"plain .npy (zarr, tensorstore: the same uncompressed), {nbytes // MIB} MiB, budget "
            f"{budget // MIB} MiB; " + ("random reads of 4 KiB" if reads else "sum from end to end"),
        )


class Reader(Protocol):
    def page(self, i: int, j: int, rows: int) -> Any:
        """`rows` whole rows from [i, j] on: 4 KiB."""

    def slab(self, i: int, count: int) -> Any: ...


class _Sliced:
    """Anything that is sliced like an array."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def page(self, i: int, j: int, rows: int) -> Any:
        return self._array[i, j : j + rows]

    def slab(self, i: int, count: int) -> Any:
        return self._array[i : i + count]


def _measure(reader: Reader, side: int, reads: int) -> Measure:
    """Random reads if there are any, else one pass over everything."""
    import numpy as np

    rows = 4 * KIB // (4 * side)

    def random_reads(repetition: int) -> Sample:
        random = np.random.default_rng(repetition)
        places = np.column_stack(
            (random.integers(0, side, reads), random.integers(0, side // rows, reads) * rows)
        )
        total = 0.0
        start = time.perf_counter()
        for i, j in places.tolist():
            total += float(reader.page(i, j, rows).sum(dtype=np.float64))
        return Sample((time.perf_counter() - start) / reads * 1e6, check=total)

    def scan(_repetition: int) -> Sample:
        total = 0.0
        start = time.perf_counter()
        for i in range(0, side, data.SLAB):
            total += float(reader.slab(i, data.SLAB).sum(dtype=np.float64))
        return Sample(4 * side**3 / (time.perf_counter() - start) / 1e9, check=total)

    return random_reads if reads else scan


@contextmanager
def userfault_file(path: str, budget: int, reads: int) -> Iterator[Measure]:
    import userfault

    array = userfault.open(path, memory=budget)
    yield _measure(_Sliced(array), array.shape[0], reads)


@contextmanager
def memmap(path: str, reads: int) -> Iterator[Measure]:
    import numpy as np

    array = np.load(path, mmap_mode="r")
    yield _measure(_Sliced(array), array.shape[0], reads)


@contextmanager
def zarr_slicing(path: str, reads: int) -> Iterator[Measure]:
    import zarr

    array = zarr.open_array(path, mode="r")
    yield _measure(_Sliced(array), array.shape[0], reads)


class _TensorStore(_Sliced):
    def page(self, i: int, j: int, rows: int) -> Any:
        return super().page(i, j, rows).read().result()

    def slab(self, i: int, count: int) -> Any:
        return super().slab(i, count).read().result()


@contextmanager
def tensorstore_cache(path: str, budget: int, reads: int) -> Iterator[Measure]:
    from benchmarks.lookups import open_tensorstore

    store = open_tensorstore(path, budget)
    yield _measure(_TensorStore(store), store.shape[0], reads)


class _BlockCache:
    """fsspec's block cache over the file, as its remote file systems use it, in blocks of 64 KiB."""

    def __init__(self, fd: int, offset: int, nbytes: int, budget: int, side: int) -> None:
        # By name: fsspec carries no types.
        caching: Any = importlib.import_module("fsspec.caching")
        block = 64 * KIB
        self._side = side
        self._cache = caching.BlockCache(
            block,
            lambda start, end: os.pread(fd, end - start, offset + start),
            nbytes,
            maxblocks=budget // block,
        )

    def _read(self, first: int, count: int) -> Any:
        import numpy as np

        return np.frombuffer(self._cache._fetch(4 * first, 4 * (first + count)), dtype=np.float32)

    def page(self, i: int, j: int, rows: int) -> Any:
        rows_read = self._read((i * self._side + j) * self._side, rows * self._side)
        return rows_read.reshape(rows, self._side)

    def slab(self, i: int, count: int) -> Any:
        plane = self._side**2
        return self._read(i * plane, count * plane).reshape(count, self._side, self._side)


@contextmanager
def fsspec_block_cache(path: str, budget: int, side: int, reads: int) -> Iterator[Measure]:
    fd = os.open(path, os.O_RDONLY)
    try:
        nbytes = 4 * side**3
        offset = os.fstat(fd).st_size - nbytes
        yield _measure(_BlockCache(fd, offset, nbytes, budget, side), side, reads)
    finally:
        os.close(fd)
