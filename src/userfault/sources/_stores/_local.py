"""A store in a local folder."""

from __future__ import annotations

import os
from typing import Any

from userfault.sources._stores._abc import KeyStore

__all__ = ["LocalKeyStore"]


class LocalKeyStore(KeyStore):
    """Files below `root`, by their relative paths."""

    def __init__(self, root: str) -> None:
        self.location = root
        self._root = root

    def get(self, key: str) -> bytes | None:
        """Return the content of the file `key`."""
        try:
            fd = os.open(f"{self._root}/{key}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            # Without a file object: it would cost more than the read of a small chunk.
            left = os.fstat(fd).st_size
            data = os.read(fd, left)
            if len(data) == left:
                return data
            parts = [data]
            while data := os.read(fd, 1 << 20):
                parts.append(data)
            return b"".join(parts)
        except IsADirectoryError:
            return None
        finally:
            os.close(fd)

    def zarr_store(self) -> Any:
        """Return zarr's store for the same folder."""
        from zarr.storage import LocalStore

        return LocalStore(self._root, read_only=True)
