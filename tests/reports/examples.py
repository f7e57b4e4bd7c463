"""Recordings and runs to draw, as plain data."""

from __future__ import annotations

import numpy as np

from userfault.reports import TRACE_DTYPE, Kind, Phase, PhaseReport, Recording, RunReport

SECOND = 1_000_000_000


def scan(blocks: int = 400, window: int = 40, block: int = 65536) -> Recording:
    """Look-ups, then a scan through a window of blocks."""
    random = np.random.default_rng(0)
    events: list[tuple[int, int, int]] = []
    for i, number in enumerate(random.integers(0, blocks, 60).tolist()):
        events.append((SECOND + i * 10_000_000, number, Kind.DEMAND))
    for number in range(blocks):
        time = 2 * SECOND + number * 5_000_000
        events.append((time, number, Kind.DEMAND if number % 16 == 0 else Kind.READAHEAD))
        if number >= window:
            events.append((time, number - window, Kind.EVICT))
    events.append((3 * SECOND, 5, Kind.POISON))
    phases = (Phase("look-ups", SECOND, 2 * SECOND), Phase("scan", 2 * SECOND, 4 * SECOND))
    trace = np.array(events, TRACE_DTYPE)
    return Recording("example", blocks * block, block, window * block, trace, SECOND, 4 * SECOND, phases)


def nothing() -> Recording:
    return Recording("nothing", 4096, 4096, None, np.array([], TRACE_DTYPE), 0, SECOND)


def run(*, checked: bool = True) -> RunReport:
    phase = PhaseReport(
        "look-ups", 1.5, 500, 2000, 1 << 20, 3 << 20, 400, 16, 4, 2, 1500, 2_500_000, 0.75, checked
    )
    return RunReport(
        "rain.zarr",
        "zarr",
        3 << 30,
        1 << 20,
        300 << 20,
        0.012,
        299 << 20,
        298 << 20,
        800_000,
        4_000_000,
        (phase,),
    )
