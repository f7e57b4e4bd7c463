"""Which blocks leave: the engine's misses, counted, against first in, first out on the same trace.

The traces and the simulations are those of `python -m benchmarks replacement`, in a small size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.processes import run_python

ROOT = Path(__file__).parent.parent
BLOCKS, LENGTH = 2048, 50_000

NEVER_WORSE = 1.03
BETTER = 0.96


def run(program: str) -> Any:
    setup = f"import json\nfrom benchmarks.replacement import *\nBLOCKS, LENGTH = {BLOCKS}, {LENGTH}\n"
    return json.loads(run_python(setup + program, cwd=ROOT).check())


def against_fifo(name: str, share: int, seed: int = 1) -> float:
    """Return the engine's misses divided by FIFO's, with 1/`share` of the blocks as budget."""
    ours, theirs = run(
        f"budget = BLOCKS // {share}\n"
        f"accesses = trace({name!r}, BLOCKS, budget, LENGTH, {seed})\n"
        "ours, check = engine_misses(accesses, BLOCKS, budget)\n"
        "assert check == float((accesses % 251).sum()), 'wrong bytes'\n"
        "print(json.dumps([ours, fifo(accesses.tolist(), budget)]))\n"
    )
    return float(ours / theirs)


@pytest.mark.parametrize("share", [4, 10])
@pytest.mark.parametrize(
    "name",
    [
        "loop-0.95",
        "loop-1",
        "loop-1.1",
        "loop-1.5",
        "loop-2",
        "phases-short",
        "phases",
        "phases-pure",
        "uniform",
        "sequential",
    ],
)
def test_never_worse_than_first_in_first_out(name: str, share: int) -> None:
    assert against_fifo(name, share) <= NEVER_WORSE


@pytest.mark.parametrize("share", [4, 10])
@pytest.mark.parametrize(
    "name",
    [
        "zipf-0.6",
        "zipf-0.8",
        "zipf-0.99",
        "zipf-1.2",
        "scan-hot",
        "scan-hot-large",
        "scan-hot-80",
        "scan-hot-bursts",
    ],
)
def test_better_than_first_in_first_out_where_some_blocks_are_hotter(name: str, share: int) -> None:
    assert against_fifo(name, share) <= BETTER


def test_a_scan_leaves_the_hot_set_alone() -> None:
    before, after, hot = run("""
import numpy as np
import userfault

budget, hot = 256, 128
data = np.zeros((BLOCKS, BLOCK), np.uint8)
array = userfault.open(data, memory=budget * BLOCK, block=BLOCK, readahead=False)
bytes_ = array.reshape(-1)[::BLOCK]
memory = userfault.memory_of(array)
for scan in np.arange(hot, BLOCKS).reshape(-1, budget // 4)[:8]:  # what comes back between scans is hot
    bytes_[:hot].sum()
    bytes_[scan].sum()
bytes_[:hot].sum()
bytes_[hot : hot + 4 * budget].sum()
before = memory.stats().blocks_read
bytes_[:hot].sum()
print(json.dumps([before, memory.stats().blocks_read, hot]))
""")
    assert after - before <= hot // 20


def test_the_simulations_agree_with_the_textbook() -> None:
    # Silberschatz, Galvin, Gagne, Operating System Concepts: three frames.
    assert run("""
accesses = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
print(json.dumps([fifo(accesses, 3), lru(accesses, 3), opt(accesses, 3)]))
""") == [15, 12, 9]
