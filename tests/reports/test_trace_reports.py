"""Time lines, working sets and tables of traces whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.traces import PAGE, TraceMaker, matmul, nothing, paged, stencil, temporaries, walk
from userfault._trace import Cost, EventKind, Latency, fault_latency
from userfault.reports.traces import heatmap, table, timeline, wss
from userfault.reports.traces._panels import Bars, Chart, Panel, Report, Table
from userfault.reports.traces._timeline import bucket_start, latency_bars
from userfault.stats import Histogram


def charts(report: Report) -> dict[str, Chart]:
    return {panel.title: panel for panel in report.panels if isinstance(panel, Chart)}


def tables(report: Report) -> dict[str, Table]:
    return {panel.title: panel for panel in report.panels if isinstance(panel, Table)}


def row(found: Table, name: str) -> dict[str, object]:
    headings = [column.name for column in found.columns]
    return next(dict(zip(headings, values, strict=True)) for values in found.rows if values[0] == name)


def test_a_time_line_has_the_bytes_between_two_looks() -> None:
    found = charts(timeline(matmul(32), bins=32))
    chart = found["C, 2 MiB: 100 % written, about 3 % at a time"]
    assert [one.name for one in chart.series] == ["written"]
    assert chart.series[0].values == pytest.approx(np.full(32, 16 * PAGE))
    both = charts(timeline(stencil(20), bins=20))["a, 4 MiB: 100 % read and written each 100 ms"]
    written, read = both.series
    assert (written.name, read.name) == ("written", "read")
    assert written.values[::2] == pytest.approx(np.zeros(10))
    assert written.values[1] + read.values[1] == 1024 * PAGE
    assert both.most == 1024 * PAGE


def test_births_and_deaths_are_marked() -> None:
    chart = charts(timeline(temporaries(3), bins=60))["temporary ×3, 1 MiB: 100 % written each 18 ms"]
    assert chart.marks == ((0.018, "freed"), (0.02, "made"), (0.038, "freed"), (0.04, "made"))


def test_events_by_kind() -> None:
    trace = paged()
    report = timeline(trace, bins=22)
    loads, others, resident, waits = (panel for panel in report.panels if isinstance(panel, Chart))
    counts = {kind: int((trace.events["kind"] == kind).sum()) for kind in EventKind}
    assert loads.title == (
        f"weights: loads ({counts[EventKind.DEMAND]} on demand, {counts[EventKind.READAHEAD]} readahead,"
        f" {counts[EventKind.REPLAY]} replay)"
    )
    assert loads.series[0].values.sum() == counts[EventKind.DEMAND] * 65536
    assert [one.name for one in others.series] == ["288 evicted", "32 first write", "32 written back"]
    assert resident.title == "weights: resident, 4 MiB of 16 MiB at most"
    assert resident.series[0].values[-1] == 64 * 65536
    assert waits.unit == "ns"
    # Nothing was waited for at the end: there are no percentiles, and no zeros either.
    assert np.isnan(waits.series[0].values[-1])
    assert np.nanmax(waits.series[2].values) <= trace.events["took_ns"].max()


def test_a_histogram_of_latencies_holds_each_fault() -> None:
    latency = fault_latency(paged())
    bars = latency_bars(latency)
    assert bars is not None
    assert bars.counts.sum() == latency.count == 103
    assert bars.edges_ns[0] <= latency.took_ns[0]
    assert bars.edges_ns[-1] >= latency.took_ns[-1]
    assert [name for _, name in bars.marks] == ["p50", "p90", "p99"]


def test_without_recorded_times_the_memory_s_own_counts_do() -> None:
    buckets = [0] * 160
    buckets[76], buckets[80] = 30, 10
    stages = {"fault": Histogram(40, 10**8, tuple(buckets))}
    bars = latency_bars(Latency(np.zeros(5, np.int64), stages))
    assert bars is not None
    assert bars.counts.tolist() == [30, 0, 0, 0, 10]
    assert bars.edges_ns.tolist() == [bucket_start(bucket) for bucket in range(76, 82)]
    assert bucket_start(3) == 3
    assert [bucket_start(bucket) for bucket in (4, 5, 8, 9)] == [4, 5, 8, 10]
    assert latency_bars(Latency(np.zeros(0, np.int64), {})) is None


def test_the_working_set_by_percentiles_and_objects() -> None:
    report = wss(matmul(32), windows=[0.025, 0.8], bins=32)
    found = next(iter(tables(report).values()))
    assert [column.name for column in found.columns] == ["window", "p0", "p25", "p50", "p75", "p90", "p100"]
    # B and 16 pages of each of the others; within the whole time, all three grow to the end.
    assert found.rows[0] == (0.025, *[(512 + 32) * PAGE] * 6)
    assert found.rows[1][-1] == 3 * 512 * PAGE
    assert report.title.startswith("Working set within 800 ms: ")
    layers = charts(report)["Working set within 800 ms, by object"].series
    assert next(layer.name for layer in layers) == "B"
    assert sum(layer.values for layer in layers)[-1] == pytest.approx(3 * 512 * PAGE)


def test_no_window_is_longer_than_the_run() -> None:
    make = TraceMaker()
    thing = make.add("x", 8 * PAGE)
    for start in range(0, 3810, 381):
        make.sample(thing, start, start + 381, (0, 1, 0))
    found = next(iter(tables(wss(make.build(3810))).values()))
    assert [row[0] for row in found.rows] == [0.4, pytest.approx(3.81)]  # ten looks would be rounded to 4 s


def test_writes_alone_are_not_called_a_working_set() -> None:
    report = wss(temporaries(3))
    assert report.title.startswith("Written within ")
    assert "Working set" not in str(report.as_dict())
    assert "Parts that were never written, largest first" in tables(table(temporaries(3)))


def test_objects_of_one_name_count_each() -> None:
    make = TraceMaker()
    for _ in range(2):
        make.sample(make.add("x", 8 * PAGE), 0, 10, (0, 8, 0))
    report = wss(make.build(10), windows=[0.01])
    assert next(iter(tables(report).values())).rows == ((0.01, *[16 * PAGE] * 6),)


def test_the_rest_of_many_objects_is_one_layer() -> None:
    make = TraceMaker()
    for number in range(20):
        make.sample(make.add(f"x{number:02}", 8 * PAGE), 0, 10, (0, 8, 0))
    layers = next(
        chart for title, chart in charts(wss(make.build(10))).items() if title.endswith("by object")
    )
    assert [layer.name for layer in layers.series][-1] == "13 others"
    assert sum(layer.values for layer in layers.series)[50] == 160 * PAGE


def test_of_paged_memories_what_was_resident_stands_for_it() -> None:
    report = wss(paged())
    assert report.title == "weights: resident, 4 MiB of 16 MiB at most"
    assert any("only loads are known" in note.text for note in report.notes)


def test_a_table_of_what_was_touched() -> None:
    found = tables(table(stencil()))
    coefficients = row(found[""], "coefficients")
    assert coefficients["size"] == 200 * PAGE
    assert coefficients["touched"] == 6 * PAGE
    assert coefficients["written"] == 0
    assert coefficients["heat"] == pytest.approx(0.03)
    assert coefficients["at a time p50"] == 6 * PAGE
    hot = found["Hottest parts"].rows
    # Page 50 is element 25,600 of float64.
    assert ("coefficients", "[25600:28672]", 6 * PAGE, pytest.approx(1.0)) in hot
    assert hot[0][:2] == ("a", "all of it")
    cold = found["Parts that were never touched, largest first"].rows
    assert cold[0] == ("coefficients", "[28672:102400]", 144 * PAGE)


def test_a_random_walk_has_no_hot_part_but_hotter_ones() -> None:
    hot = tables(table(walk()))["Hottest parts"].rows
    assert hot[0][0] == "visits"
    assert 0.1 < hot[0][3] < 0.5


def test_a_table_of_faults() -> None:
    found = row(tables(table(paged()))[""], "weights")
    assert found["faults"] == 103
    assert found["ahead"] == 217 + 32
    assert found["evicted"] == 288
    assert found["loaded"] == 352 * 65536
    assert isinstance(found["fault p50"], float)
    assert "touched" not in found


def test_rows_of_a_matrix_are_slices_of_it() -> None:
    make = TraceMaker()
    grid = make.add("grid", 64 * PAGE, dtype="float64", shape=(64, 512))
    plain = make.add("plain", 64 * PAGE)
    for one in (grid, plain):
        make.sample(one, 0, 10, (16, 16, 1))
    hot = tables(table(make.build(10)))["Hottest parts"].rows
    assert {values[1] for values in hot} == {"[16:32, ...]", "bytes 65,536 to 131,072 (64 KiB in)"}


@pytest.mark.parametrize("make", [heatmap, timeline, wss, table])
def test_what_limits_a_report_is_loud(make: object) -> None:
    assert callable(make)
    trace = replace(paged(), lost=1234, complete=False)
    loud = [note.text for note in make(trace).notes if note.loud]
    assert loud[0].startswith("INCOMPLETE")
    assert loud[1].startswith("1,234 events LOST")


@pytest.mark.parametrize("make", [heatmap, timeline, wss, table])
def test_the_cost_of_recording_is_always_said(make: object) -> None:
    assert callable(make)
    trace = replace(stencil(), cost=Cost(cpu_ns=30_000_000, wall_ns=2_000_000_000, samples=60, traps=4096))
    assert "Recording took 2 % of one CPU in 60 samples, and 4,096 more page faults in the program" in [
        note.text for note in make(trace).notes
    ]


def test_what_the_recorder_noted_is_said_once() -> None:
    shared = "shared memory: other processes are not seen"
    about = {
        "every": 0.05,
        "every_used": 0.2,
        "notes": [f"a: {shared}", f"b: {shared}", "3 arrays were too short-lived"],
    }
    said = [note.text for note in table(replace(stencil(), about=about)).notes]
    assert f"a, b: {shared}" in said
    assert "3 arrays were too short-lived" in said
    assert "Looks are 200 ms apart instead of 50 ms, to stay within the budget of the recording" in said
    late = [note.text for note in table(replace(stencil(), about={**about, "held_back": False})).notes]
    assert not any("budget" in text for text in late)
    assert any(text.startswith("Looks are 200 ms apart instead of 50 ms, as the recorder") for text in late)
    assert "Reads and writes recorded by drop, in units of 4 KiB" in said
    assert "Loads and evictions recorded, in units of 64 KiB" in [note.text for note in table(paged()).notes]


@pytest.mark.parametrize("make", [heatmap, timeline, wss, table])
def test_nothing_was_recorded(make: object) -> None:
    assert callable(make)
    report = make(nothing())
    assert not any(isinstance(panel, Bars) for panel in report.panels)
    assert report.as_dict()["panels"] == [panel.as_dict() for panel in report.panels]


def test_a_long_trace_is_binned() -> None:
    make = TraceMaker()
    grid = make.add("grid", 1024 * PAGE, "writes")
    for number in range(5000):
        make.sample(grid, number, number + 1, (number % 1024, 1, 1))
    trace = make.build(5000)
    panels: list[Panel] = [*timeline(trace).panels, *wss(trace).panels]
    assert max(len(panel.x) for panel in panels if isinstance(panel, Chart)) == 200
