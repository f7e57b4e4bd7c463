"""Which blocks leave: misses of the engine within a budget, against FIFO, LRU and the offline optimum.

The engine runs for real, over an array in memory with `readahead=False`: one byte of a block is read for each access
of the trace, and what counts is how many blocks it loaded. The references are plain simulations of the same trace with
as many blocks as the budget says. The engine has less than they: it evicts ahead, in batches, and it sees no hits, only
faults. LRU, which sees every access, and OPT (Belady: evict what is used last, or never again), which knows the
future, are there to say what the rest of the way would be worth.
"""

import heapq
import mmap
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most

BLOCK = max(4096, mmap.PAGESIZE)
NEVER_WORSE = at_most(1.03)
BETTER = at_most(0.97)


def comparisons(scale: Scale) -> Iterator[Comparison]:
    blocks, length = (1024, 8_000) if scale.quick else (16_384, 200_000)
    for name in list(TRACES)[:: 3 if scale.quick else 1]:
        for share in (4, 10) if name in ("zipf-0.99", "scan-hot", "uniform") else (8,):
            budget = blocks // share
            common = {"name": name, "blocks": blocks, "budget": budget, "length": length}
            better = name.startswith(("zipf", "scan-hot"))
            labels = (("fifo", BETTER if better else NEVER_WORSE), ("lru", None), ("opt", None))
            yield Comparison(
                name=f"{name}-{share}",
                unit="misses",
                ours=Side("benchmarks.replacement:engine", common),
                references=tuple(
                    Reference(
                        label, Side("benchmarks.replacement:simulated", {**common, "policy": label}), target
                    )
                    for label, target in labels
                ),
                source=f"{TRACES[name][0]}; {length:,} accesses, {blocks:,} blocks of {BLOCK // 1024} KiB in memory, "
                f"budget {budget:,} blocks (1/{share})",
            )


# --- Traces: arrays of block numbers. `random` is a numpy.random.Generator with a fixed seed.


def _zipf(exponent: float) -> Callable[..., Any]:
    def make(random: Any, blocks: int, budget: int, length: int) -> Any:
        import numpy as np

        weights = np.arange(1, blocks + 1, dtype=np.float64) ** -exponent
        edges = np.cumsum(weights) / weights.sum()
        return random.permutation(blocks)[np.searchsorted(edges, random.random(length), side="right")]

    return make


def _scan_hot(hot: float, scanned: float) -> Callable[..., Any]:
    """Accesses to a hot set of `hot` budgets; a share of `scanned` of all goes through the blocks in order instead."""

    def make(random: Any, blocks: int, budget: int, length: int) -> Any:
        import numpy as np

        trace = random.permutation(blocks)[random.integers(0, int(hot * budget), length)]
        scan = random.random(length) < scanned
        trace[scan] = np.arange(np.count_nonzero(scan)) % blocks
        return trace

    return make


def _scan_bursts(random: Any, blocks: int, budget: int, length: int) -> Any:
    """Four budgets of accesses to a hot set of half a budget, then a scan over two budgets, and again."""
    import numpy as np

    hot, at, pieces = random.permutation(blocks)[: budget // 2], 0, []
    for _ in range(-(-length // (6 * budget))):
        pieces += [hot[random.integers(0, len(hot), 4 * budget)], (at + np.arange(2 * budget)) % blocks]
        at += 2 * budget
    return np.concatenate(pieces)[:length]


def _loop(budgets: float) -> Callable[..., Any]:
    def make(random: Any, blocks: int, budget: int, length: int) -> Any:
        import numpy as np

        return np.arange(length) % int(budgets * budget)

    return make


def _phases(hot: float, accesses: int, elsewhere: float) -> Callable[..., Any]:
    """A hot set of `hot` budgets that moves after so many budgets of accesses."""

    def make(random: Any, blocks: int, budget: int, length: int) -> Any:
        import numpy as np

        pieces, each = [], accesses * budget
        for _ in range(-(-length // each)):
            piece = random.permutation(blocks)[random.integers(0, int(hot * budget), each)]
            cold = random.random(each) < elsewhere
            piece[cold] = random.integers(0, blocks, np.count_nonzero(cold))
            pieces.append(piece)
        return np.concatenate(pieces)[:length]

    return make


def _uniform(random: Any, blocks: int, budget: int, length: int) -> Any:
    return random.integers(0, blocks, length)


def _sequential(random: Any, blocks: int, budget: int, length: int) -> Any:
    import numpy as np

    return np.arange(length) % blocks


TRACES: dict[str, tuple[str, Callable[..., Any]]] = {
    "zipf-0.6": ("Zipf, exponent 0.6", _zipf(0.6)),
    "zipf-0.8": ("Zipf, exponent 0.8", _zipf(0.8)),
    "zipf-0.99": ("Zipf, exponent 0.99", _zipf(0.99)),
    "zipf-1.2": ("Zipf, exponent 1.2", _zipf(1.2)),
    "scan-hot": ("a hot set of half the budget, half of the accesses scan", _scan_hot(0.5, 0.5)),
    "scan-hot-large": ("a hot set of the budget, half of the accesses scan", _scan_hot(1.0, 0.5)),
    "scan-hot-80": ("a hot set of half the budget, 80 % of the accesses scan", _scan_hot(0.5, 0.8)),
    "scan-hot-bursts": ("a hot set of half the budget, between scans over two budgets", _scan_bursts),
    "loop-0.95": ("a loop over 0.95 budgets: it fits", _loop(0.95)),
    "loop-1": ("a loop over the budget: it just fits", _loop(1.0)),
    "loop-1.1": ("a loop over 1.1 budgets", _loop(1.1)),
    "loop-1.5": ("a loop over 1.5 budgets", _loop(1.5)),
    "loop-2": ("a loop over 2 budgets", _loop(2.0)),
    "phases-short": (
        "a hot set of 0.9 budgets that moves every 5 budgets of accesses, 10 % anywhere",
        _phases(0.9, 5, 0.1),
    ),
    "phases": (
        "a hot set of half the budget that moves every 20 budgets of accesses, 10 % anywhere",
        _phases(0.5, 20, 0.1),
    ),
    "phases-pure": (
        "a hot set of 0.9 budgets that moves every 10 budgets of accesses, nothing else",
        _phases(0.9, 10, 0.0),
    ),
    "uniform": ("uniformly random", _uniform),
    "sequential": ("all blocks in order, again and again", _sequential),
}


def trace(name: str, blocks: int, budget: int, length: int, seed: int) -> Any:
    """Block numbers to be accessed one after the other; the same for the same arguments."""
    import numpy as np

    return TRACES[name][1](np.random.default_rng(seed), blocks, budget, length).astype(np.int64)


# --- The sides.


def engine_misses(accesses: Any, blocks: int, budget: int) -> tuple[int, float]:
    """Blocks that the engine loads for a trace, and the sum of what was read."""
    import numpy as np

    import userfault

    data = np.zeros((blocks, BLOCK), np.uint8)
    data[:, 0] = np.arange(blocks) % 251
    array = userfault.open(data, memory=budget * BLOCK, block=BLOCK, readahead=False)
    first_bytes = array.reshape(-1)[::BLOCK]
    check = float(first_bytes[accesses].sum(dtype=np.int64))  # in the order of the trace
    memory = userfault.memory_of(array)
    misses = memory.stats().blocks_read
    del array, first_bytes
    memory.close()
    return misses, check


@contextmanager
def engine(name: str, blocks: int, budget: int, length: int) -> Iterator[Measure]:
    def measure(repetition: int) -> Sample:
        misses, check = engine_misses(trace(name, blocks, budget, length, repetition), blocks, budget)
        return Sample(misses, check=check)

    yield measure


@contextmanager
def simulated(name: str, blocks: int, budget: int, length: int, policy: str) -> Iterator[Measure]:
    def measure(repetition: int) -> Sample:
        accesses = trace(name, blocks, budget, length, repetition)
        misses = POLICIES[policy](accesses.tolist(), budget)
        return Sample(misses, check=float((accesses % 251).sum()))

    yield measure


def fifo(accesses: list[int], budget: int) -> int:
    """Misses when what came first leaves first."""
    resident: set[int] = set()
    order: deque[int] = deque()
    misses = 0
    for block in accesses:
        if block in resident:
            continue
        misses += 1
        if len(order) == budget:
            resident.remove(order.popleft())
        resident.add(block)
        order.append(block)
    return misses


def lru(accesses: list[int], budget: int) -> int:
    """Misses when what was used longest ago leaves first."""
    order: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for block in accesses:
        if block in order:
            order.move_to_end(block)
            continue
        misses += 1
        if len(order) == budget:
            order.popitem(last=False)
        order[block] = None
    return misses


def opt(accesses: list[int], budget: int) -> int:
    """Misses when what is used again last, or never, leaves first: no policy has fewer (Belady)."""
    never = len(accesses)
    next_use = [never] * never
    following: dict[int, int] = {}  # block: its next access
    for i in range(never - 1, -1, -1):
        next_use[i] = following.get(accesses[i], never + accesses[i])
        following[accesses[i]] = i
    resident: dict[int, int] = {}  # block: its next use
    latest: list[tuple[int, int]] = []  # a heap of (-next use, block); those that are out of date stay in it
    misses = 0
    for block, use in zip(accesses, next_use, strict=True):
        if block not in resident:
            misses += 1
            while len(resident) == budget:
                negative, leaving = heapq.heappop(latest)
                if resident.get(leaving) == -negative:
                    del resident[leaving]
        resident[block] = use
        heapq.heappush(latest, (-use, block))
    return misses


POLICIES: dict[str, Callable[[list[int], int], int]] = {"fifo": fifo, "lru": lru, "opt": opt}
