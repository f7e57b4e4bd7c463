"""Headers of files: .npy, .safetensors and raw bytes, right, damaged and cut short."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.errors import FormatError, RangeError, TruncatedError, UnsupportedDtypeError
from userfault.sources._layout import ArrayLayout, as_order, as_shape, raw_layout
from userfault.sources._npy import npy_layout
from userfault.sources._safetensors import TensorInfo, TensorTable, tensor_dtype, tensor_table

STRUCT = np.dtype([("a", "<i4"), ("b", "<f8", (2,)), ("c", "S3")], align=True)


def reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: content[offset : offset + length]


def npy(array: np.ndarray[Any, Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def layout_of(content: bytes) -> ArrayLayout:
    return npy_layout(reader(content), len(content), "a.npy")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "dtype", ["u1", "<f4", ">i8", "c16", "?", "S5", "U2", "M8[ns]", "V3", STRUCT], ids=str
)
def test_npy(version: tuple[int, int], order: Any, dtype: Any) -> None:
    array = np.zeros((3, 4, 5), dtype, order=order)
    content = npy(array, version)
    layout = layout_of(content)
    assert layout == ArrayLayout(array.dtype, (3, 4, 5), order, len(content) - array.nbytes)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (1, 1)], ids=str)
def test_npy_shapes(shape: tuple[int, ...]) -> None:
    layout = layout_of(npy(np.zeros(shape)))
    assert (layout.shape, layout.order) == (shape, "C")


def test_npy_of_python_2() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(24)
    assert layout_of(content).shape == (2, 3)


def test_npy_of_objects() -> None:
    with pytest.raises(UnsupportedDtypeError, match="Python objects"):
        layout_of(npy(np.array([None])))


def test_npy_cut_anywhere_is_an_error() -> None:
    content = npy(np.arange(10))
    for length in range(len(content)):
        with pytest.raises(FormatError):
            layout_of(content[:length])
        if length >= 6:
            with pytest.raises(TruncatedError):
                layout_of(content[:length])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"{'descr': '<f4', 'fortran_order': False}",
        b"{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': [1]}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1.0,)}",
        b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': __import__('os'), 'fortran_order': False, 'shape': (1,)}",
        b"(" * 5000,
    ],
    ids=lambda header: header[:60].decode(),
)
def test_npy_headers_that_make_no_sense(header: bytes) -> None:
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    with pytest.raises(FormatError):
        layout_of(content)


@pytest.mark.parametrize(
    "content",
    [b"\x93NUMPY\x04\x00" + bytes(20), b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(20), b"PK" * 20],
)
def test_not_npy(content: bytes) -> None:
    with pytest.raises(FormatError):
        layout_of(content)


@given(st.binary(max_size=200))
def test_npy_never_raises_anything_else(tail: bytes) -> None:
    for content in (tail, b"\x93NUMPY" + tail, b"\x93NUMPY\x01\x00" + tail):
        with contextlib.suppress(FormatError, UnsupportedDtypeError):
            layout_of(content)


def raw(dtype: str, shape: Any, offset: int, available: int) -> ArrayLayout:
    return raw_layout(np.dtype(dtype), shape, offset, "C", available, "a.bin")


def test_raw_without_a_shape_takes_everything() -> None:
    assert raw("f4", None, 0, 40).shape == (10,)
    assert raw("f4", None, 4, 40) == ArrayLayout(np.dtype("f4"), (9,), "C", 4)
    assert raw("f4", None, 40, 40).shape == (0,)
    with pytest.raises(FormatError, match="not a multiple of the 4 bytes"):
        raw("f4", None, 0, 41)


def test_raw_with_a_shape_may_be_longer_but_not_shorter() -> None:
    assert raw("f4", (2, 5), 0, 100).nbytes == 40
    assert raw("f4", (), 96, 100).nbytes == 4
    with pytest.raises(TruncatedError, match="needs 104 bytes, but there are 100"):
        raw("f4", (2, 13), 0, 100)
    with pytest.raises(RangeError, match="offset=101"):
        raw("f4", (2,), 101, 100)


def test_shapes_and_orders() -> None:
    assert as_shape(3) == as_shape([3]) == as_shape(np.array([3])) == (3,)
    assert as_shape(np.int64(3)) == (3,)
    for bad in ("ab", (1, -1), (1.5,), -1, None):
        with pytest.raises(RangeError):
            as_shape(bad)  # type: ignore[arg-type]
    assert (as_order("C"), as_order("F")) == ("C", "F")
    with pytest.raises(FormatError):
        as_order("A")


def tensors(header: Any, data: int, pad: int = 0) -> tuple[TensorTable, bytes]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    content = struct.pack("<Q", len(text)) + text + bytes(data)
    return tensor_table(reader(content), len(content), "a.safetensors"), content


def test_safetensors() -> None:
    table, content = tensors(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
            "e": {"dtype": "I64", "shape": [0, 4], "data_offsets": [24, 24]},
        },
        26,
        pad=5,
    )
    assert list(table.tensors) == ["a", "b", "e"]
    assert table.tensors["a"] == TensorInfo("F32", (2, 3), 0, 24)
    assert table.metadata == {"format": "pt"}
    assert table.nbytes == 26
    assert table.offset == len(content) - 26
    assert TensorTable.from_extra(json.loads(json.dumps(table.to_extra()))) == table


def test_safetensors_of_the_library() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {"x": np.arange(12, dtype="i2").reshape(3, 4), "y": np.array(True), "z": np.zeros((2,), "f8")}
    content = safetensors.save(arrays, {"k": "v"})
    table = tensor_table(reader(content), len(content), "a")
    assert set(table.tensors) == set(arrays)
    for name, array in arrays.items():
        info = table.tensors[name]
        part = content[table.offset + info.start : table.offset + info.stop]
        assert np.frombuffer(part, tensor_dtype(name, info)).reshape(info.shape).tolist() == array.tolist()


@pytest.mark.parametrize(
    ("header", "data", "error", "message"),
    [
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
            7,
            TruncatedError,
            "needs?.* but there are",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 8, FormatError, "has 4 bytes, but"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, FormatError, "natural numbers"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8, FormatError, "has -8 bytes"),
        ({"a": {"dtype": "X9", "shape": [2], "data_offsets": [8, 0]}}, 8, FormatError, "before it begins"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, FormatError, "cannot be understood"),
        ({"a": 3}, 8, FormatError, "cannot be understood"),
        (b"{", 8, FormatError, "cannot be understood"),
        (b"[1]", 8, FormatError, "header begins with"),
        (b'{"a": {}, "a": {}}', 8, FormatError, "occurs twice"),
        (
            {
                "a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
                "b": {"dtype": "U8", "shape": [5], "data_offsets": [4, 9]},
            },
            9,
            FormatError,
            "overlaps",
        ),
    ],
    ids=range(11),
)
def test_safetensors_headers_that_make_no_sense(
    header: Any, data: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tensors(header, data)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 1 << 60) + b"{}"]
)
def test_safetensors_cut_short(content: bytes) -> None:
    with pytest.raises(FormatError):
        tensor_table(reader(content), len(content), "a")


def test_types_beyond_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    info = TensorInfo("BF16", (2,), 0, 4)
    assert tensor_dtype("w", info).name == "bfloat16"
    with pytest.raises(UnsupportedDtypeError, match="tensor 'w' has dtype F4"):
        tensor_dtype("w", TensorInfo("F4", (2,), 0, 1))
    monkeypatch.setattr("userfault.sources._dtypes.extension_dtype", lambda name: None)
    monkeypatch.setattr("userfault.sources._safetensors.extension_dtype", lambda name: None)
    with pytest.raises(UnsupportedDtypeError, match=r"needs ml_dtypes: pip install 'userfault\[ml\]'"):
        tensor_dtype("w", info)
