"""Heat: the share of the time in which pages were touched, as a matrix and as regions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.trace_data import PAGE, looks, sampled, thing, trace_of
from userfault._trace import EventKind, Trace, TracedObject, cold, heat_matrix, hot
from userfault.errors import RangeError

KINDS = st.sampled_from(["accessed", "written", "read_only"])


def overlap(a: float, b: float, c: float, d: float) -> float:
    return max(0.0, min(b, d) - max(a, c))


def counted(trace: Trace, known: TracedObject, columns: int, rows: int, kind: str) -> np.ndarray:
    """The matrix, cell by cell and page by page."""
    matrix = np.full((rows, columns), np.nan)
    width, height = trace.duration_ns / columns, known.pages / rows
    for column in range(columns):
        begin, end = column * width, (column + 1) * width
        observed, heat = 0.0, np.zeros(rows)
        for start, stop, pages in looks(trace, known, kind):
            lasted = overlap(start, stop, begin, end)
            observed += lasted
            for row in range(rows):
                heat[row] += lasted * sum(
                    overlap(page, page + 1, row * height, (row + 1) * height) for page in pages
                )
        if observed:
            matrix[:, column] = heat / observed / height
    return matrix


@given(sampled(), st.integers(1, 7), st.integers(1, 15), KINDS)
@settings(max_examples=150, deadline=None)
def test_each_cell_has_the_share_of_it_that_was_touched(
    trace: Trace, columns: int, rows: int, kind: str
) -> None:
    for known in trace.objects:
        matrix = heat_matrix(trace, known.name, columns, rows, kind)
        expected = counted(trace, known, columns, rows, kind)
        np.testing.assert_allclose(matrix, expected, atol=1e-9)
        # What was never touched is never warm by rounding.
        assert np.array_equal(matrix == 0, np.nan_to_num(expected, nan=1) < 1e-12)


@given(sampled(), KINDS, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_hot_and_cold_regions_have_the_pages_of_that_heat(trace: Trace, kind: str, share: float) -> None:
    regions, frozen = hot(trace, at_least=share, kind=kind), cold(trace, at_most=share, kind=kind)
    assert [r.heat for r in regions] == sorted((r.heat for r in regions), reverse=True)
    assert [r.nbytes for r in frozen] == sorted((r.nbytes for r in frozen), reverse=True)
    for known in trace.objects:
        seen = looks(trace, known, kind)
        total = sum(stop - start for start, stop, _ in seen)
        edges = np.clip(np.arange(known.pages + 1) * PAGE - known.lead, 0, known.nbytes)
        for found, fits in ((regions, lambda h: h >= share), (frozen, lambda h: h <= share)):
            mask = np.zeros(known.nbytes, bool)
            for page in range(known.pages):
                heat = sum(stop - start for start, stop, pages in seen if page in pages) / total
                mask[edges[page] : edges[page + 1]] = fits(heat)
            told = np.zeros(known.nbytes, bool)
            for region in found:
                if region.object == known.name:
                    assert not told[region.start : region.stop].any()
                    told[region.start : region.stop] = True
            assert np.array_equal(told, mask)


@pytest.mark.parametrize("pages", [100, 1 << 30])
def test_regions_of_small_and_of_huge_objects(pages: int) -> None:
    trace = trace_of([thing(pages=pages)], [(0, 0, 10, [(3, 4, 1), (90, 10, 1)]), (0, 10, 20, [(5, 4, 1)])])
    regions = [(r.start // PAGE, r.stop // PAGE, r.heat) for r in hot(trace, at_least=0.1)]
    assert regions == [(3, 9, pytest.approx(8 / 12)), (90, 100, 0.5)]
    assert [r.nbytes // PAGE for r in cold(trace)] == sorted(
        [3, 81, *[pages - 100] * (pages > 100)], reverse=True
    )


def test_a_region_knows_its_mean_heat_size_and_name() -> None:
    known = thing(pages=10, name="grid")
    trace = trace_of([known], [(0, 0, 30, [(2, 4, 1)]), (0, 30, 40, [(2, 2, 1), (8, 1, 0)])])
    (region,) = hot(trace)
    assert (region.object, region.start, region.stop, region.nbytes) == ("grid", 2 * PAGE, 6 * PAGE, 4 * PAGE)
    assert region.heat == pytest.approx((1 + 1 + 0.75 + 0.75) / 4)
    assert [r.nbytes // PAGE for r in hot(trace, at_least=0.01)] == [4, 1]
    assert [r.nbytes // PAGE for r in hot(trace, at_least=0.01, min_bytes=2 * PAGE)] == [4]
    assert [(r.start // PAGE, r.stop // PAGE) for r in cold(trace)] == [(0, 2), (6, 8), (9, 10)]
    assert len(cold(trace, limit=2)) == 2
    assert [r.start // PAGE for r in hot(trace, kind="read_only", at_least=0.01)] == [8]


def test_a_matrix_of_a_part_of_the_time() -> None:
    trace = trace_of([thing(pages=2)], [(0, t, t + 10, [(t // 10 % 2, 1, 0)]) for t in range(0, 80, 10)])
    assert heat_matrix(trace, 0, 2, 2, start_ns=20, stop_ns=40).tolist() == [[1, 0], [0, 1]]
    assert heat_matrix(trace, 0, 1, 2).tolist() == [[0.5], [0.5]]


def test_nothing_is_known_before_and_after() -> None:
    trace = trace_of([thing(pages=1)], [(0, 10, 20, [(0, 1, 1)])], duration_ns=40)
    assert heat_matrix(trace, 0, 4, 1).tolist()[0][1] == 1
    assert np.isnan(heat_matrix(trace, 0, 4, 1)[0, [0, 2, 3]]).all()


def test_a_matrix_of_events() -> None:
    memory = thing(pages=8, watched="faults", died_ns=80)
    events = [
        (0, 5, 900, 0, 1),
        (0, 6, 0, 1, 2),
        (0, 7, 0, 1, 3),
        (0, 45, 0, 7, 1),
        (0, 50, 0, 0, 7),
        (0, 60, 0, 0, 4),
    ]
    trace = trace_of([memory], [], events, duration_ns=160)
    loads = heat_matrix(trace, 0, 4, 2)
    assert loads[:, :2].tolist() == [[0.5, 0], [0, 0.25]]
    assert np.isnan(loads[:, 2:]).all()
    assert heat_matrix(trace, 0, 4, 2, EventKind.DEMAND)[:, :2].tolist() == [[0.25, 0], [0, 0.25]]
    assert heat_matrix(trace, 0, 4, 2, [EventKind.EVICT, EventKind.READAHEAD])[:, :2].tolist() == [
        [0.25, 0.25],
        [0, 0],
    ]
    assert heat_matrix(trace, 0, 4, 2, "written")[:, :2].tolist() == [[0, 0.25], [0, 0]]
    # Bins that are finer than blocks: each has its part of the block.
    assert heat_matrix(trace, 0, 2, 16)[:3, 0].tolist() == [1, 1, 1]


def test_what_was_not_watched_is_refused() -> None:
    trace = trace_of(
        [thing(0, watched="writes"), thing(1, watched="faults"), thing(2, tells_writes=False)],
        [(0, 0, 1, []), (2, 0, 1, [])],
    )
    with pytest.raises(RangeError, match="'o0' was watched for writes only"):
        heat_matrix(trace, 0, 1, 1, "accessed")
    with pytest.raises(RangeError, match="'o2' was watched for accesses only"):
        hot(trace, objects="o2", kind="written")
    with pytest.raises(RangeError, match="'o1' is a paged memory"):
        heat_matrix(trace, 1, 1, 1, "read_only")
    with pytest.raises(RangeError, match="no paged memory"):
        heat_matrix(trace, 0, 1, 1, EventKind.DEMAND)
    with pytest.raises(RangeError, match="no object 'x'; it has 'o0', 'o1', 'o2'"):
        hot(trace, objects=["x"])
    with pytest.raises(RangeError, match="not one of"):
        hot(trace, kind="touched")  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="no object of this trace"):
        hot(trace, kind="read_only")
    with pytest.raises(RangeError, match="between 0 and 1"):
        hot(trace, at_least=2)
    with pytest.raises(RangeError, match="needs bins"):
        heat_matrix(trace, 0, 0, 1)
    assert {region.object for region in cold(trace)} == {"o0", "o2"}


def test_a_long_trace_is_drawn_at_once() -> None:
    count = 200_000
    samples = np.zeros(count, trace_of([thing()]).samples.dtype)
    samples["stop_ns"] = np.arange(1, count + 1)
    samples["start_ns"] = samples["stop_ns"] - 1
    samples["first"], samples["runs"] = np.arange(count), 1
    runs = np.zeros(count, trace_of([thing()]).runs.dtype)
    runs["page"], runs["count"] = np.arange(count) % 1000, 1
    trace = Trace((thing(pages=1000),), samples, runs, trace_of([thing()]).events, count)
    matrix = heat_matrix(trace, 0, 100, 100)
    np.testing.assert_allclose(matrix, 1e-3, rtol=1e-6)
