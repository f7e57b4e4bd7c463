"""A Zarr array that is larger than the machine's memory, summed within 256 MiB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import userfault
from support.smaps import resident_bytes

zarr = pytest.importorskip("zarr", reason="zarr is not installed: pip install 'userfault[zarr]'")

BUDGET = 256 << 20
CHUNK = 32 << 20
# Distinct chunks; the others are hard links to these.
PATTERNS = 7
MOST = 64 << 30


def make(path: Path, nbytes: int) -> tuple[int, int]:
    """Write an array of `nbytes` or a little more; return how many chunks it has, and the sum of its elements."""
    chunks = -(-nbytes // CHUNK)
    length = CHUNK // 8
    array: Any = zarr.create_array(
        str(path),
        shape=(chunks * length,),
        chunks=(length,),
        dtype="<i8",
        compressors=zarr.codecs.ZstdCodec(level=1),
    )
    total = 0
    for i in range(chunks):
        if i < PATTERNS:
            # Few runs of equal numbers: it compresses to next to nothing, and decodes as fast as memory is filled.
            content = np.repeat(np.arange(i, i + 64, dtype=np.int64) * 1_000_003, length // 64)
            array[i * length : (i + 1) * length] = content
        else:
            os.link(path / "c" / str(i % PATTERNS), path / "c" / str(i))
        first = i % PATTERNS
        total += sum(range(first, first + 64)) * 1_000_003 * (length // 64)
    return chunks, total


def test_an_array_larger_than_memory_is_summed_within_a_budget(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    if free > MOST:
        pytest.skip(
            f"NOT RUN HERE: {free >> 30} GiB are free, and reading more than {MOST >> 30} GiB takes too long"
        )
    nbytes = free + (1 << 30)
    chunks, total = make(tmp_path / "large.zarr", nbytes)
    on_disk = sum(
        len({path.stat().st_ino: path}) * path.stat().st_size
        for path in (tmp_path / "large.zarr/c").iterdir()
        if int(path.name) < PATTERNS
    )
    assert on_disk < 1 << 20

    array = userfault.open(tmp_path / "large.zarr", memory=BUDGET)
    memory = userfault.memory_of(array)
    assert array.nbytes == chunks * CHUNK > psutil.virtual_memory().total // 2
    assert array.nbytes >= nbytes
    assert int(array.sum()) == total

    stats = memory.stats()
    assert stats.bytes_read >= array.nbytes
    assert stats.resident_peak <= BUDGET
    assert resident_bytes([(memory.address, memory.address + memory.nbytes)]) <= BUDGET
    assert stats.evictions * memory.block >= array.nbytes - 2 * BUDGET
    # And looked up, far behind.
    at = array.size - 5
    assert array[at] == ((chunks - 1) % PATTERNS + 63) * 1_000_003
