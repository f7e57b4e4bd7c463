"""A file behind any URL that fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator

from userfault.errors import SourceError
from userfault.sources._fsspec import filesystem, fsspec_errors
from userfault.sources._location import Location
from userfault.sources._ranges._abc import HEAD_NBYTES, PIECE_NBYTES, RangeReader

__all__ = ["FsspecReader"]


class FsspecReader(RangeReader):
    """The file at a URL.

    Raises:
        SourceNotFoundError: There is none.
        SourceError: It cannot be reached, or is a folder.
    """

    def __init__(self, location: Location) -> None:
        self.location = location.url
        self._fs, self._path = filesystem(location)
        with fsspec_errors(location.url):
            info = self._fs.info(self._path)
        if info.get("type") == "directory":
            raise SourceError(f"{location.url} is a folder, not a file")
        # The length of what is sent is not known if the server compresses it on the way.
        size = info.get("size")
        self.nbytes = None if size is None else int(size)
        encoding = info.get("ContentEncoding") or info.get("contentEncoding")
        self.encoding = None if encoding in (None, "", "identity") else str(encoding)
        self.has_ranges = self.nbytes is not None and self._probe()

    def _probe(self) -> bool:
        length = min(self.nbytes or 0, HEAD_NBYTES)
        if length:
            with fsspec_errors(self.location):
                self.head = self._fs.cat_file(self._path, start=0, end=length)
        # A server that ignores Range sends everything.
        return len(self.head) == length

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        with fsspec_errors(self.location):
            data = self._fs.cat_file(self._path, start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise SourceError(
                f"{self.location} answered with {len(data)} bytes instead of {len(buffer)}",
                offset=offset,
                length=len(buffer),
            )
        buffer[:] = data

    def stream(self) -> Iterator[bytes]:
        """Return all bytes, in pieces."""
        with fsspec_errors(self.location):
            if self.has_ranges:
                for offset in range(0, self.nbytes or 0, PIECE_NBYTES):
                    end = min(offset + PIECE_NBYTES, self.nbytes or 0)
                    yield self._fs.cat_file(self._path, start=offset, end=end)
                return
            with self._fs.open(self._path, "rb", block_size=0) as file:
                while piece := file.read(PIECE_NBYTES):
                    yield piece
