"""Sources that the engine serves itself, without a worker: files, memory and zeros."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FileData", "MemoryData", "ZeroData"]


@dataclass(frozen=True)
class FileData:
    """Bytes of a local file.

    Attributes:
        path: The file; `/proc/self/fd/N` for one that has no name.
        offset: Where the bytes begin in it.
        nbytes: How many there are.
    """

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class MemoryData:
    """Bytes of an object of this process.

    Attributes:
        buffer: The object; it exports a contiguous buffer, and is kept alive as long as the memory.
        offset: Where the bytes begin in it.
        nbytes: How many there are.
    """

    buffer: object
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ZeroData:
    """Zeros.

    Attributes:
        nbytes: How many there are.
    """

    nbytes: int
