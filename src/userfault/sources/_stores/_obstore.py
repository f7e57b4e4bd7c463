"""A store in an object store or on a web server, through obstore."""

from __future__ import annotations

from typing import Any

from userfault.errors import SourceError
from userfault.sources._location import Location
from userfault.sources._obstore import make_store, obstore_errors
from userfault.sources._stores._abc import KeyStore, refuse_web

__all__ = ["ObstoreKeyStore"]


class ObstoreKeyStore(KeyStore):
    """Objects below a URL."""

    concurrency = 16

    def __init__(self, location: Location) -> None:
        self.location = location.url
        self._at = location
        self._store = make_store(location)

    def get(self, key: str) -> Any | None:
        """Return the content of the object `key`."""
        import obstore

        try:
            with obstore_errors(f"{self.location}/{key}"):
                return memoryview(obstore.get(self._store, key).bytes())
        except SourceError as error:
            if isinstance(error, FileNotFoundError):
                return None
            raise

    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return zarr's store for the same place."""
        if writable:
            refuse_web(self._at)
        from zarr.storage import ObjectStore

        return ObjectStore(self._store, read_only=not writable)
