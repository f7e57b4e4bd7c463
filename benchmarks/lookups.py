"""Look-ups of single elements in a zstd Zarr array: at a budget of a quarter of it, and once all is resident.

Every reader has the same budget for decoded bytes and the same list of look-ups. The warm-up repetition fills
the caches, so what counts is the steady state.
"""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from benchmarks import data
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, Target, at_least, at_most

MIB = 2**20
KEYS = 100_000
"""How many different elements the Zipf look-ups choose from; they lie anywhere in the array."""


def comparisons(scale: Scale) -> Iterator[Comparison]:
    cube = data.QUICK_CUBE if scale.quick else data.CUBE
    narrow = data.QUICK_NARROW if scale.quick else data.NARROW
    # Memory is linear: a page is part of a line along the last axis (or some lines), and needs every chunk that
    # the line crosses. The others decode one chunk. So cubes come in two shapes: 8 and 4 chunks in a line.
    layouts: tuple[tuple[str, data.Shape, data.Shape, Target], ...] = (
        ("rows", cube, (1, *cube[1:]), at_most(1.0)),
        ("cubes8", cube, (64, 64, 64), at_most(2.0)),
        ("cubes4", narrow, (64, 64, 64), at_most(2.0)),
    )
    for layout, shape, chunk, target in layouts:
        path = str(data.zarr_field(scale.data, shape, chunk))
        budget = data.nbytes(shape) // 4
        for pattern in ("uniform", "zipf"):
            common = {"path": path, "budget": budget, "pattern": pattern, "count": 20 if scale.quick else 200}
            yield Comparison(
                name=f"{layout}-{pattern}",
                unit="µs/look-up",
                ours=Side("benchmarks.lookups:userfault_lookups", common),
                references=_cached_readers(common, target),
                source=f"zstd Zarr v3, {data.nbytes(shape) // MIB} MiB of float32, {shape} in chunks of {chunk}, "
                f"budget {budget // MIB} MiB; {pattern} look-ups"
                + (f" (exponent 0.99, {KEYS:,} keys)" if pattern == "zipf" else ""),
            )
    path = str(data.zarr_field(scale.data, cube, (1, *cube[1:])))
    yield from _resident(path, data.nbytes(cube), scale.quick)


def _cached_readers(common: dict[str, Any], target: Target) -> tuple[Reference, ...]:
    references = [
        Reference("zarr-lru", Side("benchmarks.lookups:zarr_lru_lookups", common), target),
        Reference("tensorstore", Side("benchmarks.lookups:tensorstore_lookups", common), target),
    ]
    if importlib.util.find_spec("zarr.experimental.cache_store"):  # zarr 3.1.4 and newer
        references.append(
            Reference("zarr-cachestore", Side("benchmarks.lookups:zarr_cachestore_lookups", common), target)
        )
    return tuple(references)


def _resident(path: str, nbytes: int, quick: bool) -> Iterator[Comparison]:
    """Scalar and vectorised, in look-ups a second: a ratio of 5000 means 5000 times faster."""
    for name, ours, theirs, target in (
        ("scalar", 100_000, 50, at_least(5000)),
        ("vectorised", 1_000_000, 1000, None),
    ):
        yield Comparison(
            name=f"resident-{name}",
            unit="look-ups/s",
            ours=Side("benchmarks.lookups:userfault_resident", {"path": path, "count": ours, "how": name}),
            references=(
                Reference(
                    "zarr",
                    Side(
                        "benchmarks.lookups:zarr_direct",
                        {"path": path, "count": theirs // 10 if quick else theirs, "how": name},
                    ),
                    target,
                ),
            ),
            source=f"the array of rows, all {nbytes // MIB} MiB resident; zarr without a cache; {name}: "
            + (
                "a[i, j, k] in a Python loop"
                if name == "scalar"
                else "a[i, j, k] with index arrays (zarr: vindex)"
            ),
        )


def positions(pattern: str, shape: tuple[int, ...], count: int, repetition: int) -> Any:
    """(count, 3) indices; the same for every reader."""
    import numpy as np

    random = np.random.default_rng(1000 + repetition)
    if pattern == "uniform":
        return random.integers(0, shape, size=(count, 3))
    keys = np.random.default_rng(1).integers(0, shape, size=(KEYS, 3))
    weights = np.arange(1, KEYS + 1, dtype=np.float64) ** -0.99
    return keys[random.choice(KEYS, size=count, p=weights / weights.sum())]


def _look_up(element: Any, shape: tuple[int, ...], pattern: str, count: int) -> Measure:
    """Times `element[i, j, k]` one by one; the warm-up does twice as many."""

    def measure(repetition: int) -> Sample:
        places = positions(pattern, shape, count if repetition else 2 * count, repetition).tolist()
        clock = time.perf_counter_ns
        total = 0.0
        times = [clock()]
        for i, j, k in places:
            total += float(element[i, j, k])
            times.append(clock())
        single = sorted(after - before for before, after in pairwise(times))
        extra = {"p50": single[len(single) // 2] / 1e3, "p99": single[len(single) * 99 // 100] / 1e3}
        return Sample((times[-1] - times[0]) / len(places) / 1e3, check=total, extra=extra)

    return measure


@contextmanager
def userfault_lookups(path: str, budget: int, pattern: str, count: int) -> Iterator[Measure]:
    import userfault

    array = userfault.open(path, memory=budget)
    yield _look_up(array, array.shape, pattern, count)


@contextmanager
def zarr_lru_lookups(path: str, budget: int, pattern: str, count: int) -> Iterator[Measure]:
    import zarr

    from benchmarks.lru import ChunkCache

    array = zarr.open_array(path, mode="r")
    yield _look_up(ChunkCache(array, budget), array.shape, pattern, count)


@contextmanager
def zarr_cachestore_lookups(path: str, budget: int, pattern: str, count: int) -> Iterator[Measure]:
    """zarr's own cache keeps *encoded* chunks: the budget holds more of them, each look-up decodes one."""
    import zarr
    from zarr.experimental.cache_store import CacheStore
    from zarr.storage import LocalStore, MemoryStore

    store = CacheStore(LocalStore(path, read_only=True), cache_store=MemoryStore(), max_size=budget)
    array = zarr.open_array(store, mode="r")
    yield _look_up(array, array.shape, pattern, count)


class _TensorStore:
    def __init__(self, store: Any) -> None:
        self._store = store

    def __getitem__(self, index: tuple[int, ...]) -> Any:
        return self._store[index].read().result()


def open_tensorstore(path: str, budget: int) -> Any:
    """A Zarr array through tensorstore with a cache of decoded chunks of `budget` bytes."""
    import tensorstore

    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": path},
            "context": {"cache_pool": {"total_bytes_limit": budget}},
            "recheck_cached_data": False,  # else every look-up asks the file system whether its chunk changed
        },
        open=True,
        read=True,
    ).result()


@contextmanager
def tensorstore_lookups(path: str, budget: int, pattern: str, count: int) -> Iterator[Measure]:
    store = open_tensorstore(path, budget)
    yield _look_up(_TensorStore(store), store.shape, pattern, count)


@contextmanager
def userfault_resident(path: str, count: int, how: str) -> Iterator[Measure]:
    import userfault

    array = userfault.open(path, memory="4 GiB")
    userfault.memory_of(array).prefetch(wait=True)
    yield _rate(array, array.shape, count, how)


@contextmanager
def zarr_direct(path: str, count: int, how: str) -> Iterator[Measure]:
    import zarr

    array = zarr.open_array(path, mode="r")
    yield _rate(array, array.shape, count, how)


def _rate(array: Any, shape: tuple[int, ...], count: int, how: str) -> Measure:
    """Look-ups a second. The scalar loop sums nothing: that would cost as much as a resident look-up."""
    import numpy as np

    def measure(repetition: int) -> Sample:
        places = positions("uniform", shape, count, repetition)
        if how == "scalar":
            indices = [tuple(place) for place in places.tolist()]
            start = time.perf_counter()
            for index in indices:
                array[index]
        else:
            i, j, k = (np.ascontiguousarray(axis) for axis in places.T)
            element = array if isinstance(array, np.ndarray) else array.vindex
            start = time.perf_counter()
            element[i, j, k]
        return Sample(count / (time.perf_counter() - start))

    return measure
