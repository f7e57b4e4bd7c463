"""Zarr arrays that are written, against a plain array and zarr's own reading."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sources.test_zarr import arrays
from support.zarrs import as_bytes, reread, store_of
from userfault.errors import ModeError
from userfault.sources._abc import ArraySource
from userfault.sources._location import Location
from userfault.sources._stores._dict import DictStore
from userfault.sources._stores._zarr import ZarrKeyStore
from userfault.sources._zarr_object import zarr_recipe
from userfault.sources._zarr_recipe import ZarrRecipe, ZarrStoreRecipe
from userfault.sources._zarr_store import ZarrSlicedStore, ZarrStore


def write_at_random(store: Any, array: Any, seed: int, writes: int = 12) -> None:
    """Write random ranges, and compare with what this store and zarr read."""
    rng = random.Random(seed)
    model = bytearray(as_bytes(reread(array), store.order))
    for number in range(writes):
        if number == writes // 2:
            store.set_cache(1 << 20)
        start, stop = sorted(rng.randrange(len(model) + 1) for _ in range(2))
        # Booleans have two values, and zeros may be left out.
        content = (
            bytes(rng.randrange(2) for _ in range(stop - start))
            if rng.random() < 0.7
            else bytes(stop - start)
        )
        model[start:stop] = content
        store.write_from(start, memoryview(content))
        buffer = bytearray(len(model))
        store.read_into(0, memoryview(buffer))
        assert buffer == model
    assert as_bytes(reread(array), store.order) == model


@given(arrays(), st.sampled_from([None, "C", "F"]))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_array_that_is_decoded_here(case: tuple[dict[str, Any], int], order: Any) -> None:
    options, seed = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array({}, **options)
    store = store_of(array, order)
    try:
        assert isinstance(store, ZarrStore)
        write_at_random(store, array, seed)
    finally:
        store.close()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "options",
    [
        {"shards": (6, 8), "chunks": (3, 2), "dtype": "i4"},
        {"shards": (6, 8), "chunks": (3, 8), "dtype": "i4", "fill_value": 7},
        {"shards": (4, 12), "chunks": (2, 3), "dtype": "f8"},
        {
            "shards": (6, 4),
            "chunks": (3, 2),
            "dtype": "i4",
            "filters": [zarr.codecs.TransposeCodec(order=(1, 0))],
        },
    ],
    ids=["sharded", "fill value", "one column of shards", "transposed"],
)
def test_shards(options: dict[str, Any], order: Any) -> None:
    array = zarr.create_array({}, shape=(11, 9), **options)
    store = store_of(array, order)
    try:
        assert isinstance(store, ZarrSlicedStore)
        assert store.lossless
        write_at_random(store, array, 1, writes=30)
    finally:
        store.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["M8[s]", "S5", "U3", [("a", "<i2"), ("b", "<f8"), ("c", "S3")]], ids=str)
def test_types_whose_elements_do_not_divide_a_block(zarr_format: Any, dtype: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array({}, shape=(5, 4), chunks=(2, 3), dtype=dtype, zarr_format=zarr_format)
        store = store_of(array)
        try:
            write_at_random(store, array, 1, writes=30)
        finally:
            store.close()


def test_codecs_of_numcodecs_in_v3() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from zarr.codecs.numcodecs import Delta

        array = zarr.create_array({}, shape=(110,), chunks=(40,), dtype="i4", filters=[Delta(dtype="i4")])
        store = store_of(array)
        try:
            assert not store.lossless, "nothing is known of it here"
            write_at_random(store, array, 1)
        finally:
            store.close()


def test_a_lossy_codec_shows_what_is_stored() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filters = [numcodecs.Quantize(digits=1, dtype="f4")]
        array = zarr.create_array({}, shape=(64,), chunks=(64,), dtype="f4", zarr_format=2, filters=filters)
    store = store_of(array)
    store.set_cache(1 << 20)
    values = np.linspace(0, 1, 64, dtype="f4")
    store.write_from(0, memoryview(values).cast("B"))
    got = np.empty(64, "f4")
    store.read_into(0, memoryview(got).cast("B"))
    store.close()
    assert (got != values).any()
    assert (got == reread(array)[:]).all()


@pytest.mark.parametrize("options", [{}, {"shards": (64,)}], ids=["chunks", "shards"])
@pytest.mark.parametrize(
    ("dtype", "fill", "odd"),
    [
        ("<f8", 0.0, np.float64(-0.0).tobytes()),
        ("<f8", float("nan"), np.uint64(0x7FF8_0000_0000_0001).tobytes()),
        ("<c16", 0j, np.complex128(complex(-0.0, 0.0)).tobytes()),
        ("<f4", 0.0, np.float32(-0.0).tobytes()),
    ],
    ids=["-0.0", "another NaN", "complex", "single"],
)
def test_what_equals_the_fill_value_is_not_lost(
    dtype: str, fill: Any, odd: bytes, options: dict[str, Any]
) -> None:
    array = zarr.create_array({}, shape=(64,), chunks=(16,), dtype=dtype, fill_value=fill, **options)
    store = store_of(array)
    content = odd * 64
    store.write_from(0, memoryview(content))
    store.close()
    assert as_bytes(reread(array), "C") == content


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as zipped:
        zarr.create_array(zipped, shape=(4,), chunks=(2,), dtype="i4")
    with pytest.raises(ModeError, match="is a ZIP file, whose members cannot be replaced: unpack it"):
        ZarrRecipe(Location.parse(tmp_path / "a.zip"), mode="r+").load()
    held = zarr.create_array({}, shape=(4,), chunks=(2,), dtype="i4")
    with pytest.raises(ModeError, match=r"in the memory of this process.*mode='c'"):
        zarr_recipe(held, None, "r+")
    with pytest.raises(ModeError, match="in the memory of the program"):
        ZarrStoreRecipe(DictStore({"zarr.json": held.store_path.store._store_dict["zarr.json"].to_bytes()}, "x"), "x",
                        mode="r+").load()  # fmt: skip
    zarr.create_array(tmp_path / "b", shape=(4,), chunks=(2,), dtype="i4")
    with pytest.raises(ModeError, match=r"opened for reading.*mode='r\+'"):
        zarr_recipe(zarr.open_array(tmp_path / "b", mode="r"), None, "r+")
    store = zarr.storage.MemoryStore(held.store_path.store._store_dict, read_only=True)
    with pytest.raises(ModeError, match="MemoryStore was opened read-only"):
        ZarrStoreRecipe(ZarrKeyStore(store, ""), "x", mode="r+").load()


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr.create_array(tmp_path / "a", shape=(4,), chunks=(2,), dtype="i4")
    # Root may write anywhere: what it would be told is not what others are.
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    with pytest.raises(ModeError, match="may not be written by this user"):
        ZarrRecipe(Location.parse(tmp_path / "a"), mode="r+").load()


def test_arrays_without_elements(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(3, 0), chunks=(1, 1), dtype="f4")
    source = ZarrRecipe(Location.parse(tmp_path / "a"), mode="r+").load()
    assert (source.nbytes, source.shape) == (0, (3, 0))
    source.close()


def test_a_store_is_an_array() -> None:
    store = store_of(zarr.create_array({}, shape=(4, 4), chunks=(2, 2), dtype="f4"))
    assert isinstance(store, ArraySource)
    store.close()
