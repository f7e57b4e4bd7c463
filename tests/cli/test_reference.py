"""The demo's second opinion reads the same elements, from every format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from userfault.cli._demo.plan import Piece, lookups, pieces, windows
from userfault.cli._demo.reference import Reference, open_reference
from userfault.cli._demo.run import digest

ARRAY = np.random.default_rng(3).standard_normal((12, 5, 7)).astype("<f4")


def check(reference: Reference, arrays: dict[str, NDArray[Any]]) -> None:
    with reference:
        plan = [*lookups(arrays, 20), *windows(arrays, 200), *pieces(arrays, 200)]
        for piece in plan:
            expected = arrays[piece.name][piece.index]
            read = reference.read(piece)
            np.testing.assert_array_equal(read, expected)
            assert digest(read) == digest(expected)


def as_url(path: Path, *, remote: bool) -> str:
    # Chained to nothing, the local file system is what fsspec calls remote: it goes through the same code.
    return f"local://{path}" if remote else str(path)


@pytest.fixture(params=[False, True], ids=["path", "fsspec"])
def remote(request: pytest.FixtureRequest) -> bool:
    if request.param:
        pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'userfault[fsspec]'")
    return bool(request.param)


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, order: str, remote: bool) -> None:
    np.save(tmp_path / "a.npy", np.asarray(ARRAY, order=order))  # type: ignore[call-overload]
    opened = ARRAY if order == "C" else np.ascontiguousarray(ARRAY.T)
    check(open_reference(as_url(tmp_path / "a.npy", remote=remote), {"": opened}), {"": opened})


def test_raw(tmp_path: Path, remote: bool) -> None:
    (tmp_path / "a.bin").write_bytes(b"head" + ARRAY.tobytes())
    check(open_reference(as_url(tmp_path / "a.bin", remote=remote), {"": ARRAY}, offset=4), {"": ARRAY})


def test_safetensors(tmp_path: Path, remote: bool) -> None:
    arrays = {"b": ARRAY, "a": np.arange(6, dtype=np.int64).reshape(2, 3), "s": np.array(7, np.int32)}
    header: dict[str, Any] = {}
    data = b""
    for name, array in arrays.items():
        header[name] = {
            "dtype": "?",
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    check(open_reference(as_url(tmp_path / "m.safetensors", remote=remote), arrays), arrays)


@pytest.mark.parametrize("transposed", [False, True])
def test_zarr(tmp_path: Path, transposed: bool) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: pip install 'userfault[zarr]'")
    zarr.create_array(tmp_path / "a.zarr", shape=ARRAY.shape, dtype=ARRAY.dtype, chunks=(3, 2, 4))[...] = (
        ARRAY
    )
    opened = np.ascontiguousarray(ARRAY.T) if transposed else ARRAY
    reference = open_reference(str(tmp_path / "a.zarr"), {"": opened}, transposed=transposed)
    assert reference.align == (4 if transposed else 3)
    check(reference, {"": opened})


@pytest.mark.parametrize("dtype", ["f2", "f8", "c8", "i1", "u8", "?", "M8[s]", "S3", "V5"])
def test_digests_tell_different_elements_apart(dtype: str) -> None:
    array = np.arange(24).astype("u1").repeat(np.dtype(dtype).itemsize).view(dtype)
    other = array.copy()
    other[3] = array[4] if dtype != "?" else ~array[3]
    assert digest(array) == digest(array.reshape(4, 6)) == digest(array.copy())
    assert digest(array) != digest(other)


def test_a_digest_does_not_depend_on_the_layout() -> None:
    wide = np.random.default_rng(0).standard_normal((50, 40, 30)).astype("f4")
    view = wide[:, 10:20]
    assert digest(view) == digest(np.array(view))


def test_the_piece_of_a_scalar(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.float64(2.5))
    with open_reference(str(tmp_path / "s.npy"), {"": np.array(2.5)}) as reference:
        assert reference.read(Piece("", ())) == 2.5
