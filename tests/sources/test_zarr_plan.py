"""Plans made from the metadata text are those that zarr's own objects give."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from userfault.sources._zarr_json import is_array, plan_v2, plan_v3
from userfault.sources._zarr_library import plan_of

DTYPES = ["?", "i1", "u1", "<i2", ">i2", "<u4", ">i8", "<f2", "<f4", ">f8", "<c8", "<c16"]


def document(folder: Path, zarr_format: int) -> bytes:
    return (folder / ("zarr.json" if zarr_format == 3 else ".zarray")).read_bytes()


def make(folder: Path, zarr_format: int, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"shape": (7, 5, 3), "chunks": (3, 5, 2), "dtype": "f4", **options}
        zarr.create_array(str(folder), zarr_format=zarr_format, **options)  # type: ignore[arg-type]
        return zarr.open_array(str(folder), mode="r", zarr_format=zarr_format)  # type: ignore[arg-type]


def same(folder: Path, zarr_format: int, **options: Any) -> None:
    array = make(folder, zarr_format, **options)
    text = document(folder, zarr_format)
    made = plan_v3(text) if zarr_format == 3 else plan_v2(text)
    theirs = plan_of(array)
    assert made is not None
    assert theirs is not None
    # Of a codec, only what decides how to decode: its name, and for filters all of it.
    assert [codec["id"] for codec in made.codecs] == [codec["id"] for codec in theirs.codecs]
    for field in ("shape", "chunks", "dtype", "stored", "axes", "fill", "key_format", "separator"):
        assert getattr(made, field) == getattr(theirs, field), field
    for place in [(0, 0, 0), (2, 0, 1)]:
        assert made.key(place) == theirs.key(place) == array.metadata.encode_chunk_key(place)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(tmp_path: Path, zarr_format: int, dtype: str) -> None:
    if np.dtype(dtype).kind == "c":
        array = make(tmp_path, zarr_format, dtype=dtype)
        # Fill values of complex arrays have forms of their own: zarr reads them.
        assert (plan_v3 if zarr_format == 3 else plan_v2)(document(tmp_path, zarr_format)) is None
        assert plan_of(array) is not None
    else:
        same(tmp_path, zarr_format, dtype=dtype)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("fill", [0, 1.5, -0.0, float("nan"), float("inf"), float("-inf")], ids=str)
def test_fill_values(tmp_path: Path, zarr_format: int, fill: float) -> None:
    same(tmp_path, zarr_format, fill_value=fill)


@pytest.mark.parametrize("order", ["C", "F"])
def test_v2_orders(tmp_path: Path, order: str) -> None:
    same(tmp_path, 2, order=order)


@pytest.mark.parametrize("separator", [".", "/"])
def test_v2_separators(tmp_path: Path, separator: str) -> None:
    same(tmp_path, 2, chunk_key_encoding={"name": "v2", "separator": separator})


@pytest.mark.parametrize(
    "compressor",
    [
        None,
        numcodecs.Zstd(1),
        numcodecs.Blosc(),
        numcodecs.LZ4(),
        numcodecs.GZip(1),
        numcodecs.Zlib(1),
        numcodecs.BZ2(1),
    ],
    ids=str,
)
def test_v2_compressors(tmp_path: Path, compressor: Any) -> None:
    same(tmp_path, 2, compressors=compressor)


def test_v2_filters(tmp_path: Path) -> None:
    same(tmp_path, 2, dtype="i4", filters=[numcodecs.Delta("i4")], compressors=numcodecs.Zstd(1))


@pytest.mark.parametrize(
    "compressors",
    [
        (),
        (zarr.codecs.ZstdCodec(level=1),),
        (zarr.codecs.BloscCodec(),),
        (zarr.codecs.GzipCodec(level=1),),
        (zarr.codecs.Crc32cCodec(),),
        (zarr.codecs.ZstdCodec(level=1), zarr.codecs.Crc32cCodec()),
    ],
    ids=["none", "zstd", "blosc", "gzip", "crc32c", "zstd-crc32c"],
)
def test_v3_compressors(tmp_path: Path, compressors: Any) -> None:
    same(tmp_path, 3, compressors=compressors)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)], ids=str)
def test_v3_transpositions(tmp_path: Path, order: tuple[int, ...]) -> None:
    same(tmp_path, 3, filters=[zarr.codecs.TransposeCodec(order=order)])


def test_v3_two_transpositions(tmp_path: Path) -> None:
    orders = [(1, 2, 0), (0, 2, 1)]
    same(tmp_path, 3, filters=[zarr.codecs.TransposeCodec(order=order) for order in orders])


@pytest.mark.parametrize("endian", ["big", "little"])
def test_v3_byte_orders(tmp_path: Path, endian: str) -> None:
    same(tmp_path, 3, serializer=zarr.codecs.BytesCodec(endian=endian))


@pytest.mark.parametrize(
    "encoding",
    [
        {"name": "default", "separator": "/"},
        {"name": "default", "separator": "."},
        {"name": "v2", "separator": "."},
        {"name": "v2", "separator": "/"},
    ],
    ids=str,
)
def test_v3_keys(tmp_path: Path, encoding: Any) -> None:
    same(tmp_path, 3, chunk_key_encoding=encoding)


def test_what_is_left_to_zarr(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"dtype": "datetime64[s]"},
        {"dtype": "S5"},
        {"dtype": "U5"},
        {"dtype": [("a", "i4"), ("b", "f8")], "fill_value": None},
        {"shards": (6, 5, 4)},
    ]
    for number, options in enumerate(cases):
        folder = tmp_path / str(number)
        make(folder, 3, **options)
        assert plan_v3(document(folder, 3)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_type", "float128"),
        ("data_type", {"name": "numpy.datetime64"}),
        ("chunk_grid", {"name": "rectilinear", "configuration": {}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [0, 5, 2]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [3, 5]}}),
        ("shape", [7, 5, -3]),
        ("shape", [7, 5, 3.0]),
        ("shape", None),
        ("fill_value", "0x7fc00000"),
        ("fill_value", None),
        ("codecs", []),
        ("codecs", [{"name": "bytes"}]),
        ("codecs", [{"name": "sharding_indexed", "configuration": {}}]),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "new"}]),
        ("chunk_key_encoding", {"name": "new"}),
        ("storage_transformers", [{"name": "new"}]),
        ("something", {"must_understand": True}),
    ],
)
def test_what_is_uncertain_gives_no_plan(tmp_path: Path, key: str, value: Any) -> None:
    make(tmp_path, 3)
    meta = json.loads(document(tmp_path, 3))
    assert plan_v3(json.dumps(meta).encode()) is not None
    meta[key] = value
    assert plan_v3(json.dumps(meta).encode()) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b"\xff"])
def test_malformed_documents_give_no_plan(text: bytes) -> None:
    assert plan_v3(text) is None
    assert plan_v2(text) is None
    assert is_array(text, 3) is None
