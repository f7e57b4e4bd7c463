"""Memory that can be written, over a file or a store of a test's own, and what it should come to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support.page_sources import pattern
from support.page_stores import FileStore
from support.waiting import wait_until
from userfault.memory import Mode, PagedMemory
from userfault.sources._native import FileData
from userfault.sources._own import SourceRecipe
from userfault.sources._worker_data import WorkerData

__all__ = [
    "BLOCK",
    "BLOCKS",
    "CLEAN",
    "CONTENT",
    "DIRTY",
    "NBYTES",
    "changed",
    "invert",
    "mapped",
    "matrix",
    "new_file",
    "new_store",
    "of_file",
]

BLOCK = 16 << 10
BLOCKS = 32
NBYTES = BLOCKS * BLOCK
CONTENT = pattern(0, NBYTES)
# States of a block.
CLEAN, DIRTY = 2, 4


def new_file(folder: Path) -> Path:
    """Return a new file that has the content between a head and a tail."""
    path = folder / "content"
    path.write_bytes(b"head" + CONTENT + b"tail")
    return path


def matrix(memory: PagedMemory) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the memory as an array with a block in each row."""
    return np.frombuffer(memory, np.uint8).reshape(-1, memory.block)


def new_store(folder: Path, content: bytes = CONTENT, **options: Any) -> FileStore:
    return FileStore(folder, content, **{"block": BLOCK, **options})


def mapped(store: FileStore, mode: Mode = "r+", **options: Any) -> PagedMemory:
    return PagedMemory(WorkerData(SourceRecipe(store)), name="store", mode=mode, **options)


def of_file(path: Path, mode: Mode = "r+", **options: Any) -> PagedMemory:
    return PagedMemory(
        FileData(str(path), 4, NBYTES), name="file", **{"block": BLOCK, "mode": mode, **options}
    )


def changed(*blocks: int) -> bytes:
    """Return the content with these blocks inverted."""
    array = np.frombuffer(CONTENT, np.uint8).reshape(BLOCKS, BLOCK).copy()
    array[list(blocks)] ^= 0xFF
    return array.tobytes()


def invert(memory: PagedMemory, *blocks: int) -> None:
    """Write to these blocks, and wait until the engine is through with that: a writer is woken a moment before."""
    array = matrix(memory)
    for block in blocks:
        array[block] ^= 0xFF
    wait_until(lambda: not np.isin(memory.residency(), (1, 3, 5)).any(), "nothing is on its way")
