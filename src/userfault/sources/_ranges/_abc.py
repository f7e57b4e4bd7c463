"""What a file is: bytes by offset, or all of them from the beginning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

__all__ = ["HEAD_NBYTES", "PIECE_NBYTES", "RangeReader"]

# What a sequential pass reads at once.
PIECE_NBYTES = 4 << 20
# What is read at first, to see whether ranges work and to have the header of most files.
HEAD_NBYTES = 16 << 10


class RangeReader(ABC):
    """A file. Any thread may call its methods.

    Attributes:
        location: Where it is, for messages.
        nbytes: Its length; None if the server does not tell the length of what it would send.
        encoding: The `Content-Encoding` that its bytes have, such as `"gzip"`; None for none.
        has_ranges: Whether it can be read in ranges; otherwise only `stream` works.
        head: Its first bytes, if they were read already.
    """

    location: str = ""
    nbytes: int | None = None
    encoding: str | None = None
    has_ranges: bool = True
    head: bytes = b""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            SourceError: It cannot be read, or answered with another number of bytes.
        """

    @abstractmethod
    def stream(self) -> Iterator[bytes]:
        """Return all bytes, in pieces.

        Raises:
            SourceError: It cannot be read.
        """

    def read(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset` on; fewer at the end."""
        length = max(0, min(length, (self.nbytes or 0) - offset))
        if offset + length <= len(self.head):
            return self.head[offset : offset + length]
        buffer = bytearray(length)
        if length:
            self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:  # noqa: B027 - most readers hold nothing
        """Release what the reader holds."""
