"""A source in Python for `userfault doctor`: the numbers from 0 on, computed in a worker process."""

from __future__ import annotations

from typing import Any

import numpy as np

from userfault.sources import ArraySource

__all__ = ["Counting"]


class Counting(ArraySource):
    """The array `numpy.arange(length, dtype="<u4")`, never in memory as a whole."""

    dtype: np.dtype[Any] = np.dtype("<u4")
    shape: tuple[int, ...] = (0,)
    name = "counting"

    def __init__(self, length: int) -> None:
        self.shape = (length,)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of the numbers that it covers."""
        first, skipped = divmod(offset, self.dtype.itemsize)
        count = -(-(skipped + len(buffer)) // self.dtype.itemsize)
        numbers = np.arange(first, first + count, dtype=self.dtype)
        buffer[:] = numbers.view(np.uint8).data[skipped : skipped + len(buffer)]
