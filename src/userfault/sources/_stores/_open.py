"""From a location to a store."""

from __future__ import annotations

import os

from userfault.sources._location import Location
from userfault.sources._stores._abc import KeyStore

__all__ = ["open_store"]


def open_store(location: Location) -> KeyStore:
    """Return the store at `location`: a folder, a folder in a ZIP file, or what is below a URL.

    Raises:
        FormatError: A file is where a folder should be, and it is no ZIP file.
        MissingExtraError: No library for the URL is installed.
        SourceError: The library does not take the URL or the options.
    """
    if location.is_local:
        archive, inside = split_archive(location.url)
        if archive is not None:
            from userfault.sources._stores._zip import ZipKeyStore

            return ZipKeyStore(archive, inside)
        from userfault.sources._stores._local import LocalKeyStore

        return LocalKeyStore(location.url)
    if location.choose_client() == "obstore":
        from userfault.sources._stores._obstore import ObstoreKeyStore

        return ObstoreKeyStore(location)
    from userfault.sources._stores._fsspec import FsspecKeyStore

    return FsspecKeyStore(location)


def split_archive(path: str) -> tuple[str | None, str]:
    """Split a local path that goes through a ZIP file into that file and the rest; None if it does not."""
    inside = ""
    while path and path != "/":
        if os.path.isfile(path):
            import zipfile

            return (path, inside) if zipfile.is_zipfile(path) else (None, "")
        if os.path.exists(path):
            return None, ""
        path, _, last = path.rstrip("/").rpartition("/")
        inside = f"{last}/{inside}" if inside else last
    return None, ""
