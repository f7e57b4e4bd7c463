"""Objects given to `open(..., "r+")`: which can be written, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userfault.errors import ModeError
from userfault.sources._abc import ArraySource, PageSource, PageStore, describe
from userfault.sources._objects import object_data
from userfault.sources._worker_data import WorkerData


class Reads(PageSource):
    nbytes = 100

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))


class Writes(Reads, PageStore):
    write_unit = 50

    def write_from(self, offset: int, buffer: memoryview) -> None:
        pass


class Lazy:
    shape = (3,)
    dtype = np.dtype("i4")

    def __getitem__(self, selection: Any) -> Any:
        return np.zeros(3, "i4")[selection]


def test_a_store_of_the_users_own() -> None:
    data, _ = object_data(Writes(), "<i2", (50,), None, "r+")
    assert isinstance(data, WorkerData)
    source = data.recipe.load()
    assert isinstance(source, ArraySource)
    description = describe(source)
    assert (description.writable, description.write_unit, description.shape) == (True, 50, (50,))


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_source_that_is_no_store(mode: Any) -> None:
    closed = Writes()
    closed.writable = False
    for source in (Reads(), closed):
        if mode == "r":
            object_data(source, None, None, None, mode)
            continue
        with pytest.raises(ModeError, match=r"make it a userfault\.sources\.PageStore"):
            object_data(source, None, None, None, mode)


def test_array_likes() -> None:
    object_data(Lazy(), None, None, None, "r")
    with pytest.raises(ModeError, match=r"how Lazy is written safely is not known here: wrap it"):
        object_data(Lazy(), None, None, None, "r+")


@pytest.mark.parametrize("chunks", [None, (2,)], ids=["contiguous", "chunks"])
def test_hdf5(tmp_path: Path, chunks: Any) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(4), chunks=chunks)
    with (
        h5py.File(tmp_path / "a.h5", "r") as file,
        pytest.raises(ModeError, match=r"a\.h5:/x cannot be written: .*keep the array as Zarr"),
    ):
        object_data(file["x"], None, None, None, "r+")
