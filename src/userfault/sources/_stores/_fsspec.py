"""A store behind any URL that fsspec knows."""

from __future__ import annotations

from typing import Any

from userfault.sources._fsspec import filesystem, fsspec_errors
from userfault.sources._location import Location
from userfault.sources._stores._abc import KeyStore, refuse_web

__all__ = ["FsspecKeyStore"]


class FsspecKeyStore(KeyStore):
    """Files below a URL."""

    concurrency = 16

    def __init__(self, location: Location) -> None:
        self.location = location.url
        self._at = location
        self._fs, self._root = filesystem(location)

    def get(self, key: str) -> bytes | None:
        """Return the content of the file `key`."""
        path = f"{self._root}/{key}" if self._root else key
        try:
            with fsspec_errors(f"{self.location}/{key}"):
                content: bytes = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return zarr's store for the same place."""
        if writable:
            refuse_web(self._at)
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(
            self._at.url, storage_options=dict(self._at.storage_options) or None, read_only=not writable
        )
