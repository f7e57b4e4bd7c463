"""Zarr arrays, v2 and v3, that can be written.

Chunks are read as those of any other Zarr array (`_zarr`), and written by zarr itself, whole: it knows every codec,
filter and fill value, when a chunk need not be stored at all, and how to put one into each kind of store so that a
reader finds the old one or the new one, never a part.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault.errors import ModeError
from userfault.sources._abc import Order
from userfault.sources._chunked_store import ChunkedStore
from userfault.sources._stores import KeyStore
from userfault.sources._zarr import Make, ZarrSlicedSource, ZarrSource
from userfault.sources._zarr_library import open_array
from userfault.sources._zarr_plan import ZarrPlan

__all__ = ["StoreMake", "ZarrSlicedStore", "ZarrStore", "ZarrWriter"]

# Codecs of numcodecs that give back less than they took.
_LOSSY = frozenset({"astype", "bitround", "fixedscaleoffset", "packbits", "quantize"})
# Codecs of Zarr v3, by class, that give back what they took. What those do that are not known here, nobody knows.
_LOSSLESS = frozenset({"BloscCodec", "BytesCodec", "Crc32cCodec", "GzipCodec", "TransposeCodec", "ZstdCodec"})


class ZarrWriter:
    """zarr's own handles on an array, for writing.

    Args:
        store: Where its keys are.
        document: Key of its metadata.
        write_empty_chunks: Whether chunks of nothing but the fill value are to be stored; None for zarr's default.

    Attributes:
        array: The array as zarr opened it.
        unit: Shape of what zarr writes at once: a chunk, or a shard.

    Raises:
        ModeError: The store cannot be written, or its chunks are not all of one shape.
    """

    def __init__(self, store: KeyStore, document: str, write_empty_chunks: bool | None) -> None:
        self._store = store
        self._format = 3 if document == "zarr.json" else 2
        self._setting = write_empty_chunks
        self.open()

    def open(self) -> None:
        """Open the array in the store; again if the store has become another one."""
        self.array = open_array(self._store, self._format, writable=True, write_empty_chunks=self._setting)
        self._keeping = open_array(self._store, self._format, writable=True, write_empty_chunks=True)
        try:
            # Absent before zarr 3.0 had sharding in its arrays; a grid that is not regular has no such shape.
            shards = getattr(self.array, "shards", None)
            self._sharded = shards is not None
            self.unit = tuple(map(int, self.array.chunks if shards is None else shards))
        except NotImplementedError as error:
            raise ModeError(
                f"{self._store.location} has chunks that are not all of one shape, and can only be read: open it "
                "with mode='c' for changes that stay private"
            ) from error

    def put(self, selection: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Let zarr encode and keep whole chunks."""
        array = self._keeping if self._must_keep(values) else self.array
        array.set_basic_selection(selection if selection else ..., values)

    def _must_keep(self, values: npt.NDArray[Any]) -> bool:
        """Return whether elements are equal to the fill value without being the same bytes.

        zarr leaves chunks out that are *equal* to the fill value everywhere. So are those of 0.0 to -0.0 and of one NaN
        to another; read again, they would not be what was written.
        """
        dtype = values.dtype
        if dtype.kind in "biuMmSU":
            return False
        element = np.zeros((), dtype)
        if self.array.fill_value is not None:
            element[()] = self.array.fill_value
        bits = f"u{dtype.itemsize}" if dtype.itemsize in (1, 2, 4, 8) else f"V{dtype.itemsize}"
        flat = np.ascontiguousarray(values).reshape(-1)
        differ = flat.view(bits) != element.view(bits)
        if dtype.kind not in "fc":
            # When zarr takes structured elements, or those of other libraries, for equal is not known here.
            return bool(differ.any())
        equal = np.isnan(flat) if np.isnan(element) else flat == element
        if not self._sharded and not equal.all():
            return False
        return bool((equal & differ).any())


class _WritesZarr(ChunkedStore):
    """What is the same whoever reads the chunks: given `_store`, `_writer`."""

    _store: KeyStore
    _writer: ZarrWriter

    def set_writer(self, writer: ZarrWriter, units: tuple[int, ...] | None) -> None:
        """Say who writes, in units of which shape; called when all else is initialised."""
        self._writer = writer
        self._written = 0
        self._written_lock = threading.Lock()
        self.transactional = self._store.transactional
        self.set_units(units)

    def write_from(self, offset: int, buffer: memoryview) -> None:
        """Store `buffer` from `offset` on; any thread may call this."""
        super().write_from(offset, buffer)
        with self._written_lock:
            self._written += len(buffer)

    def store_part(self, selection: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Put one chunk, or one shard."""
        self._writer.put(selection, values)

    def flush(self) -> None:
        """Make what was written durable, or visible."""
        with self._written_lock:
            nbytes, self._written = self._written, 0
        again = True
        try:
            again = self._store.sync(nbytes)
        finally:
            if again:
                self._writer.open()
                self.renewed()
                self._cache.drop_all()

    def renewed(self) -> None:
        """Take note that the writer has opened the array again."""


class ZarrStore(_WritesZarr, ZarrSource):
    """A Zarr array whose chunks are decoded here, and written by zarr."""

    def __init__(
        self, store: KeyStore, plan: ZarrPlan, document: str, name: str, order: Order, writer: ZarrWriter
    ) -> None:
        super().__init__(store, plan, document, name, order)
        self.lossless = not any(codec["id"] in _LOSSY for codec in plan.codecs)
        self.set_writer(writer, None)

    def store_part(self, selection: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Put one chunk."""
        # Where the array was removed, zarr would write chunks of no array.
        self._check_still_there()
        super().store_part(selection, values)


class ZarrSlicedStore(_WritesZarr, ZarrSlicedSource):
    """A Zarr array that zarr reads and writes."""

    def __init__(self, store: KeyStore, name: str, order: Order, writer: ZarrWriter) -> None:
        super().__init__(store, writer.array, name, order)
        # Most that come here are sharded, and else as all others.
        self.lossless = _are_lossless(getattr(writer.array.metadata, "codecs", None))
        self.set_writer(writer, writer.unit)

    def renewed(self) -> None:
        """Read from what is open now."""
        self._array = self._writer.array


def _are_lossless(codecs: Any) -> bool:
    """Return whether codecs of Zarr v3 are all known to give back what they took; they are not for Zarr v2."""
    if codecs is None:
        return False
    return all(
        type(codec).__module__.startswith("zarr.codecs.")
        and (type(codec).__name__ in _LOSSLESS or _are_lossless(getattr(codec, "codecs", None)))
        for codec in codecs
    )


@dataclass(frozen=True)
class StoreMake(Make):
    """Makes sources that can be written.

    Attributes:
        write_empty_chunks: Whether chunks of nothing but the fill value are to be stored; None for zarr's default.
    """

    write_empty_chunks: bool | None = None

    def direct(self, store: KeyStore, plan: ZarrPlan, document: str, name: str, order: Order) -> ZarrSource:
        """Return a source that decodes chunks itself."""
        return ZarrStore(
            store, plan, document, name, order, ZarrWriter(store, document, self.write_empty_chunks)
        )

    def sliced(self, store: KeyStore, array: Any, document: str, name: str, order: Order) -> ZarrSlicedSource:
        """Return a source that lets zarr read."""
        return ZarrSlicedStore(store, name, order, ZarrWriter(store, document, self.write_empty_chunks))
