"""A store that is one of zarr's already."""

from __future__ import annotations

from typing import Any

from userfault.errors import ModeError
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

    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return the store itself."""
        if writable and type(self._store).__name__ == "IcechunkStore":
            # Nothing would commit what is written here: `_icechunk` has the store that does.
            raise ModeError(f"{self.location} is a session of Icechunk that was taken for reading")
        if writable and (self._store.read_only or not self._store.supports_writes):
            raise ModeError(
                f"{self.location} cannot be written: {type(self._store).__name__} "
                + ("was opened read-only" if self._store.supports_writes else "takes no writes")
                + "; open it for writing, or with mode='c' for changes that stay private"
            )
        return self._store
