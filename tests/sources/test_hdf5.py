"""Datasets of h5py: read in a worker, or as they lie in the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userfault.errors import (
    FormatError,
    SourceError,
    SourceNotFoundError,
    SourcePickleError,
    UnsupportedDtypeError,
)
from userfault.sources._abc import ArraySource, PageSource, describe
from userfault.sources._hdf5 import Hdf5Recipe, hdf5_recipe
from userfault.sources._native import FileData
from userfault.sources._objects import object_data
from userfault.sources._pickle import dumps
from userfault.sources._worker_data import WorkerData
from userfault.testing import PageSourceTests

h5py = pytest.importorskip("h5py")


def whole(source: PageSource) -> bytes:
    buffer = bytearray(source.nbytes)
    source.read_into(0, memoryview(buffer))
    return bytes(buffer)


def worker_recipe(obj: Any, order: Any = None) -> Any:
    data, layout = object_data(obj, None, None, order)
    assert isinstance(data, WorkerData)
    assert layout is None
    return data.recipe


def make_file(folder: Path) -> Path:
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        data = np.arange(6000, dtype=">i4").reshape(20, 30, 10)
        file.create_dataset("plain", data=data)
        file.create_dataset("deep/chunked", data=data, chunks=(7, 8, 9), compression="gzip")
        file.create_dataset("scalar", data=3.5)
        file.create_dataset("empty", shape=(0, 4), dtype="f4")
        file.create_dataset("null", data=h5py.Empty("f4"))
        file.create_dataset("text", data=["a", "bc"], dtype=h5py.string_dtype())
        file.create_dataset("colour", data=[0, 1], dtype=h5py.enum_dtype({"RED": 0, "GREEN": 1}))
    return path


def load(path: Path, name: str) -> ArraySource:
    with h5py.File(path, "r") as file:
        recipe = hdf5_recipe(file[name], "C")
    loaded: ArraySource = pickle.loads(dumps(recipe)).load()
    return loaded


@pytest.mark.parametrize("name", ["plain", "deep/chunked"])
def test_datasets(tmp_path: Path, name: str) -> None:
    source = load(make_file(tmp_path), name)
    assert (source.shape, source.dtype) == ((20, 30, 10), np.dtype(">i4"))
    assert whole(source) == np.arange(6000, dtype=">i4").tobytes()
    source.close()


def test_small_datasets(tmp_path: Path) -> None:
    path = make_file(tmp_path)
    scalar = load(path, "scalar")
    assert whole(scalar) == np.float64(3.5).tobytes()
    scalar.close()
    assert load(path, "empty").shape == (0, 4)
    colour = load(path, "colour")
    assert describe(colour).dtype == "|u1"
    colour.close()


def test_what_is_not_bytes(tmp_path: Path) -> None:
    path = make_file(tmp_path)
    with pytest.raises(UnsupportedDtypeError, match="text: elements of dtype object"):
        load(path, "text")
    with pytest.raises(FormatError, match="null dataspace"):
        load(path, "null")


def test_what_no_other_process_can_open(tmp_path: Path) -> None:
    path = make_file(tmp_path)
    with h5py.File(path, "r+") as file, pytest.raises(SourcePickleError, match="open for writing"):
        hdf5_recipe(file["plain"], "C")
    with h5py.File("in memory", "w", driver="core", backing_store=False) as file:
        file["x"] = [1, 2]
        with pytest.raises(SourcePickleError, match="is not on disk"):
            hdf5_recipe(file["x"], "C")
    with h5py.File(path, "r") as file:
        with pytest.raises(FormatError, match=r"is not a dataset: open one of those in it, chunked"):
            hdf5_recipe(file["deep"], "C")
        dataset = file["plain"]
    with pytest.raises(SourcePickleError, match="is closed"):
        hdf5_recipe(dataset, "C")


@pytest.mark.parametrize("userblock", [0, 512])
def test_bytes_that_lie_together_need_no_worker(tmp_path: Path, userblock: int) -> None:
    data = np.arange(6000, dtype=">i4").reshape(20, 30, 10)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", userblock_size=userblock) as file:
        for name, dtype in {"big": ">i4", "float": "<f8", "flag": "?"}.items():
            file.create_dataset(name, data=data.astype(dtype))
        file.create_dataset("struct", data=np.ones(5, [("a", "i2"), ("b", "f4")]))
        file.create_dataset("chunked", data=data, chunks=(5, 5, 5))
        file.create_dataset("not allocated", shape=(10, 10), dtype="f4", fillvalue=7)
        file.create_dataset("scalar", data=1.5)
        # 12 bits in 16: HDF5 converts them.
        narrow = h5py.h5t.STD_U16LE.copy()
        narrow.set_precision(12)
        h5py.h5d.create(file.id, b"narrow", narrow, h5py.h5s.create_simple((10,)))
        file["narrow"][...] = 5
    with h5py.File(path, "r") as file:
        for name in ("big", "float", "flag", "struct"):
            native, layout = object_data(file[name], None, None, None)
            assert isinstance(native, FileData)
            assert layout is not None
            part = path.read_bytes()[native.offset : native.offset + native.nbytes]
            assert part == file[name][...].tobytes()
            assert (layout.shape, layout.dtype) == (file[name].shape, file[name].dtype)
        for name in ("chunked", "not allocated", "scalar", "narrow"):
            source = worker_recipe(file[name]).load()
            assert whole(source) == file[name][()].tobytes()
            source.close()
        assert worker_recipe(file["big"], "F").order == "F"


def test_a_file_that_went_away(tmp_path: Path) -> None:
    path = make_file(tmp_path)
    with h5py.File(path, "r") as file:
        recipe = hdf5_recipe(file["plain"], "C")
    path.unlink()
    with pytest.raises(SourceNotFoundError, match="does not exist"):
        recipe.load()
    path.write_bytes(b"no HDF5")
    with pytest.raises(SourceError, match="cannot be opened by h5py"):
        recipe.load()


class TestConformance(PageSourceTests):
    reads = 20
    data = np.arange(30 * 40 * 50, dtype="<f8").reshape(30, 40, 50)

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.path = tmp_path / "a.h5"
        with h5py.File(self.path, "w") as file:
            file.create_dataset("deep/x", data=self.data, chunks=(7, 9, 50), compression="gzip")

    def recipe(self) -> Hdf5Recipe:
        return Hdf5Recipe(str(self.path), "/deep/x")

    def source(self) -> PageSource:
        return self.recipe().load()

    def expected(self) -> bytes:
        return self.data.tobytes()
