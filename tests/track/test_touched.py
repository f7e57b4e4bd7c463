"""Results: what was touched, in bytes, pages, rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tracking import PAGE, memory_of
from userfault.errors import RangeError, UntrackableError
from userfault.track import Touched, _runs
from userfault.track._targets import targets_of
from userfault.track._touched import Found


def found(
    base: int, accessed: list[int] | None, written: list[int] | None, unit: int = PAGE, **more: Any
) -> Found:
    def runs(pages: list[int] | None) -> Any:
        return (
            None
            if pages is None
            else _runs.runs_of([(base + p * unit, base + (p + 1) * unit) for p in pages])
        )

    blind = runs(more.pop("blind", []))
    return Found(runs(accessed), runs(written), "test", unit, blind, **more)


def touched(obj: np.ndarray, *arguments: Any, **more: Any) -> Touched:
    (target,) = targets_of([obj], {})
    return Touched(0, 10**9, (target,), (found(target.start, *arguments, **more),))


def test_kinds() -> None:
    with memory_of("anonymous", 8) as array:
        both = touched(array, [1, 2, 5], [2])
        assert both.ranges() == both.ranges(kind="accessed") == [(PAGE, 3 * PAGE), (5 * PAGE, 6 * PAGE)]
        assert both.ranges(kind="written") == [(2 * PAGE, 3 * PAGE)]
        assert both.ranges(kind="read_only") == [(PAGE, 2 * PAGE), (5 * PAGE, 6 * PAGE)]
        assert both.mask(kind="written").tolist() == [page == 2 for page in range(8)]
        assert both.nbytes == {"0": 3 * PAGE}
        writes = touched(array, None, [2])
        assert writes.ranges() == [(2 * PAGE, 3 * PAGE)]
        assert writes.nbytes == {"0": PAGE}
        with pytest.raises(UntrackableError, match="use track_accesses"):
            writes.ranges(kind="accessed")
        reads = touched(array, [1], None)
        assert reads.ranges() == [(PAGE, 2 * PAGE)]
        for kind in ("written", "read_only"):
            with pytest.raises(UntrackableError, match="'test' cannot tell reads from writes"):
                reads.ranges(kind=kind)  # type: ignore[arg-type]
        with pytest.raises(RangeError, match="kind 'dirty' is not one of"):
            both.ranges(kind="dirty")  # type: ignore[arg-type]


def test_what_it_says_besides() -> None:
    with memory_of("anonymous", 4) as array:
        result = touched(array, None, [1], blind=[3], notes=("mind the gap",))
        assert result.names == ("0",)
        assert result.method() == "test"
        assert result.granularity() == PAGE
        assert result.notes() == ("mind the gap",)
        assert result.blind() == [(3 * PAGE, 4 * PAGE)]
        assert repr(result) == f"<userfault.track.Touched 0: {PAGE} bytes in 1.000 s>"


def test_ranges_count_from_the_object_and_end_with_it() -> None:
    with memory_of("anonymous", 8) as array:
        part = array[PAGE + 10 : 4 * PAGE + 10]
        result = touched(part, None, [0, 3])
        assert result.ranges() == result.shared() == [(0, PAGE - 10), (3 * PAGE - 10, 3 * PAGE)]
        assert result.mask().tolist() == [True, False, False, True], "one more page than its size says"
        assert result.slices() == [slice(0, PAGE - 10), slice(3 * PAGE - 10, 3 * PAGE)]
        middle = touched(part, None, [1])
        assert middle.shared() == []


def test_things_without_rows_are_bytes() -> None:
    buffer = bytearray(10)
    (target,) = targets_of([buffer], {})
    result = Touched(0, 1, (target,), (found(target.start, None, [0]),))
    assert result.slices() == [slice(0, 10)]
    assert result.axis() == 0


VIEWS = {
    "rows": lambda a: a,
    "columns": lambda a: a.T,
    "fortran": lambda a: a.reshape(-1).reshape(a.shape[::-1], order="F"),
    "upside down": lambda a: a[::-1],
    "every third": lambda a: a[::3],
    "inner": lambda a: a[2:-2, 100:-100],
    "inner turned": lambda a: a[2:-2, 100:-100].T[::-1, ::-1],
    "three axes": lambda a: a.reshape(a.shape[0], 4, -1).transpose(1, 0, 2),
    "one row": lambda a: a[3:4],
    "repeated": lambda a: np.broadcast_to(a[1], (5, a.shape[1])),
}


@pytest.mark.parametrize("name", VIEWS)
@settings(deadline=None)
@given(data=st.data())
def test_slices_are_the_rows_with_a_byte_on_a_touched_page(name: str, data: st.DataObject) -> None:
    rows, width = 20, 3000
    with memory_of("anonymous", -(-rows * width // PAGE)) as raw:
        array = VIEWS[name](raw[: rows * width].reshape(rows, width))
        result_of = targets_of([array], {})[0]
        count = (result_of.end - result_of.start) // PAGE
        chosen = data.draw(st.sets(st.integers(0, count - 1)))
        result = touched(array, None, sorted(chosen))
        axis = result.axis()
        assert abs(array.strides[axis]) == max(
            abs(s) for s, n in zip(array.strides, array.shape, strict=True) if n > 1
        )
        # By force: the address of every element of every row.
        offsets = np.zeros((1,) * array.ndim, np.int64)
        for k, (n, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
            offsets = offsets + (np.arange(n) * stride).reshape(
                [-1 if j == k else 1 for j in range(array.ndim)]
            )
        on_page = (array.__array_interface__["data"][0] + offsets - result_of.start) // PAGE
        hit = np.isin(on_page, sorted(chosen))
        exact = hit.any(axis=tuple(k for k in range(array.ndim) if k != axis))
        told = np.zeros(array.shape[axis], np.bool_)
        for piece in result.slices():
            assert 0 <= piece.start < piece.stop <= len(told)
            told[piece] = True
        assert not (exact & ~told).any(), "no row is left out"
        # A row with gaps in it may count for a page that only its gap lies on.
        spans = np.moveaxis(on_page, axis, 0).reshape(array.shape[axis], -1)
        spread = [
            any(low <= page <= high for page in chosen)
            for low, high in zip(spans.min(axis=1), spans.max(axis=1), strict=True)
        ]
        assert not (told & ~np.array(spread)).any(), "and none is there for nothing"
