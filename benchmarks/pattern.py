"""A page source of the user's own, as plain as can be: Python code that hands out bytes from a buffer."""

from userfault.sources import PageSource


class Pattern(PageSource):
    """`nbytes` bytes that repeat with a period of 1 MiB."""

    block = 64 * 1024

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._buffer = memoryview(b"")

    def __getstate__(self) -> int:
        return self._nbytes

    def __setstate__(self, nbytes: int) -> None:
        # In the worker, while `open` waits: making the bytes is no part of reading them.
        self._nbytes = nbytes
        self._buffer = memoryview(pattern(nbytes))

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._buffer[offset : offset + len(buffer)]


def pattern(nbytes: int) -> bytearray:
    """The bytes themselves: 64-bit counters that start again every MiB."""
    import numpy as np

    period = np.arange(2**17, dtype=np.uint64).tobytes()
    return bytearray(period) * (nbytes // len(period))


class Numbered(PageSource):
    """Blocks of 64 KiB that begin with their number, counted from 1. Loading and reading it needs no other module."""

    block = 64 * 1024

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    @property
    def nbytes(self) -> int:
        return self._blocks * self.block

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), self.block):
            number = (offset + at) // self.block + 1
            buffer[at : at + self.block] = number.to_bytes(8, "little").ljust(self.block, b"\0")
