"""Memory of the kinds that can be tracked, and ways to write to it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userfault.kernel import Mapping

__all__ = ["KINDS", "PAGE", "memory_of", "pages", "poke"]

PAGE = mmap.PAGESIZE
KINDS = ("anonymous", "memfd", "private memfd", "numpy")


@contextmanager
def memory_of(kind: str, count: int) -> Iterator[NDArray[np.uint8]]:
    """Give `count` whole pages as an array of bytes, all zeros, none of them there yet."""
    if kind == "numpy":
        whole = np.zeros((count + 1) * PAGE, np.uint8)
        skip = -whole.ctypes.data % PAGE
        yield whole[skip : skip + count * PAGE]
        return
    mapping = (
        Mapping.anonymous(count * PAGE)
        if kind == "anonymous"
        else Mapping.memfd(count * PAGE, shared=kind == "memfd")
    )
    # The array keeps the memory, as long as anything refers to it.
    yield np.frombuffer(mapping.view(), np.uint8)


def poke(array: NDArray[Any], start: int, length: int = 1, value: int = 1) -> None:
    """Write bytes of an array, without the GIL."""
    ctypes.memset(array.ctypes.data + start, value, length)


def pages(ranges: list[tuple[int, int]]) -> list[int]:
    """Return the numbers of the pages that byte ranges have a byte in."""
    return [page for start, stop in ranges for page in range(start // PAGE, -(-stop // PAGE))]


def written_by_read(array: NDArray[Any], start: int, length: int) -> None:
    """Have the kernel write: read(2) from a file into the array."""
    fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert os.readv(fd, [memoryview(array)[start : start + length]]) == length
    finally:
        os.close(fd)
