"""A store in a local folder."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from userfault.errors import ModeError
from userfault.sources._stores._abc import KeyStore

__all__ = ["LocalKeyStore"]


class LocalKeyStore(KeyStore):
    """Files below `root`, by their relative paths."""

    def __init__(self, root: str) -> None:
        self.location = root
        self._root = root
        self._fd = -1

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

    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return zarr's store for the same folder. It writes to another name, and renames."""
        from zarr.storage import LocalStore

        if writable and not os.access(self._root, os.W_OK | os.X_OK):
            raise ModeError(
                f"{self._root} may not be written by this user: open it with mode='c' for changes that stay private"
            )
        if writable and self._fd < 0:
            # Opened before the first write, so that `sync` hears of every error since.
            self._fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return LocalStore(self._root, read_only=not writable)

    def sync(self, nbytes: int) -> bool:
        """Make everything in this file system durable.

        Not file by file: those that a worker wrote before it was killed are known to nobody.
        """
        # Linux 5.8 (735e4ae5ba28) and later: it fails if anything could not be written back.
        if ctypes.CDLL(None, use_errno=True).syncfs(self._fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), self._root)
        return False

    def close(self) -> None:
        """Close the folder."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
