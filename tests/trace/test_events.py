"""Events of paged memories: latencies, activity, and plans for a replay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.trace_data import PAGE, thing, trace_of
from userfault._trace import EventKind, Trace, demand_and_ahead, fault_latency, plan
from userfault.errors import RangeError, TraceError

DEMAND, READAHEAD, PREFETCH, EVICT = 1, 2, 3, 4


def histogram(*buckets: int) -> dict[str, object]:
    return {"count": sum(buckets), "sum_ns": 10 * sum(buckets), "buckets": list(buckets)}


def memory(number: int = 0, pages: int = 64, **more: object) -> object:
    return thing(number, pages, "faults", **more)


def loads(*blocks: int, kind: int = DEMAND, nbytes: int = 64 * PAGE) -> Trace:
    return trace_of([memory(nbytes=nbytes)], [], [(0, t, 5, block, kind) for t, block in enumerate(blocks)])


def test_latencies_of_demand_faults() -> None:
    things = [
        memory(0, latency={"fault": histogram(1, 2), "queue": histogram(4)}),
        memory(1, latency={"fault": histogram(0, 1, 1)}),
        thing(2),
    ]
    events = [(0, 1, 300, 0, DEMAND), (0, 2, 0, 1, READAHEAD), (1, 3, 100, 0, DEMAND), (1, 4, 200, 0, DEMAND)]
    trace = trace_of(things, [], events)
    found = fault_latency(trace)
    assert found.took_ns.tolist() == [100, 200, 300]
    assert (found.count, found.mean_ns, found.percentile(50), found.percentile(100)) == (3, 200, 200, 300)
    assert found.stages["fault"].buckets == (1, 3, 1)
    assert (found.stages["fault"].count, found.stages["fault"].sum_ns) == (5, 50)
    assert found.stages["queue"].count == 4
    assert fault_latency(trace, "o1").took_ns.tolist() == [100, 200]
    empty = fault_latency(trace_of([memory()]))
    assert (empty.count, empty.mean_ns, empty.percentile(99)) == (0, 0.0, 0.0)
    with pytest.raises(RangeError, match="'o2' is no paged memory"):
        fault_latency(trace, 2)


def test_demand_and_what_was_ahead_of_it_over_time() -> None:
    events = [
        (0, 0, 5, 0, DEMAND),
        (0, 10, 0, 1, READAHEAD),
        (0, 19, 0, 63, READAHEAD),
        (0, 40, 5, 2, DEMAND),
    ]
    trace = trace_of([memory(nbytes=64 * PAGE - 96)], [], events)
    found = demand_and_ahead(trace, 4)
    assert found.edges_ns.tolist() == [0, 10, 20, 30, 40]
    assert found.counts[EventKind.DEMAND].tolist() == [1, 0, 0, 1]
    assert found.counts[EventKind.READAHEAD].tolist() == [0, 2, 0, 0]
    assert found.nbytes[EventKind.READAHEAD].tolist() == [0, 2 * PAGE - 96, 0, 0]
    assert sum(found.counts[EventKind.EVICT]) == 0
    assert demand_and_ahead(trace, 1, start_ns=5, stop_ns=15).counts[EventKind.READAHEAD].tolist() == [1]
    with pytest.raises(RangeError, match="at least 1 bin, not 0"):
        demand_and_ahead(trace, 0)


@given(st.lists(st.integers(0, 63), max_size=120), st.integers(0, 3), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_a_plan_has_what_was_loaded_once(blocks: list[int], gap: int, longest: int) -> None:
    found = plan(loads(*blocks), gap=gap * PAGE, longest=longest * PAGE)
    planned = [block for first, count in found for block in range(first, first + count)]
    assert len(planned) == len(set(planned))
    assert all(1 <= count <= longest for _, count in found)
    assert set(blocks) <= set(planned)
    for extra in set(planned) - set(blocks):  # only between two that were loaded, and near to both
        around = [abs(extra - block) for block in blocks]
        assert min(around) <= gap
    if not gap:
        assert set(planned) == set(blocks)
    assert found.nbytes == len(planned) * PAGE


def test_a_plan_follows_the_order_of_need() -> None:
    scan = list(range(1000, 2000))
    trace = loads(*range(500, 500 + 300), *scan, *range(300), 7, nbytes=2000 * PAGE)
    assert list(plan(trace)) == [(500, 300), (1000, 1000), (0, 300)]
    # What is near in time may come in any order; what is not stays in its own.
    assert list(plan(loads(5, 4, 3, 9))) == [(3, 3), (9, 1)]
    assert list(plan(loads(9, 4, 5, 3))) == [(9, 1), (3, 3)]
    assert list(plan(loads(9, 4, 6), gap=PAGE)) == [(9, 1), (4, 3)]
    far = list(range(20, 60, 2)) * 14
    assert plan(loads(1, *far, 0)).extents[0] == (0, 2)  # each counts once: 22 loads are near to each other


def test_a_plan_within_a_limit_has_what_was_needed_first() -> None:
    trace = loads(9, 3, 9, 4, 60, 61)
    assert list(plan(trace, limit=3 * PAGE)) == [(9, 1), (3, 2)]
    assert plan(trace, limit=3 * PAGE).nbytes == 3 * PAGE


def test_every_kind_of_load_is_in_a_plan_and_nothing_else() -> None:
    events = [
        (0, t, 0, block, kind)
        for t, (block, kind) in enumerate([(1, 1), (3, 2), (5, 3), (7, 8), (9, 4), (11, 7)])
    ]
    assert [first for first, _ in plan(trace_of([memory()], [], events))] == [1, 3, 5, 7]


def test_a_plan_for_other_blocks() -> None:
    trace = loads(0, 5, 63, nbytes=64 * PAGE - 7)
    assert list(plan(trace, block=2 * PAGE)) == [(0, 1), (2, 1), (31, 1)]
    assert plan(trace, block=2 * PAGE).nbytes == 6 * PAGE - 7
    assert list(plan(trace, block=PAGE // 2)) == [(0, 2), (10, 2), (126, 2)]
    assert plan(trace, block=PAGE // 2).block == PAGE // 2


def test_the_memory_that_fits_is_found() -> None:
    things = [
        memory(0, 8, name="left", source="left.npy"),
        memory(1, 8, name="right", source="right.npy"),
        memory(2, 9, name="other", source="left.npy"),
        thing(3, name="plain"),
    ]
    trace = trace_of(things, [], [(number, 1, 0, number, 1) for number in range(3)])
    assert plan(trace, "right").name == "right"
    assert plan(trace, nbytes=9 * PAGE).name == "other"
    assert plan(trace, nbytes=8 * PAGE, source="left.npy").name == "left"
    assert list(plan(trace, 2, nbytes=9 * PAGE)) == [(2, 1)]
    with pytest.raises(TraceError, match="several memories of the trace fit: 'left', 'right'; say which"):
        plan(trace, nbytes=8 * PAGE)
    with pytest.raises(TraceError, match=r"no paged memory of 5 bytes, only 'left' \(32768 bytes\)"):
        plan(trace, nbytes=5)
    with pytest.raises(TraceError, match="'plain' is no paged memory"):
        plan(trace, "plain")
    with pytest.raises(TraceError, match="no paged memory to replay"):
        plan(trace_of([thing()]))
    with pytest.raises(RangeError, match="no object 'x'"):
        plan(trace, "x")
    with pytest.raises(RangeError, match="gap=-1"):
        plan(trace, "left", gap=-1)


def test_a_plan_of_many_loads_is_made_at_once() -> None:
    count = 200_000
    order = np.random.default_rng(3).permutation(count).tolist()
    found = plan(loads(*order, nbytes=count * PAGE), gap=16 * PAGE)
    assert found.nbytes == count * PAGE
