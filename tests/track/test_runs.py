"""Sets of pages as runs, against sets of numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userfault.track import _runs

PAIRS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


def members(runs: _runs.Runs) -> set[int]:
    return {n for start, end in runs.tolist() for n in range(start, end)}


def of(pairs: list[tuple[int, int]]) -> set[int]:
    return {n for start, end in pairs for n in range(start, end)}


def check_form(runs: _runs.Runs) -> None:
    assert runs.dtype == np.uint64
    assert runs.shape == (len(runs), 2)
    flat = runs.ravel().tolist()
    assert flat == sorted(set(flat)), "sorted, none empty, none that touch"


@settings(deadline=None)
@given(PAIRS)
def test_runs_hold_what_their_pairs_do(pairs: list[tuple[int, int]]) -> None:
    runs = _runs.runs_of(pairs)
    check_form(runs)
    assert members(runs) == of(pairs)
    assert _runs.total(runs) == len(of(pairs))


@settings(deadline=None)
@given(PAIRS, PAIRS)
def test_set_operations(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    one, two = _runs.runs_of(a), _runs.runs_of(b)
    for result, expected in (
        (_runs.union(one, two), of(a) | of(b)),
        (_runs.intersect(one, two), of(a) & of(b)),
        (_runs.subtract(one, two), of(a) - of(b)),
    ):
        check_form(result)
        assert members(result) == expected


@settings(deadline=None)
@given(PAIRS, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5))
def test_clips(pairs: list[tuple[int, int]], bounds: list[tuple[int, int]]) -> None:
    runs = _runs.runs_of(pairs)
    cut = _runs.pieces(runs, bounds)
    assert len(cut) == len(bounds)
    for (start, end), piece in zip(bounds, cut, strict=True):
        check_form(piece)
        assert members(piece) == of(pairs) & set(range(start, end))
        assert members(_runs.clip(runs, start, max(start, end))) == members(piece)


@settings(deadline=None)
@given(PAIRS, st.integers(0, 20), st.integers(1, 30), st.integers(1, 7))
def test_masks(pairs: list[tuple[int, int]], start: int, length: int, unit: int) -> None:
    runs = _runs.runs_of(pairs)
    mask = _runs.as_mask(runs, start, start + length, unit)
    whole = of(pairs) & set(range(start, start + length))
    assert mask.tolist() == [
        bool(whole & set(range(low, low + unit))) for low in range(start, start + length, unit)
    ]
    back = _runs.from_mask(mask, start, unit)
    check_form(back)
    assert members(back) == {
        n for i in np.flatnonzero(mask).tolist() for n in range(start + i * unit, start + (i + 1) * unit)
    }


@pytest.mark.parametrize("cuts", [[], [5], [5, 7], [1, 2, 3, 9]])
def test_joins_what_a_scan_left_in_pieces(cuts: list[int]) -> None:
    edges = np.array([0, *cuts, 10], np.uint64)
    starts, ends = np.append(edges[:-1], np.uint64(12)), np.append(edges[1:], np.uint64(13))
    assert _runs.joined(starts, ends).tolist() == [[0, 10], [12, 13]]


def test_nothing_is_joined_to_nothing() -> None:
    none = np.zeros(0, np.uint64)
    assert _runs.joined(none, none).shape == (0, 2)


def test_addresses_of_the_upper_half_are_numbers_too() -> None:
    high = (1 << 64) - 8192
    runs = _runs.runs_of([(high, high + 4096), (high - 4096, high)])
    assert runs.tolist() == [[high - 4096, high + 4096]]
    assert _runs.as_mask(runs, high - 4096, high + 4096, 4096).tolist() == [True, True]
