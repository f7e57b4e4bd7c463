"""Zarr arrays: as bytes by key, as stores that are written, as zarr itself reads them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

__all__ = ["as_bytes", "content_of", "reread", "store_of"]


def content_of(array: Any) -> dict[str, bytes]:
    """Return the documents and chunks of an array at the root of a zarr store in memory."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import collect_aiterator, sync

    store = array.store_path.store
    content = {}
    for key in collect_aiterator(store.list()):
        buffer = sync(store.get(key, default_buffer_prototype()))
        content[key] = buffer.to_bytes()
    return content


def as_bytes(array: Any, order: str) -> bytes:
    """Return what zarr itself reads."""
    whole = np.asarray(array[...] if array.shape else array[()], array.dtype)
    return whole.tobytes(order)  # type: ignore[arg-type]


def store_of(array: Any, order: Any = None) -> Any:
    """Return the store of an array in this process's memory, which only a test may write."""
    from userfault.sources._stores._zarr import ZarrKeyStore
    from userfault.sources._zarr_recipe import ZarrStoreRecipe

    return ZarrStoreRecipe(ZarrKeyStore(array.store_path.store, ""), "test", order, "r+").load()


def reread(array: Any) -> Any:
    """Return the array as another program opens it."""
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open_array(array.store_path.store, mode="r")
