"""The same values, read in another way: what the demo's results are compared with.

Nothing of userfault takes part: Zarr arrays are read by zarr-python, local `.npy` and raw files by
numpy.memmap, and everything else by seeking in the file (through fsspec if it is remote), with the header
taken apart here once more.
"""

from __future__ import annotations

import io
import json
import struct
from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from userfault.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from userfault.cli._demo.plan import Piece

__all__ = ["Reference", "open_reference"]


class Reference(ABC):
    """Reads pieces of the arrays."""

    name: str = ""
    align: int = 1  # chunks along the first axis

    @abstractmethod
    def read(self, piece: Piece) -> NDArray[Any]:
        """Return the piece as an array of its own."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release files."""

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_reference(
    url: str, arrays: Mapping[str, NDArray[Any]], *, offset: int | None = None, transposed: bool = False
) -> Reference:
    """Choose the reference for a URL.

    Args:
        url: What was opened.
        arrays: What came of it, C-contiguous; what the file does not say of shapes and types is from here.
        offset: Where a raw file's elements begin, None if the file is not raw.
        transposed: Whether the array in the file is in Fortran order, and `arrays` has its transpose.
    """
    remote = "://" in url and not url.startswith("file://")
    path = url.removeprefix("file://")
    if offset is not None:
        return (
            _Seeking(url, {"": (offset, *_layout(arrays[""]))})
            if remote
            else _Mapped(path, arrays[""], offset)
        )
    if path.endswith(".npy"):
        return _npy(url) if remote else _Mapped(path, None, 0)
    if path.endswith(".safetensors"):
        return _safetensors(url, arrays)
    return _Zarr(url, transposed=transposed)


def _layout(array: NDArray[Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    return array.dtype, array.shape


class _Zarr(Reference):
    name = "zarr"

    def __init__(self, url: str, *, transposed: bool) -> None:
        try:
            import zarr
        except ImportError as error:
            raise MissingExtraError.for_module("zarr", "zarr", "comparing with zarr") from error
        self._array = zarr.open_array(url, mode="r")
        self._transposed = transposed
        if self._array.ndim:
            self.align = self._array.chunks[-1 if transposed else 0]

    def read(self, piece: Piece) -> NDArray[Any]:
        if self._transposed:
            rest = (slice(None),) * (self._array.ndim - len(piece.index))
            return np.asarray(self._array[(*rest, *piece.index[::-1])]).T
        return np.asarray(self._array[piece.index if piece.index else ...])


class _Mapped(Reference):
    name = "numpy.memmap"

    def __init__(self, path: str, array: NDArray[Any] | None, offset: int) -> None:
        mapped: NDArray[Any]
        if array is None:
            mapped = np.load(path, mmap_mode="r")
        else:
            mapped = np.memmap(path, array.dtype, "r", offset, array.shape)
        self._array = mapped if mapped.flags.c_contiguous else mapped.T

    def read(self, piece: Piece) -> NDArray[Any]:
        return np.array(self._array[piece.index])


class _Seeking(Reference):
    """Reads whole rows of the first axis out of a file, then cuts."""

    name = "plain reads"

    def __init__(self, url: str, members: Mapping[str, tuple[int, np.dtype[Any], tuple[int, ...]]]) -> None:
        self._file = _open(url)
        self._members = members

    def read(self, piece: Piece) -> NDArray[Any]:
        start, dtype, shape = self._members[piece.name]
        first = piece.index[0] if piece.index else slice(0, 1)
        rows = first if isinstance(first, slice) else slice(first, first + 1)
        row_shape = shape[1:] if shape else ()
        row = dtype.itemsize * prod(row_shape)
        self._file.seek(start + rows.start * row)
        data = self._file.read((rows.stop - rows.start) * row)
        if not shape:
            return np.frombuffer(data, dtype).reshape(())
        array = np.frombuffer(data, dtype).reshape(-1, *row_shape)
        own = slice(None) if isinstance(first, slice) else 0
        return np.array(array[(own, *piece.index[1:])])

    def close(self) -> None:
        self._file.close()


def _open(url: str) -> BinaryIO:
    if "://" not in url:
        return open(url, "rb")
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError.for_module("fsspec", "fsspec", "comparing with plain reads") from error
    return cast("BinaryIO", fsspec.open(url, "rb").open())


def _npy(url: str) -> Reference:
    with _open(url) as file:
        head = io.BytesIO(file.read(1 << 16))
    version = np.lib.format.read_magic(head)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read_header(head)
    return _Seeking(url, {"": (head.tell(), dtype, shape[::-1] if fortran else shape)})


def _safetensors(url: str, arrays: Mapping[str, NDArray[Any]]) -> Reference:
    with _open(url) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    # NumPy has no name for some types (BF16): the bytes are compared, in the type that they were opened as.
    members = {
        name: (8 + length + header[name]["data_offsets"][0], array.dtype, tuple(header[name]["shape"]))
        for name, array in arrays.items()
    }
    return _Seeking(url, members)
