"""The numbers of a heat map, and the colours of its cells."""

from __future__ import annotations

import numpy as np
import pytest

from support.traces import MS, PAGE, TraceMaker, matmul, nothing, paged, stencil, temporaries
from userfault._trace import EventKind
from userfault.reports._palette import KINDS, Look, blend, level
from userfault.reports.traces import Canvas, heatmap
from userfault.reports.traces._cells import alive, colours
from userfault.reports.traces._heat import BOTH, NOTHING, READ, RESIDENT, TOUCHED, WRITTEN
from userfault.reports.traces._panels import Heatmap, HeatStrip, Report


def strips(report: Report) -> dict[str, HeatStrip]:
    (panel,) = report.panels
    assert isinstance(panel, Heatmap)
    return {strip.name: strip for strip in panel.strips}


def test_reads_and_writes_are_apart() -> None:
    found = strips(heatmap(stencil(20), Canvas(20, 32, least=2)))
    a, coefficients = found["a"], found["coefficients"]
    middle = a.hue[a.hue.shape[0] // 2]
    assert middle.tolist() == [READ, WRITTEN] * 10
    assert np.all(a.heat == 1)
    # 6 of 200 pages, from page 50 on, of as many rows as it has.
    assert coefficients.heat.sum(axis=0) * 200 / len(coefficients.heat) == pytest.approx(np.full(20, 6))
    assert coefficients.heat[len(coefficients.heat) // 4].all()
    assert not coefficients.hue[len(coefficients.heat) // 2 :].any()


def test_a_cell_that_holds_both_says_so() -> None:
    a = strips(heatmap(stencil(20), Canvas(10, 32)))["a"]
    assert np.unique(a.hue).tolist() == [BOTH]


@pytest.mark.parametrize(
    ("kind", "hue", "heat"), [("written", WRITTEN, 0.5), ("accessed", TOUCHED, 1.0), ("read_only", READ, 0.5)]
)
def test_the_kind_chooses_what_counts(kind: str, hue: int, heat: float) -> None:
    a = strips(heatmap(stencil(20), Canvas(10, 32), kind=kind))["a"]  # type: ignore[arg-type]
    inner = a.heat[len(a.heat) // 2]
    assert inner == pytest.approx(np.full(10, heat))
    assert set(np.unique(a.hue).tolist()) <= {hue, NOTHING}


def test_objects_of_which_the_kind_is_not_known_are_left_out_and_named() -> None:
    report = heatmap(temporaries(3), kind="read_only")
    assert strips(report) == {}
    assert "not known of them what was only read: total [bold], temporary ×3" in report.notes[-1].text


def test_a_sweep_is_a_diagonal() -> None:
    found = strips(heatmap(matmul(32), Canvas(32, 96, least=2)))["A"]
    rows = found.heat.argmax(axis=0)
    assert np.all(np.diff(rows) >= 0)
    assert rows[0] == 0
    assert rows[-1] == len(found.heat) - 1


def test_a_strip_is_as_long_as_its_object_lived() -> None:
    make = TraceMaker()
    late = make.add("late", 8 * PAGE, born_ns=50 * MS, died_ns=75 * MS)
    make.sample(late, 50, 75, (0, 8, 0))
    strip = strips(heatmap(make.build(100), Canvas(20, 8)))["late"]
    there = [False] * 10 + [True] * 5 + [False] * 5
    assert alive(strip, 0.1).tolist() == there
    cells = colours(strip, 0.1, Look("light"))
    assert (cells[0, :, 3] > 0).tolist() == there
    assert strip.hue.any(axis=0).tolist() == there


def test_many_temporaries_cost_only_their_own_columns() -> None:
    found = strips(heatmap(temporaries(30), Canvas(600, 40)))["temporary ×30"]
    # 18 of 20 columns each.
    assert found.heat[0].sum() == pytest.approx(30 * 18, abs=2)


def test_small_objects_stay_visible_and_large_ones_are_larger() -> None:
    assert Canvas(10, 100, least=4).share([1 << 40, 1 << 20, 0]) == [91, 4, 4]
    assert Canvas(10, 24, least=2, multiple=2).share([3, 1]) == [16, 6]
    assert Canvas(10, 24, least=2).share([]) == []
    many = Canvas(10, 24, least=2, grow_to=80)
    assert many.most == 40
    assert sum(many.share([1] * 40)) == 80


def test_paged_memories_show_why_blocks_came() -> None:
    found = strips(heatmap(paged(), Canvas(220, 256)))["weights"]
    assert found.kinds is not None
    assert found.heat.shape == (256, 220)
    # The scan demands each eighth block, 4 ms a block from 800 ms on; a column is 10 ms.
    assert found.kinds[200, 160] == EventKind.DEMAND
    assert found.kinds[201, 160] == EventKind.READAHEAD
    assert (found.kinds == EventKind.REPLAY).sum() == 32
    assert found.hue[50, 200] == RESIDENT
    cells = colours(found, 2.2, Look("dark"))
    assert cells[200, 160, :3].tolist() == blend(KINDS[EventKind.DEMAND][1]).tolist()


def test_events_spread_where_cells_are_tiny() -> None:
    make = TraceMaker()
    memory = make.add("memory", 64 * PAGE, "faults")
    make.event(memory, 50, 32, EventKind.DEMAND)
    trace = make.build(100)
    plain = strips(heatmap(trace, Canvas(100, 64)))["memory"].kinds
    wide = strips(heatmap(trace, Canvas(100, 64, spread=1)))["memory"].kinds
    assert plain is not None
    assert wide is not None
    assert np.argwhere(plain).tolist() == [[32, 50]]
    assert np.argwhere(wide).tolist() == [[row, column] for row in (31, 32, 33) for column in (49, 50, 51)]


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 3 * PAGE])
def test_few_pages_and_one_sample(nbytes: int) -> None:
    make = TraceMaker()
    one = make.add("one", nbytes)
    if nbytes:
        make.sample(one, 0, 5, (0, 1, 1))
    strip = strips(heatmap(make.build(5), Canvas(7, 16)))["one"]
    assert strip.heat.shape == (max(1, -(-nbytes // PAGE)), 7)
    assert strip.hue[0].tolist() == [WRITTEN if nbytes else NOTHING] * 7
    assert colours(strip, 0.005, Look("dark")).shape == (16 if nbytes else 2, 7, 4)


def test_an_empty_trace() -> None:
    report = heatmap(nothing())
    assert report.title == "Nothing was recorded"
    assert strips(report) == {}
    assert [note.text for note in report.notes if note.loud] == [
        "The trace has no objects: nothing was watched"
    ]


@pytest.mark.parametrize("ground", ["light", "dark"])
@pytest.mark.parametrize("hue", ["read", "written", "both", "touched"])
def test_more_heat_contrasts_more_with_the_ground(ground: str, hue: str) -> None:
    look = Look(ground)  # type: ignore[arg-type]
    lightness = look.ramp(hue) @ np.array([0.2126, 0.7152, 0.0722])  # type: ignore[arg-type]
    steps = np.diff(lightness)
    assert np.all(steps <= 0) if ground == "light" else np.all(steps >= 0)


def test_little_heat_is_seen() -> None:
    assert level(np.array([0, 0.001, 0.1, 1, 2])) == pytest.approx([0, 0.063, 0.398, 1, 1], abs=0.001)
