"""A local file."""

from __future__ import annotations

import os
from collections.abc import Iterator

from userfault.errors import SourceError, SourceNotFoundError, TruncatedError
from userfault.sources._ranges._abc import PIECE_NBYTES, RangeReader

__all__ = ["LocalReader"]


class LocalReader(RangeReader):
    """The file at `path`.

    Raises:
        SourceNotFoundError: There is none.
        SourceError: It cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.location = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{path} does not exist", errno=error.errno) from error
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}", errno=error.errno) from error
        self.nbytes = os.fstat(self._fd).st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[filled:]], offset + filled)
            except OSError as error:
                raise SourceError(
                    f"{self.location} cannot be read: {error.strerror}",
                    offset=offset,
                    length=len(buffer),
                    errno=error.errno,
                ) from error
            if count == 0:
                raise TruncatedError(f"{self.location} ends at byte {offset + filled}: it became shorter")
            filled += count

    def stream(self) -> Iterator[bytes]:
        """Return all bytes, in pieces."""
        offset = 0
        while piece := os.pread(self._fd, PIECE_NBYTES, offset):
            yield piece
            offset += len(piece)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
