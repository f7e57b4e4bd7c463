"""All counters of the process as one document of types that JSON has."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from userfault.observe._open_memories import current_pager, open_memories

if TYPE_CHECKING:
    from userfault.observe._open_memories import OpenMemory
    from userfault.stats import Histogram

__all__ = ["VERSION", "snapshot"]

# Of the document: a reader that knows another one says so.
VERSION = 1


def snapshot() -> dict[str, Any]:
    """Return the counters of all open memories and of the pager.

    Returns:
        `version` of the document, `pid`, `time_ns` (CLOCK_MONOTONIC), `pager` (`PagerStats` as a dictionary; None
        before the first memory), and `memories`: for each its `name`, `id` ("" unless another memory has this name),
        `nbytes`, `block`, `mode`, and all of `MemoryStats.as_dict()`. Histograms also have their `buckets`, as pairs
        of a bucket's number and its count.

    Example:
        >>> import numpy as np, userfault
        >>> from userfault.observe import snapshot
        >>> a = userfault.open(np.arange(1e6), name="numbers")
        >>> [memory["nbytes"] for memory in snapshot()["memories"] if memory["name"] == "numbers"]
        [8000000]
    """
    memories = [_memory(entry) for entry in open_memories()]
    return {
        "version": VERSION,
        "pid": os.getpid(),
        "time_ns": time.monotonic_ns(),
        "pager": _pager(),
        "memories": memories,
    }


def _pager() -> dict[str, Any] | None:
    if current_pager() is None:
        return None
    from userfault.pager import pager_stats

    return asdict(pager_stats())


def _memory(entry: OpenMemory) -> dict[str, Any]:
    memory = entry.memory
    stats = memory.stats()
    counters = stats.as_dict()
    for stage, histogram in stats.latency.items():
        counters["latency"][stage].update(sum_ns=histogram.sum_ns, buckets=_filled(histogram))
    return {
        "name": memory.name,
        "id": entry.id,
        "nbytes": memory.nbytes,
        "block": memory.block,
        "mode": getattr(memory, "mode", "r"),
        **counters,
    }


def _filled(histogram: Histogram) -> list[tuple[int, int]]:
    return [(bucket, count) for bucket, count in enumerate(histogram.buckets) if count]
