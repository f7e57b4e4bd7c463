"""Zarr arrays read directly, against zarr's own slicing."""

from __future__ import annotations

import random
import threading
import warnings
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.zarrs import content_of
from userfault.errors import FormatError, UnsupportedDtypeError
from userfault.sources._abc import ArraySource, PageSource
from userfault.sources._location import Location
from userfault.sources._stores._dict import DictStore
from userfault.sources._zarr import ZarrSlicedSource, ZarrSource, load_zarr
from userfault.sources._zarr_recipe import ZarrRecipe, ZarrStoreRecipe
from userfault.testing import PageSourceTests

PLAIN = ["?", "i1", "<i2", ">i4", "<u8", "<f2", "<f4", ">f8", "<c8"]
ODD = ["M8[s]", "m8[ns]", "S5", "U3", "V7", [("a", "<i2"), ("b", "<f8"), ("c", "S3")]]


def expected_bytes(array: Any, order: str) -> bytes:
    # Without axes zarr gives a scalar, which has no byte order.
    whole = np.asarray(array[...] if array.shape else array[()], array.dtype)
    return whole.tobytes(order)  # type: ignore[arg-type]


def check(source: ArraySource, array: Any, seed: int, reads: int = 25) -> None:
    expected = expected_bytes(array, source.order)
    assert source.dtype == array.dtype
    assert source.shape == array.shape
    assert source.nbytes == len(expected)
    rng = random.Random(seed)
    ranges = [(0, len(expected))]
    for _ in range(reads):
        start = rng.randrange(len(expected) + 1)
        ranges.append((start, rng.randrange(start, len(expected) + 1)))
    for cache in (0, 1 << 20):
        source.set_cache(cache)
        for start, stop in ranges:
            buffer = bytearray(b"\xa5" * (stop - start))
            source.read_into(start, memoryview(buffer))
            assert buffer == expected[start:stop], (start, stop)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Options of a Zarr array of any kind that is read directly, and a seed for its content."""
    zarr_format = draw(st.sampled_from([2, 3]))
    dtype = draw(st.sampled_from(PLAIN))
    ndim = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(1, 12)) for _ in range(ndim))
    chunks = tuple(draw(st.integers(1, n + 3)) for n in shape)
    options: dict[str, Any] = {"zarr_format": zarr_format, "dtype": dtype, "shape": shape, "chunks": chunks}
    kind = np.dtype(dtype).kind
    if zarr_format == 2:
        options["order"] = draw(st.sampled_from(["C", "F"]))
        options["compressors"] = draw(
            st.sampled_from(
                [
                    None,
                    numcodecs.Zstd(1),
                    numcodecs.Blosc(),
                    numcodecs.LZ4(),
                    numcodecs.GZip(1),
                    numcodecs.Zlib(1),
                ]
            )
        )
        if kind in "iu" and draw(st.booleans()):
            options["filters"] = [numcodecs.Delta(dtype)]
    else:
        options["compressors"] = draw(
            st.sampled_from(
                [
                    (),
                    (zarr.codecs.ZstdCodec(level=1),),
                    (zarr.codecs.BloscCodec(),),
                    (zarr.codecs.GzipCodec(level=1),),
                    (zarr.codecs.ZstdCodec(level=1), zarr.codecs.Crc32cCodec()),
                ]
            )
        )
        options["serializer"] = zarr.codecs.BytesCodec(endian=draw(st.sampled_from(["big", "little"])))
        if draw(st.booleans()):
            order = draw(st.permutations(range(ndim)))
            options["filters"] = [zarr.codecs.TransposeCodec(order=order)]
    options["fill_value"] = draw(st.sampled_from([0, 1])) if kind != "b" else draw(st.booleans())
    return options, draw(st.integers(0, 1 << 30))


def make(options: dict[str, Any], seed: int) -> tuple[Any, dict[str, bytes]]:
    """Create an array in memory, with random content in some of its chunks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array({}, **options)
    rng = np.random.default_rng(seed)
    if array.shape:
        # Long runs as well as noise, and a part that is not stored at all.
        data = (rng.integers(0, 7, array.shape) * rng.integers(0, 2, array.shape)).astype(array.dtype)
        cut = int(rng.integers(0, array.shape[0] + 1))
        array[:cut] = data[:cut]
    elif seed % 2:
        array[()] = np.array(seed % 5).astype(array.dtype)
    # What was created knows more than what is stored: the byte order that was asked for.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = zarr.open_array(array.store_path.store, mode="r")
    return stored, content_of(array)


@given(arrays())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_direct_reading_is_zarrs(case: tuple[dict[str, Any], int]) -> None:
    options, seed = case
    array, content = make(options, seed)
    source = load_zarr(DictStore(content, "test"), "test", None)
    try:
        assert isinstance(source, ZarrSource)
        check(source, array, seed)
    finally:
        source.close()


@given(arrays(), st.sampled_from(["C", "F"]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_memory_order_can_be_asked_for(case: tuple[dict[str, Any], int], order: Any) -> None:
    options, seed = case
    array, content = make(options, seed)
    source = load_zarr(DictStore(content, "test"), "test", order)
    try:
        assert source.order == order
        check(source, array, seed, reads=5)
    finally:
        source.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ODD, ids=str)
def test_types_that_zarr_parses(zarr_format: int, dtype: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array({}, shape=(5, 4), chunks=(2, 4), dtype=dtype, zarr_format=zarr_format)  # type: ignore[arg-type]
        array[:3] = np.frombuffer(bytes(range(1, 127)) * 9, array.dtype, 12).reshape(3, 4)
        source = load_zarr(DictStore(content_of(array), "test"), "test", None)
        try:
            check(source, array, 1)
        finally:
            source.close()


@pytest.mark.parametrize(
    "options",
    [
        {"shards": (6, 8), "chunks": (3, 2), "dtype": "i4"},
        {"shards": (6, 8), "chunks": (3, 8), "dtype": "i4", "fill_value": 7},
        {
            "chunks": (3, 2),
            "dtype": "i4",
            "filters": [zarr.codecs.TransposeCodec(order=(1, 0))],
            "shards": (6, 4),
        },
    ],
    ids=["sharded", "sharded rows", "sharded and transposed"],
)
def test_what_only_zarr_reads(options: dict[str, Any]) -> None:
    array = zarr.create_array({}, shape=(11, 9), **options)
    array[:7] = np.arange(63).reshape(7, 9)
    source = load_zarr(DictStore(content_of(array), "test"), "test", None)
    try:
        assert isinstance(source, ZarrSlicedSource)
        check(source, array, 1)
        assert source.info()["decoder"] == "zarr"
    finally:
        source.close()


def test_v3_codecs_of_numcodecs_are_left_to_zarr() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from zarr.codecs.numcodecs import Delta

        array = zarr.create_array({}, shape=(11,), chunks=(4,), dtype="i4", filters=[Delta(dtype="i4")])
        array[:] = np.arange(11)
        source = load_zarr(DictStore(content_of(array), "test"), "test", None)
        try:
            assert isinstance(source, ZarrSlicedSource)
            check(source, array, 1)
        finally:
            source.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0)], ids=str)
def test_arrays_without_elements(zarr_format: Any, shape: tuple[int, ...]) -> None:
    array = zarr.create_array({}, shape=shape, chunks=(1,) * len(shape), dtype="f4", zarr_format=zarr_format)
    source = load_zarr(DictStore(content_of(array), "test"), "test", None)
    assert (source.nbytes, source.shape, source.dtype) == (0, shape, np.dtype("f4"))
    source.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_objects_and_strings_of_any_length_are_refused(zarr_format: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array({}, shape=(3,), chunks=(3,), dtype=str, zarr_format=zarr_format)
        with pytest.raises(UnsupportedDtypeError, match="Python objects or strings of any length"):
            load_zarr(DictStore(content_of(array), "test"), "test", None)


def test_arrays_in_a_zip_file(tmp_path: Path) -> None:
    store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="w")
    group = zarr.create_group(store)
    for name, options in {"plain": {}, "sharded": {"shards": (4, 4)}}.items():
        array = group.create_array(name, shape=(8, 8), chunks=(2, 2), dtype="i4", **options)  # type: ignore[arg-type]
        array[:] = np.arange(64).reshape(8, 8)
    store.close()
    for name in ("plain", "sharded"):
        source = ZarrRecipe(Location.parse(tmp_path / "a.zip" / name)).load()
        buffer = bytearray(source.nbytes)
        source.read_into(0, memoryview(buffer))
        assert buffer == np.arange(64, dtype="i4").tobytes()
        source.close()
    with pytest.raises(FormatError, match="is a Zarr group"):
        ZarrRecipe(Location.parse(tmp_path / "a.zip")).load()


def test_each_chunk_of_a_band_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array({}, shape=(32, 64, 64), chunks=(16, 16, 16), dtype="f4")
    array[:] = np.random.default_rng(1).random((32, 64, 64), "f4")
    source = load_zarr(DictStore(content_of(array), "test"), "test", None)
    decoded: list[tuple[int, ...]] = []
    load_chunk = ZarrSource.load_chunk

    def counted(self: ZarrSource, place: tuple[int, ...], out: Any, need: int) -> int:
        decoded.append(place)
        return load_chunk(self, place, out, need)

    monkeypatch.setattr(ZarrSource, "load_chunk", counted)
    try:
        source.set_cache(source.wants_cache)
        block = 32 << 10
        for offset in range(0, source.nbytes, block):
            source.read_into(offset, memoryview(bytearray(block)))
        # The first read is a look-up for all that is known, and may decode beginnings only.
        assert len(decoded) <= 2 * 4 * 4 + 4 * 4
        assert len(set(decoded)) == 32
    finally:
        source.close()


def test_a_chunk_that_many_threads_want_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array({}, shape=(64, 64), chunks=(64, 32), dtype="f4")
    array[:] = 1
    source = load_zarr(DictStore(content_of(array), "test"), "test", None)
    decoded: list[tuple[int, ...]] = []
    load_chunk = ZarrSource.load_chunk
    threads = 8
    waiting = threading.Semaphore(0)

    def slow(self: ZarrSource, place: tuple[int, ...], out: Any, need: int) -> int:
        decoded.append(place)
        # Until all others have asked, and wait.
        waiting.acquire()
        return load_chunk(self, place, out, len(out))

    monkeypatch.setattr(ZarrSource, "load_chunk", slow)
    source.set_cache(1 << 20)
    begin = threading.Barrier(threads)
    results: list[bytes] = []

    def read() -> None:
        begin.wait()
        buffer = bytearray(256)
        source.read_into(0, memoryview(buffer))
        results.append(bytes(buffer))

    readers = [threading.Thread(target=read) for _ in range(threads)]
    try:
        for reader in readers:
            reader.start()
        waiting.release(2)
        for reader in readers:
            reader.join()
        assert sorted(decoded) == [(0, 0), (0, 1)]
        assert results == [array[0].tobytes()] * threads  # type: ignore[union-attr]
    finally:
        waiting.release(2 * threads)
        source.close()


class ZarrSuite(PageSourceTests):
    options: dict[str, Any] = {}  # noqa: RUF012 - given by the subclasses

    def array(self) -> Any:
        array = zarr.create_array({}, **{"shape": (40, 60, 50), "dtype": "f4", **self.options})
        array[:] = np.random.default_rng(1).integers(0, 50, array.shape).astype("f4")
        return array

    def source(self) -> PageSource:
        return self.recipe().load()

    def recipe(self) -> ZarrStoreRecipe:
        return ZarrStoreRecipe(DictStore(content_of(self.array()), "test"), "test")

    def expected(self) -> bytes:
        return expected_bytes(self.array(), "C")


class TestRows(ZarrSuite):
    options = {"chunks": (2, 60, 50)}  # noqa: RUF012


class TestLargeRows(ZarrSuite):
    options = {"chunks": (13, 60, 50), "compressors": (zarr.codecs.BloscCodec(),)}  # noqa: RUF012


class TestCubes(ZarrSuite):
    options = {"chunks": (16, 16, 16), "compressors": (zarr.codecs.GzipCodec(),)}  # noqa: RUF012


class TestSharded(ZarrSuite):
    reads = 20
    options = {"chunks": (10, 15, 25), "shards": (20, 30, 50)}  # noqa: RUF012
