"""What the demo reads: everything once, in order, in pieces that fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from userfault.cli._demo.plan import Piece, lookups, pieces, step_size, windows

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


def one(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {"": array}


@given(shapes, st.integers(1, 4), st.sampled_from([8, 64, 100, 10_000]))
def test_pieces_cover_everything_once_and_in_order(shape: tuple[int, ...], align: int, step: int) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape)
    plan = pieces(one(array), step, align)
    parts = [array[piece.index] for piece in plan]
    assert all(part.flags.c_contiguous for part in parts)
    joined = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.array([], np.int64)
    np.testing.assert_array_equal(joined, array.reshape(-1))


def test_pieces_do_not_cut_chunks() -> None:
    plan = pieces(one(np.zeros((10, 4), np.int8)), 16, align=3)
    assert [piece.index for piece in plan] == [(slice(i, min(i + 3, 10)),) for i in (0, 3, 6, 9)]


def test_rows_larger_than_a_step_are_cut_along_the_next_axis() -> None:
    plan = pieces(one(np.zeros((2, 3, 4), np.int8)), 8)
    assert [piece.index for piece in plan[:2]] == [(slice(0, 1), slice(0, 2)), (slice(0, 1), slice(2, 3))]


def test_lookups_are_spread_by_size_and_always_the_same() -> None:
    arrays = {
        "small": np.zeros(10),
        "large": np.zeros((100, 10)),
        "empty": np.zeros((0, 3)),
        "scalar": np.zeros(()),
    }
    plan = lookups(arrays, 200)
    assert plan == lookups(arrays, 200)
    assert sum(piece.name == "large" for piece in plan) > 150
    assert not any(piece.name == "empty" for piece in plan)
    for piece in plan:
        assert arrays[piece.name][piece.index].shape == ()


@pytest.mark.parametrize("arrays", [{}, {"a": np.zeros((0,))}])
def test_nothing_to_read(arrays: dict[str, NDArray[Any]]) -> None:
    assert lookups(arrays, 5) == []
    assert windows(arrays, 100) == []
    assert pieces(arrays, 100) == []


def test_windows_overlap_and_stay_in_the_middle_third() -> None:
    array = np.zeros((36, 512, 1024), np.float64)  # 4 MiB a row: 4 rows a step
    plan = windows({"small": np.zeros(3), "large": array}, 16 << 20)
    assert plan[0] == Piece("large", (slice(12, 20), slice(170, 341)))
    assert plan[1].index[0] == slice(16, 24)
    assert plan[-1].index[0] == slice(20, 24)


def test_one_step_is_one_window() -> None:
    assert windows(one(np.zeros(5)), 100) == [Piece("", (slice(0, 5),))]
    assert windows(one(np.zeros(())), 100) == [Piece("", ())]


@pytest.mark.parametrize(
    ("nbytes", "budget", "expected"),
    [
        (4 << 30, 400 << 20, 16 << 20),
        (4 << 30, 8 << 20, 2 << 20),
        (50 << 20, 5 << 20, 1 << 20),
        (10, 10, 64 << 10),
    ],
)
def test_steps_are_some_dozens_and_fit_the_budget(nbytes: int, budget: int, expected: int) -> None:
    assert step_size(nbytes, budget) == expected
