"""Files behind URLs: `.npy`, `.safetensors` and raw bytes, read in ranges by a worker."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from userfault.errors import FormatError, ModeError, SourceError, SourceNotFoundError
from userfault.sources._abc import ArraySource, Order, PageSource, check_range
from userfault.sources._compression import by_magic, by_suffix
from userfault.sources._dtypes import dtype_from_text
from userfault.sources._expand import MustExpandError
from userfault.sources._layout import ArrayLayout, raw_layout
from userfault.sources._location import Location
from userfault.sources._npy import NPY_MAGIC, npy_layout
from userfault.sources._ranges import RangeReader, open_ranges
from userfault.sources._safetensors import TensorTable, tensor_table
from userfault.sources._zarr_recipe import Mode

__all__ = ["FileFormat", "RawOptions", "RemoteFileRecipe", "UrlRecipe"]

FileFormat = Literal["npy", "safetensors", "raw"]

# Requests in flight hide the latency of a server.
_CONCURRENCY = 16
# A round trip costs more than the bytes of a larger block.
_BLOCK = 256 << 10


@dataclass(frozen=True)
class RawOptions:
    """What is said of bytes that say nothing of themselves.

    Attributes:
        dtype: Type of the elements, as text; None for plain bytes.
        shape: Shape, None for one axis.
        offset: First byte.
        order: `"C"` or `"F"`.
    """

    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    offset: int = 0
    order: Order = "C"

    def layout(self, available: int, name: str) -> ArrayLayout:
        """Return where the array lies among `available` bytes; see `raw_layout` for the errors."""
        dtype: np.dtype[Any] = np.dtype(np.uint8) if self.dtype is None else dtype_from_text(self.dtype)
        return raw_layout(dtype, self.shape, self.offset, self.order, available, name)


class RemoteBytes(PageSource):
    """A stretch of a file.

    Args:
        reader: The file; closed with the source.
        start: First byte of the stretch.
        nbytes: Its length.
        extra: Facts for people, and the tensors of a `.safetensors` file.
    """

    concurrency = _CONCURRENCY
    block = _BLOCK

    def __init__(self, reader: RangeReader, start: int, nbytes: int, extra: Mapping[str, object]) -> None:
        self.name = Location(reader.location).name
        self._reader = reader
        self._start = start
        self._nbytes = nbytes
        self._extra = {"location": reader.location, **extra}

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self._nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on; any thread may call this."""
        check_range(self, offset, len(buffer))
        if len(buffer):
            self._reader.read_into(self._start + offset, buffer)

    def info(self) -> Mapping[str, object]:
        """Return the location, the format and what it holds."""
        return self._extra

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


class RemoteArray(RemoteBytes, ArraySource):
    """An array in a file."""

    def __init__(self, reader: RangeReader, layout: ArrayLayout, extra: Mapping[str, object]) -> None:
        super().__init__(reader, layout.offset, layout.nbytes, extra)
        self.order = layout.order
        self._layout = layout

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self._layout.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._layout.shape


@dataclass(frozen=True)
class RemoteFileRecipe:
    """A file behind a URL.

    Attributes:
        location: The file.
        format: What it is; None to look at its first bytes.
        raw: What is said of it if it is raw.
        mode: `"r+"` if it is to be written, which is refused.
    """

    location: Location
    format: FileFormat | None = None
    raw: RawOptions = RawOptions()
    mode: Mode = "r"

    def load(self) -> PageSource:
        """Open the file.

        Raises:
            ModeError: It is to be written.
            MustExpandError: It is compressed, or cannot be read in ranges.
            FormatError: It is not what it is said to be.
        """
        reader = open_ranges(self.location)
        try:
            # Only now: if nothing is there, that is what is to be said.
            if self.mode == "r+":
                raise ModeError(
                    f"{self.location.url} is a single object, which cannot be written in part: open it with mode='c' "
                    "for changes that stay private, or keep the array as Zarr, or in blocks "
                    "(userfault.sources.ObjectBlocks)"
                )
            return self._load(reader)
        except BaseException:
            reader.close()
            raise

    def _load(self, reader: RangeReader) -> PageSource:
        compressed = reader.encoding or (self.format is None and by_suffix(self.location.name))
        if compressed or not reader.has_ranges or reader.nbytes is None:
            raise MustExpandError(f"{reader.location} cannot be read in ranges")
        try:
            return self._parse(reader, reader.nbytes)
        except FormatError:
            if self.format != "raw" and by_magic(reader.read(0, 8)):
                raise MustExpandError(f"{reader.location} is compressed") from None
            raise

    def _parse(self, reader: RangeReader, nbytes: int) -> PageSource:
        kind, name = self.format or self._look(reader), reader.location
        if kind == "safetensors":
            table = tensor_table(reader.read, nbytes, name)
            return RemoteBytes(
                reader, table.offset, table.nbytes, {"format": "safetensors", **table.to_extra()}
            )
        layout = npy_layout(reader.read, nbytes, name) if kind == "npy" else self.raw.layout(nbytes, name)
        return RemoteArray(reader, layout, {"format": kind})

    def _look(self, reader: RangeReader) -> FileFormat:
        head = reader.read(0, 16)
        if head.startswith(NPY_MAGIC):
            return "npy"
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < (reader.nbytes or 0):
            return "safetensors"
        if self.raw.dtype is not None:
            return "raw"
        raise FormatError(
            f"{reader.location} is neither .npy nor .safetensors: give dtype= (and shape=) to read it as raw "
            "bytes"
        )


@dataclass(frozen=True)
class UrlRecipe:
    """A URL that does not say what it is: a file, or else a Zarr array, or else one in blocks.

    Attributes:
        location: The URL.
        raw: What is said of it if it is a raw file.
        order: Order of the memory of a Zarr array.
        mode: `"r+"` if it is to be written.
    """

    location: Location
    raw: RawOptions = RawOptions()
    order: Order | None = None
    mode: Mode = "r"

    def load(self) -> PageSource:
        """Open what is there."""
        try:
            return RemoteFileRecipe(self.location, None, self.raw, self.mode).load()
        except MustExpandError:
            raise
        except SourceError as file_error:
            from userfault.sources._zarr_recipe import ZarrRecipe

            try:
                return ZarrRecipe(self.location, self.order, self.mode).load()
            except SourceNotFoundError:
                blocks = self._blocks()
                if blocks is not None:
                    return blocks
                raise file_error from None

    def _blocks(self) -> PageSource | None:
        if importlib.util.find_spec("obstore") is None or self.location.client == "fsspec":
            return None
        from userfault.sources._object_blocks import ObjectBlocksRecipe

        try:
            return ObjectBlocksRecipe(self.location, self.mode).load()
        except SourceError:
            return None


def table_of(extra: Mapping[str, Any]) -> TensorTable | None:
    """Return the tensors that a description's `extra` tells of, None if it is not a `.safetensors` file."""
    return TensorTable.from_extra(extra) if extra.get("format") == "safetensors" else None
