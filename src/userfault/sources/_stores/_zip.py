"""A store in a local ZIP file."""

from __future__ import annotations

import threading
import zipfile
from typing import Any

from userfault.errors import FormatError, ModeError
from userfault.sources._stores._abc import KeyStore

__all__ = ["ZipKeyStore"]


class ZipKeyStore(KeyStore):
    """Members of the ZIP file `path`, below the folder `prefix` in it.

    Raises:
        FormatError: It is no ZIP file.
    """

    def __init__(self, path: str, prefix: str = "") -> None:
        self.location = f"{path}/{prefix}" if prefix else path
        self._path = path
        self._prefix = f"{prefix}/" if prefix else ""
        self.zarr_path = prefix
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise FormatError(f"{path} is not a ZIP file: {error}") from error
        # Members share one file object, and its position.
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """Return the content of the member `key`; its checksum has been compared."""
        try:
            with self._lock:
                return self._zip.read(self._prefix + key)
        except KeyError:
            return None

    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return zarr's store for the same file."""
        if writable:
            raise ModeError(
                f"{self._path} is a ZIP file, whose members cannot be replaced: unpack it to a folder, or open it "
                "with mode='c' for changes that stay private"
            )
        from zarr.storage import ZipStore

        return ZipStore(self._path, mode="r")

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
