"""A writer that is killed at any moment leaves whole chunks: old ones or new ones, never parts."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from userfault.sources._location import Location
from userfault.sources._pickle import dumps
from userfault.sources._zarr_recipe import ZarrRecipe

# Writes a number everywhere, then the next one, and says when it has been kept.
WRITER = f"""
import sys
sys.path[:] = {sys.path!r}
import pickle
store = pickle.loads(sys.stdin.buffer.read()).load()
number = 0
while True:
    number += 1
    store.write_from(0, memoryview(bytes([number % 256]) * store.nbytes))
    print(number, flush=True)
"""


@pytest.mark.parametrize("options", [{}, {"shards": (64, 64)}], ids=["chunks", "shards"])
def test_killed_in_a_write(tmp_path: Path, options: Any) -> None:
    at = tmp_path / "a"
    zarr.create_array(at, shape=(128, 256), chunks=(32, 64), dtype="u1", **options)
    recipe = ZarrRecipe(Location.parse(at), mode="r+")
    rng = random.Random(1)
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(dumps(recipe))
            process.stdin.close()
            # Somewhere in a write: behind as many as chance has it.
            lines = [process.stdout.readline() for _ in range(rng.randrange(1, 20))]
            process.kill()
            lines += process.stdout.read().splitlines()
        kept = int(lines[-1])
        whole = np.asarray(zarr.open_array(at, mode="r")[:])
        for row in range(0, 128, 32):
            for column in range(0, 256, 64):
                chunk = whole[row : row + 32, column : column + 64]
                assert (chunk == chunk[0, 0]).all(), "a chunk of two writes"
                assert chunk[0, 0] in (kept % 256, (kept + 1) % 256), (
                    "a write that was said to be kept is not"
                )
