"""A file whose content is at hand."""

from __future__ import annotations

from collections.abc import Iterator

from userfault.sources._ranges._abc import RangeReader

__all__ = ["MemoryReader"]


class MemoryReader(RangeReader):
    """A file with this content."""

    def __init__(self, content: bytes, location: str) -> None:
        self.location = location
        self.nbytes = len(content)
        self.content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        buffer[:] = memoryview(self.content)[offset : offset + len(buffer)]

    def stream(self) -> Iterator[bytes]:
        """Return all bytes."""
        yield self.content
