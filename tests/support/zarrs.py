"""Zarr arrays in memory, as bytes by key."""

from __future__ import annotations

from typing import Any

__all__ = ["content_of"]


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
