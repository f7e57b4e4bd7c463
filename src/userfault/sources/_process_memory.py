"""fsspec's `memory://`, which only this process can see: its content is copied for the worker."""

from __future__ import annotations

from userfault.errors import SourceNotFoundError
from userfault.sources._fsspec import filesystem, fsspec_errors
from userfault.sources._location import Location

__all__ = ["copy_file", "copy_tree"]


def copy_file(location: Location) -> bytes | None:
    """Return the content of a file, None if it is a folder.

    Raises:
        SourceNotFoundError: There is nothing.
    """
    with fsspec_errors(location.url):
        fs, path = filesystem(location)
        if fs.isdir(path):
            return None
        content: bytes = fs.cat_file(path)
        return content


def copy_tree(location: Location) -> dict[str, bytes]:
    """Return the files below a folder by their relative paths.

    Raises:
        SourceNotFoundError: There is nothing.
    """
    with fsspec_errors(location.url):
        fs, root = filesystem(location)
        root = fs._strip_protocol(root).rstrip("/")
        content = {path[len(root) :].lstrip("/"): fs.cat_file(path) for path in fs.find(root)}
    if not content:
        raise SourceNotFoundError(f"{location.url} does not exist")
    return content
