"""A store that came with the recipe: a copy of what only the program's own memory has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from userfault.errors import ModeError
from userfault.sources._stores._abc import KeyStore

__all__ = ["DictStore"]


class DictStore(KeyStore):
    """Bytes in a mapping."""

    def __init__(self, content: Mapping[str, bytes], location: str) -> None:
        self.location = location
        self._content = content

    def get(self, key: str) -> bytes | None:
        """Return the bytes at `key`."""
        return self._content.get(key)

    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return a store of zarr with the same content."""
        if writable:
            raise ModeError(
                f"{self.location} is in the memory of the program, where a worker process cannot write: open it "
                "with mode='c' for changes that stay private, or keep the array in a folder or object store"
            )
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        make = default_buffer_prototype().buffer.from_bytes
        return MemoryStore({key: make(value) for key, value in self._content.items()}, read_only=True)
