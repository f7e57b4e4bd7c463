"""The replay of traces, against a memory simulated one event at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.reports import TRACE_DTYPE, Kind, Recording, touched_blocks
from userfault.reports._replay import changes, count, occupancy, resident_over_time

BLOCK = 4096
Event = tuple[int, int, int]


def recording(
    events: Sequence[Event], *, blocks: int = 8, nanoseconds: int = 1000, budget: int | None = None
) -> Recording:
    return Recording(
        "test", blocks * BLOCK, BLOCK, budget, np.array(list(events), TRACE_DTYPE), 0, nanoseconds
    )


def test_blocks_come_and_go() -> None:
    times, level = resident_over_time(
        recording(
            [(100, 0, Kind.DEMAND), (200, 1, Kind.READAHEAD), (300, 0, Kind.EVICT), (400, 2, Kind.PREFETCH)]
        )
    )
    assert (times * 1e9).round().tolist() == [0, 100, 200, 300, 400, 1000]
    assert (level / BLOCK).tolist() == [0, 1, 2, 1, 2, 2]


def test_a_block_that_is_loaded_twice_counts_once() -> None:
    _, level = resident_over_time(
        recording([(1, 3, Kind.DEMAND), (2, 3, Kind.READAHEAD), (3, 3, Kind.EVICT)])
    )
    assert (level / BLOCK).tolist() == [0, 1, 0, 0]


def test_what_was_resident_before_the_trace_is_seen_by_its_eviction() -> None:
    found = changes(recording([(5, 2, Kind.EVICT), (6, 2, Kind.DEMAND)]))
    assert found.at_start.tolist() == [2]
    _, level = resident_over_time(recording([(5, 2, Kind.EVICT), (6, 2, Kind.DEMAND)]))
    assert (level / BLOCK).tolist() == [1, 0, 1, 1]


def test_a_poisoned_block_is_not_resident() -> None:
    _, level = resident_over_time(recording([(5, 2, Kind.POISON), (6, 1, Kind.DEMAND)]))
    assert (level / BLOCK).tolist() == [0, 1, 1]


def test_an_empty_trace() -> None:
    empty = recording([])
    times, level = resident_over_time(empty)
    assert (times.tolist(), level.tolist()) == ([0.0, 1e-6], [0, 0])
    assert not occupancy(empty, 5, 4).any()
    assert touched_blocks(empty) == 0


def test_occupancy_is_a_share_of_each_cell() -> None:
    grid = occupancy(
        recording([(100, 0, Kind.DEMAND), (100, 1, Kind.DEMAND), (600, 0, Kind.EVICT)]), columns=10, rows=4
    )
    # Row 0 holds blocks 0 and 1: both from column 1 on, one of them from column 6 on.
    assert grid[0].tolist() == [0, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert not grid[1:].any()


def test_rows_are_repeated_when_there_are_fewer_blocks() -> None:
    grid = occupancy(recording([(0, 1, Kind.DEMAND)], blocks=2), columns=2, rows=6)
    assert grid[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_counts() -> None:
    events = [(0, 0, Kind.DEMAND), (10, 0, Kind.DEMAND), (999, 7, Kind.DEMAND), (500, 3, Kind.EVICT)]
    cells = count(recording(events), Kind.DEMAND, columns=2, rows=2)
    assert cells.tolist() == [[2, 0], [0, 1]]


def test_touched_blocks_within_a_stretch_of_time() -> None:
    events = [(10, 0, Kind.DEMAND), (20, 1, Kind.READAHEAD), (30, 0, Kind.DEMAND), (40, 5, Kind.EVICT)]
    assert touched_blocks(recording(events)) == 2
    assert touched_blocks(recording(events), 15, 30) == 1


@pytest.mark.parametrize("rows", [1, 3, 8, 50])
def test_the_grid_is_never_out_of_range(rows: int) -> None:
    events = [(0, 0, Kind.DEMAND), (1000, 7, Kind.DEMAND), (1001, 7, Kind.EVICT)]
    assert occupancy(recording(events), 7, rows).shape == (rows, 7)
    assert count(recording(events), Kind.DEMAND, 7, rows).shape == (rows, 7)


events_strategy = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from([Kind.DEMAND, Kind.READAHEAD, Kind.PREFETCH, Kind.EVICT])),
    max_size=60,
)


@given(events_strategy)
def test_it_agrees_with_a_simulation(steps: list[tuple[int, Kind]]) -> None:
    events = [(10 * i, block, kind) for i, (block, kind) in enumerate(steps)]
    first = dict[int, Kind]()
    for block, kind in steps:
        first.setdefault(block, kind)
    resident = {block for block, kind in first.items() if kind is Kind.EVICT}
    expected = [len(resident)]
    for block, kind in steps:
        before = len(resident)
        resident = resident - {block} if kind is Kind.EVICT else resident | {block}
        if len(resident) != before:
            expected.append(len(resident))
    shuffled = np.random.default_rng(len(steps)).permutation(len(events))
    _, level = resident_over_time(recording([events[i] for i in shuffled]))
    assert (level[:-1] // BLOCK).tolist() == expected
