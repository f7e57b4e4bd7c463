"""From a location to a reader."""

from __future__ import annotations

from userfault.sources._location import Location
from userfault.sources._ranges._abc import RangeReader

__all__ = ["open_ranges"]


def open_ranges(location: Location) -> RangeReader:
    """Return a reader for the file at `location`.

    Raises:
        MissingExtraError: No library for the URL is installed.
        SourceNotFoundError: There is no such file.
        SourceError: It cannot be reached.
    """
    if location.is_local:
        from userfault.sources._ranges._local import LocalReader

        return LocalReader(location.url)
    if location.is_process_memory:
        from userfault.sources._fsspec import filesystem, fsspec_errors
        from userfault.sources._ranges._memory import MemoryReader

        with fsspec_errors(location.url):
            fs, path = filesystem(location)
            return MemoryReader(fs.cat_file(path), location.url)
    if location.choose_client() == "obstore":
        from userfault.sources._ranges._obstore import ObstoreReader

        return ObstoreReader(location)
    from userfault.sources._ranges._fsspec import FsspecReader

    return FsspecReader(location)
