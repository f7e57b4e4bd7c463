"""A store that is one of zarr's already."""

from __future__ import annotations

from typing import Any

from userfault.sources._stores._abc import KeyStore

__all__ = ["ZarrKeyStore"]


class ZarrKeyStore(KeyStore):
    """Keys of a store of zarr, below `path` in it."""

    concurrency = 16

    def __init__(self, store: Any, path: str) -> None:
        self.location = f"{store}/{path}" if path else str(store)
        self._store = store
        self.zarr_path = path.strip("/")

    def get(self, key: str) -> Any | None:
        """Return the bytes at `key`."""
        from zarr.core.buffer import default_buffer_prototype
        from zarr.core.sync import sync

        full = f"{self.zarr_path}/{key}" if self.zarr_path else key
        buffer = sync(self._store.get(full, default_buffer_prototype()))
        return None if buffer is None else memoryview(buffer.as_numpy_array())

    def zarr_store(self) -> Any:
        """Return the store itself."""
        return self._store
