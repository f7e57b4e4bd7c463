"""The working set, and what objects had in all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.trace_data import PAGE, looks, page_bytes, sampled, thing, trace_of
from userfault._trace import EventKind, Trace, _working_set, totals, working_set
from userfault.errors import RangeError


@given(sampled(), st.none() | st.integers(1, 80), st.sampled_from(["accessed", "written", "read_only"]))
@settings(max_examples=200, deadline=None)
def test_each_page_in_the_window_counts_once(trace: Trace, window: int | None, kind: str) -> None:
    found = working_set(trace, None if window is None else window * 1e-9, kind=kind)
    assert found.times_ns.tolist() == sorted(set(trace.samples["stop_ns"].tolist()))
    assert found.window_ns == window
    for index, now in enumerate(found.times_ns.tolist()):
        expected = 0
        for known in trace.objects:
            seen = [(stop, pages) for _, stop, pages in looks(trace, known, kind) if stop <= now]
            # The last look counts until there is a newer one; others as long as the window is.
            inside = [pages for stop, pages in seen if window is not None and stop > now - window]
            if seen:
                inside.append(seen[-1][1])
            bytes_of = sum(page_bytes(known, page) for page in set().union(*inside))
            assert found.by_object[known.name][index] == bytes_of
            expected += bytes_of
        assert found.nbytes[index] == expected


def test_a_window_goes_through_in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [(0, t, t + 1, [(t % 5, 3, 0), (8 + t % 3, 4, 0)]) for t in range(60)]
    trace = trace_of([thing(pages=16)], samples)
    whole = working_set(trace, 7e-9)
    monkeypatch.setattr(_working_set, "_PAIRS", 3)
    assert working_set(trace, 7e-9).nbytes.tolist() == whole.nbytes.tolist()
    assert whole.peak == (7 + 6) * PAGE


def test_percentiles_are_of_the_time() -> None:
    trace = trace_of([thing()], [(0, 0, 90, [(0, 1, 1)]), (0, 90, 100, [(0, 8, 1)])])
    found = working_set(trace)
    assert found.percentiles() == {
        0: PAGE,
        25: PAGE,
        50: PAGE,
        75: PAGE,
        95: 8 * PAGE,
        99: 8 * PAGE,
        100: 8 * PAGE,
    }
    assert found.percentiles([90, 90.5]) == {90: PAGE, 90.5: 8 * PAGE}
    assert (found.peak, found.mean) == (8 * PAGE, 1.7 * PAGE)
    with pytest.raises(RangeError, match="between 0 and 100, not 101"):
        found.percentiles([101])


def test_what_is_gone_is_in_no_working_set() -> None:
    things = [thing(0, died_ns=20), thing(1)]
    samples = [
        (0, 0, 10, [(0, 2, 1)]),
        (1, 0, 10, []),
        (0, 10, 20, [(0, 1, 1)]),
        (1, 10, 30, []),
        (1, 30, 40, []),
    ]
    found = working_set(trace_of(things, samples), 1e-6)
    assert [n // PAGE for n in found.nbytes.tolist()] == [2, 2, 0, 0]
    found = working_set(trace_of(things, samples))
    assert [n // PAGE for n in found.nbytes.tolist()] == [2, 1, 0, 0]


def test_a_trace_without_samples() -> None:
    found = working_set(trace_of([thing()]), 1)
    assert (found.peak, found.mean, found.percentiles([50])) == (0, 0.0, {50: 0})
    assert working_set(trace_of([])).peak == 0
    with pytest.raises(RangeError, match="no object of this trace has samples"):
        working_set(trace_of([thing(watched="faults")]))
    with pytest.raises(RangeError, match="longer than 0 seconds, not 0"):
        working_set(trace_of([thing()]), 0)


@given(sampled())
@settings(max_examples=100, deadline=None)
def test_totals_count_each_page(trace: Trace) -> None:
    for known, found in zip(trace.objects, totals(trace), strict=True):
        seen = looks(trace, known)
        touched = set().union(*(pages for _, _, pages in seen))
        written = set().union(*(pages for _, _, pages in looks(trace, known, "written")))
        assert found.touched == sum(page_bytes(known, page) for page in touched)
        assert found.written == sum(page_bytes(known, page) for page in written)
        assert (found.samples, found.touches) == (len(seen), sum(len(pages) for _, _, pages in seen))
        lasted = sum(stop - start for start, stop, _ in seen)
        warm = sum((stop - start) * page_bytes(known, page) for start, stop, pages in seen for page in pages)
        assert found.heat == pytest.approx(warm / lasted / known.nbytes)
        assert found.share == found.touched / known.nbytes


def test_totals_say_what_is_not_known() -> None:
    things = [
        thing(0, watched="writes"),
        thing(1, tells_writes=False),
        thing(2),
        thing(3, watched="faults", nbytes=4 * PAGE - 1),
    ]
    samples = [(0, 0, 1, [(0, 2, 1)]), (1, 0, 1, [(0, 3, 0)])]
    events = [(3, 1, 5, 3, 1), (3, 2, 0, 0, 2), (3, 3, 0, 3, 4), (3, 4, 9, 3, 1), (3, 5, 0, 0, 7)]
    found = totals(trace_of(things, samples, events))
    assert (found[0].touched, found[0].written, found[0].share) == (None, 2 * PAGE, 0.25)
    assert (found[1].touched, found[1].written) == (3 * PAGE, None)
    assert (found[2].touched, found[2].samples, found[2].heat, found[2].share) == (0, 0, 0.0, 0.0)
    assert (found[3].touched, found[3].written, found[3].loaded) == (2 * PAGE - 1, PAGE, 3 * PAGE)
    kinds = EventKind
    assert found[3].events == {kinds.DEMAND: 2, kinds.READAHEAD: 1, kinds.EVICT: 1, kinds.DIRTY: 1}
