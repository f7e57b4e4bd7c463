"""Datasets of HDF5 files, through h5py: opened again, by file and name, in the worker.

A dataset that lies in the file in one piece, as it would in memory, needs no worker: its bytes are read from there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault.errors import FormatError, SourceError, SourceNotFoundError, SourcePickleError, UserfaultError
from userfault.sources._abc import ArraySource, Order
from userfault.sources._dtypes import check_plain
from userfault.sources._empty import EmptySource
from userfault.sources._layout import ArrayLayout
from userfault.sources._native import FileData
from userfault.sources._sliced import SlicedSource

__all__ = ["Hdf5Recipe", "hdf5_contiguous", "hdf5_recipe"]

# Drivers of HDF5 whose file another process can open by its name.
_DRIVERS_ON_DISK = ("sec2", "stdio", "direct", "split")


@dataclass(frozen=True)
class Hdf5Recipe:
    """A dataset.

    Attributes:
        path: The file.
        name: The dataset in it.
        order: Order of the memory.
    """

    path: str
    name: str
    order: Order = "C"

    def load(self) -> ArraySource:
        """Open the dataset."""
        import h5py

        where = f"{self.path}:{self.name}"
        try:
            file = h5py.File(self.path, "r")
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{self.path} does not exist", errno=error.errno) from error
        except OSError as error:
            raise SourceError(f"{self.path} cannot be opened by h5py: {error}", detail=str(error)) from error
        try:
            dataset = file.get(self.name)
            if not isinstance(dataset, h5py.Dataset):
                raise SourceNotFoundError(f"{where} is not a dataset")
            if dataset.shape is None:
                raise FormatError(f"{where} has no data at all (a null dataspace)")
            dtype = check_plain(
                np.dtype(dataset.dtype.str) if dataset.dtype.names is None else dataset.dtype, where
            )
            if 0 in dataset.shape:
                file.close()
                return EmptySource(dtype, dataset.shape, self.order, self.name)
            return Hdf5Source(file, dataset, dtype, where, self.order)
        except BaseException:
            file.close()
            raise


class Hdf5Source(SlicedSource):
    """An open dataset. HDF5 has one lock for everything, so threads would only wait for each other."""

    def __init__(self, file: Any, dataset: Any, dtype: np.dtype[Any], where: str, order: Order) -> None:
        super().__init__(dataset, dtype, tuple(dataset.shape), dataset.chunks, order, threads=1)
        self.name = where.rpartition("/")[2]
        self._file = file
        self._where = where

    def load_chunk(self, place: tuple[int, ...], out: npt.NDArray[np.uint8], need: int) -> int:
        """Let h5py read one chunk."""
        try:
            return super().load_chunk(place, out, need)
        except UserfaultError:
            raise
        except Exception as error:  # filters raise what they like
            raise SourceError(f"{self._where}: chunk {place}: {error}", detail=str(error)) from error

    def info(self) -> dict[str, object]:
        """Return the format, chunks and filter."""
        return {
            "format": "hdf5",
            "chunks": None if self._array.chunks is None else list(self._array.chunks),
            "codecs": [] if self._array.compression is None else [str(self._array.compression)],
            "location": self._where,
        }

    def close(self) -> None:
        """End the threads, close the file."""
        super().close()
        self._file.close()


def hdf5_recipe(dataset: Any, order: Order) -> Hdf5Recipe:
    """Return the recipe for an open `h5py.Dataset`.

    Raises:
        FormatError: It is a group or file.
        SourcePickleError: No other process can open it.
    """
    if not bool(dataset):
        raise SourcePickleError("the HDF5 file of this object is closed: open it again")
    if not hasattr(dataset, "shape") or not hasattr(dataset, "dtype"):
        names = ", ".join(sorted(map(str, dataset))) if hasattr(dataset, "keys") else ""
        raise FormatError(
            f"{dataset!r} is not a dataset: open one of those in it" + (f", {names}" if names else "")
        )
    if dataset.name is None:
        raise SourcePickleError("this HDF5 dataset has no name, so a worker process cannot find it")
    file = dataset.file
    path = os.path.abspath(os.fsdecode(file.filename))
    if file.driver not in _DRIVERS_ON_DISK or not os.path.exists(path):
        raise SourcePickleError(
            f"the HDF5 file {file.filename!r} (driver {file.driver!r}) is not on disk, where a worker "
            "process could open it: write it to a file, or copy the dataset with dataset[...]"
        )
    if file.mode != "r":
        raise SourcePickleError(
            f"the HDF5 file {path} is open for writing (mode {file.mode!r}), so what a worker process "
            "would read is not certain: open it with mode 'r'"
        )
    return Hdf5Recipe(path, dataset.name, order)


def hdf5_contiguous(dataset: Any, recipe: Hdf5Recipe) -> tuple[FileData, ArrayLayout] | None:
    """Return where the bytes of an open dataset lie in its file, None if not together and as NumPy has them."""
    import h5py

    kind = dataset.id.get_create_plist().get_layout()
    if kind != h5py.h5d.CONTIGUOUS or dataset.external is not None or not dataset.shape or dataset.size == 0:
        return None
    dtype = check_plain(np.dtype(dataset.dtype), f"{recipe.path}:{recipe.name}")
    # HDF5 converts when it reads, unless the type in the file is exactly the one in memory.
    if h5py.h5t.py_create(dataset.dtype, logical=True) != dataset.id.get_type():
        return None
    # Space may not be allocated yet: then the elements are the fill value, and the offset means nothing.
    offset, nbytes = dataset.id.get_offset(), dataset.nbytes
    if offset is None or dataset.id.get_storage_size() != nbytes:
        return None
    if offset + nbytes > os.path.getsize(recipe.path):
        return None
    return FileData(recipe.path, offset, nbytes), ArrayLayout(dtype, tuple(dataset.shape), "C", 0)
