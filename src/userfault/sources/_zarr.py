"""Zarr arrays, v2 and v3.

Chunks of common arrays are decoded here, directly (see `_zarr_plan`). Anything else (sharding, codecs and
types that are not known here) is read by zarr's own slicing, chunk by chunk.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault import options
from userfault.errors import FormatError, SourceError, SourceNotFoundError, UserfaultError
from userfault.sources._abc import ArraySource, Order
from userfault.sources._chunked import ChunkedSource
from userfault.sources._dtypes import check_plain
from userfault.sources._empty import EmptySource
from userfault.sources._sliced import SlicedSource
from userfault.sources._stores import KeyStore
from userfault.sources._zarr_json import is_array, plan_v2, plan_v3
from userfault.sources._zarr_plan import ChunkDecoder, ZarrPlan

__all__ = ["Make", "ZarrSlicedSource", "ZarrSource", "load_zarr"]

Bytes = npt.NDArray[np.uint8]

# How long the metadata document is taken to be still there.
_TRUSTED_NS = 1_000_000_000


class ZarrSource(ChunkedSource):
    """A Zarr array whose chunks are decoded here.

    Args:
        store: Where its keys are; closed with the source.
        plan: What its chunks are made of.
        document: Key of its metadata.
        name: What to call it.
        order: Order of the memory.
    """

    def __init__(self, store: KeyStore, plan: ZarrPlan, document: str, name: str, order: Order) -> None:
        super().__init__(plan.dtype, plan.shape, plan.chunks, order, plan.fill, store.concurrency)
        self.name = name
        self._store = store
        self._plan = plan
        self._document = document
        self._decoder = ChunkDecoder(plan, order)
        self._seen_ns = time.monotonic_ns()

    def load_chunk(self, place: tuple[int, ...], out: Bytes, need: int) -> int:
        """Read and decode one chunk."""
        key = self._plan.key(place)
        data = self._store.get(key)
        if data is None:
            self._check_still_there()
            return 0
        try:
            return self._decoder.decode(data, out, need)
        except UserfaultError as error:
            raise SourceError(f"{self._store.location}/{key}: {error}", detail=str(error)) from error
        except Exception as error:  # codecs raise what they like
            detail = f"{type(error).__name__}: {error}"
            raise SourceError(f"{self._store.location}/{key} is damaged: {detail}", detail=detail) from error

    def _check_still_there(self) -> None:
        """A chunk that is not stored has the fill value; but not if the whole array was removed."""
        now = time.monotonic_ns()
        if now - self._seen_ns > _TRUSTED_NS:
            if self._store.get(self._document) is None:
                raise SourceNotFoundError(
                    f"{self._store.location} is gone: it has no {self._document} any more"
                )
            self._seen_ns = now

    def info(self) -> dict[str, object]:
        """Return the format, chunks and codecs."""
        return {
            "format": f"zarr v{3 if self._document == 'zarr.json' else 2}",
            "chunks": list(self._plan.chunks),
            "codecs": [str(codec["id"]) for codec in self._plan.codecs],
            "location": self._store.location,
            "decoder": "direct",
        }

    def close(self) -> None:
        """End the threads, close the store."""
        super().close()
        self._store.close()


class ZarrSlicedSource(SlicedSource):
    """A Zarr array that zarr reads."""

    def __init__(self, store: KeyStore, array: Any, name: str, order: Order) -> None:
        try:
            # Of a shard, its inner chunks are what can be read alone.
            chunks = array.chunks
        except NotImplementedError:
            chunks = None  # so says zarr of a grid that is not regular
        shape = tuple(map(int, array.shape))
        threads = store.concurrency or options.cpu_count()
        super().__init__(array, np.dtype(array.dtype), shape, chunks, order, threads)
        self.name = name
        self._store = store

    def load_chunk(self, place: tuple[int, ...], out: Bytes, need: int) -> int:
        """Let zarr read one chunk."""
        try:
            return super().load_chunk(place, out, need)
        except UserfaultError:
            raise
        except Exception as error:  # stores and codecs raise what they like
            detail = f"{type(error).__name__}: {error}"
            raise SourceError(f"{self._store.location}: chunk {place}: {detail}", detail=detail) from error

    def info(self) -> dict[str, object]:
        """Return the format, chunks and shards."""
        shards = getattr(self._array, "shards", None)
        return {
            "format": f"zarr v{self._array.metadata.zarr_format}",
            "chunks": list(self._chunks),
            "shards": None if shards is None else list(shards),
            "location": self._store.location,
            "decoder": "zarr",
        }

    def close(self) -> None:
        """End the threads, close the store."""
        super().close()
        self._store.close()


class Make:
    """Makes the sources that only read."""

    def direct(self, store: KeyStore, plan: ZarrPlan, document: str, name: str, order: Order) -> ZarrSource:
        """Return a source that decodes chunks itself."""
        return ZarrSource(store, plan, document, name, order)

    def sliced(self, store: KeyStore, array: Any, document: str, name: str, order: Order) -> ZarrSlicedSource:
        """Return a source that lets zarr read; `array` is open for reading."""
        return ZarrSlicedSource(store, array, name, order)


def load_zarr(store: KeyStore, name: str, order: Order | None, make: Make | None = None) -> ArraySource:
    """Return the source for the array at the root of `store`; the store belongs to it, or is closed.

    Args:
        store: Where the keys are.
        name: What to call it.
        order: Order of the memory, None for that of the chunks.
        make: What makes the sources; None for those that only read.

    Raises:
        SourceNotFoundError: Nothing is there.
        FormatError: It is not an array.
        UnsupportedDtypeError: Its elements cannot be memory.
    """
    try:
        return _load(store, name, order, make or Make())
    except BaseException:
        store.close()
        raise


def _load(store: KeyStore, name: str, order: Order | None, make: Make) -> ArraySource:
    for key, zarr_format, make_plan in (("zarr.json", 3, plan_v3), (".zarray", 2, plan_v2)):
        document = store.get(key)
        if document is None:
            continue
        document = bytes(document)
        if is_array(document, zarr_format) is False:
            raise _group_error(store)
        plan = make_plan(document)
        if plan is None:
            return _load_with_zarr(store, zarr_format, key, name, order, make)
        return _direct(store, plan, key, name, order, make)
    if store.get(".zgroup") is not None:
        raise _group_error(store)
    raise SourceNotFoundError(
        f"{store.location} is not a Zarr array: it has neither zarr.json nor .zarray",
    )


def _direct(
    store: KeyStore, plan: ZarrPlan, key: str, name: str, order: Order | None, make: Make
) -> ArraySource:
    order = order or plan.order
    if 0 in plan.shape:
        return EmptySource(plan.dtype, plan.shape, order, name)
    return make.direct(store, plan, key, name, order)


def _load_with_zarr(
    store: KeyStore, zarr_format: int, key: str, name: str, order: Order | None, make: Make
) -> ArraySource:
    from userfault.sources._zarr_library import open_array, plan_of

    array = open_array(store, zarr_format)
    dtype = check_plain(np.dtype(array.dtype), store.location)
    plan = plan_of(array)
    if plan is not None:
        return _direct(store, plan, key, name, order, make)
    shape = tuple(map(int, array.shape))
    memory_order = order or "C"
    if 0 in shape:
        return EmptySource(dtype, shape, memory_order, name)
    return make.sliced(store, array, key, name, memory_order)


def _group_error(store: KeyStore) -> FormatError:
    from userfault.sources._zarr_library import list_arrays

    names = list_arrays(store)
    inside = f"; it has {', '.join(names)}" if names else ""
    return FormatError(
        f"{store.location} is a Zarr group, not an array: add the path of an array in it{inside}"
    )
