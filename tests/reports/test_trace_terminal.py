"""Reports on traces in a terminal: what people read, in colour and without."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from support.traces import PAGE, TraceMaker, matmul, nothing, paged, stencil, temporaries, walk
from userfault.reports.traces import canvas_of_console, heatmap, show, table, timeline, wss
from userfault.reports.traces._panels import Report
from userfault.reports.traces._terminal_heat import LABEL_WIDTH

WIDTH = 100


def console(colours: str | None = None, **facts: object) -> Console:
    return Console(
        file=io.StringIO(), width=WIDTH, height=40, force_terminal=colours is not None,
        color_system=colours, _environ={"TERM": "xterm-256color"}, **facts,  # type: ignore[arg-type]
    )  # fmt: skip


def shown(report: Report, where: Console) -> str:
    show(report, where)
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


def plain_heatmap(trace: object) -> list[str]:
    where = console()
    return shown(heatmap(trace, canvas_of_console(where)), where).splitlines()  # type: ignore[arg-type]


def test_without_colours_a_heat_map_is_made_of_digits() -> None:
    lines = plain_heatmap(matmul(32))
    assert lines[0].startswith("B: 100 % read each 25 ms; A: 100 % read, about 3 % at a time;")
    assert lines[1] == "python made-up.py: 800 ms, 3 objects of 6 MiB"
    assert max(map(len, lines)) <= WIDTH
    assert not any(ord(letter) > 127 for line in lines[3:] for letter in line[LABEL_WIDTH:])
    first = next(line for line in lines if line.startswith("A 2 MiB"))[LABEL_WIDTH:]
    # A sweep: the first line is hot at the beginning only.
    assert first[0] in "6789"
    assert first.rstrip(".")[:2].isdigit()
    assert first.endswith("." * 40)
    every = next(line for line in lines if line.startswith("B 2 MiB"))[LABEL_WIDTH:]
    assert every == "9" * (WIDTH - LABEL_WIDTH)
    axis = next(line for line in lines if line.strip().startswith("0 "))
    assert axis.split() == ["0", "200", "ms", "400", "ms", "600", "ms", "800", "ms"]
    assert len(axis) == WIDTH
    assert any("1-9: heat" in line for line in lines)


def test_events_are_letters_there() -> None:
    lines = plain_heatmap(paged())
    cells = "".join(line[LABEL_WIDTH:] for line in lines if line[LABEL_WIDTH:].strip())
    assert set("Dreyw-.") <= set(cells)
    assert any("D: on demand; y: replay; r: readahead" in line for line in lines)


def test_what_was_not_there_is_blank() -> None:
    lines = plain_heatmap(temporaries(3))
    late = next(line for line in lines if line.startswith("temporary ×3"))[LABEL_WIDTH:]
    assert "9" in late
    lines = plain_heatmap(_late())
    late = next(line for line in lines if line.startswith("late 32 KiB"))[LABEL_WIDTH:]
    half = (WIDTH - LABEL_WIDTH) // 2
    assert late[: half - 1].strip() == ""
    assert set(late[half + 1 :]) == {"9"}


def _late() -> object:
    make = TraceMaker()
    make.sample(make.add("late", 8 * PAGE, born_ns=50_000_000), 50, 100, (0, 8, 1))
    make.add("early", 8 * PAGE)
    return make.build(100)


def test_names_that_look_like_markup_are_names() -> None:
    text = shown(table(temporaries(3)), console())
    assert "total [bold]" in text
    assert "total [bold]" in "\n".join(plain_heatmap(temporaries(3)))


def test_half_blocks_in_true_colour() -> None:
    where = console("truecolor")
    text = shown(heatmap(stencil(), canvas_of_console(where)), where)
    assert "▀" in text
    assert "\x1b[38;2;" in text
    assert "written" in text


@pytest.mark.parametrize(("system", "code"), [("256", "\x1b[38;5;"), ("standard", "\x1b[96;106m")])
def test_fewer_colours(system: str, code: str) -> None:
    where = console(system)
    # All of B is read all the time: the brightest of its ramp.
    assert code in shown(heatmap(matmul(), canvas_of_console(where)), where)


def test_no_color_is_respected() -> None:
    where = console("truecolor", no_color=True)
    text = shown(heatmap(matmul(), canvas_of_console(where)), where)
    assert "\x1b[38" not in text
    assert "▀" not in text
    assert "99999" in text


def test_a_time_line_has_a_row_for_each_kind() -> None:
    text = shown(timeline(paged()), console())
    lines = text.splitlines()
    assert "weights: loads (103 on demand, 217 readahead, 32 replay)" in text
    replayed = next(line for line in lines if line.startswith("32 replay"))
    # At the end only, and the highest of all.
    assert replayed[LABEL_WIDTH : LABEL_WIDTH + 40].strip() == ""
    assert "█" in replayed
    assert any("← p99" in line for line in lines)
    assert max(map(len, lines)) <= WIDTH


def test_a_working_set_in_text() -> None:
    text = shown(wss(walk(), windows=[0.05, 0.5]), console())
    lines = text.splitlines()
    assert lines[0].startswith("Working set within 500 ms: 1.66 MiB half of the time")
    assert next(line for line in lines if line.startswith("window")).split() == [
        "window", "p0", "p25", "p50", "p75", "p90", "p100",
    ]  # fmt: skip
    # The percentiles are not drawn a second time.
    assert "by percentile" not in text


def test_200_objects_fit() -> None:
    make = TraceMaker()
    for number in range(200):
        made = make.add(f"array_with_a_rather_long_name_{number}", (number + 1) * 64 * PAGE)
        make.sample(made, 0, 10, (0, 1 + number, number % 2))
    lines = plain_heatmap(make.build(10))
    assert len(lines) < 60
    assert any("156 objects more, in which less happened" in line for line in lines)
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("make", [heatmap, timeline, wss, table])
def test_an_empty_trace(make: object) -> None:
    assert callable(make)
    text = shown(make(nothing()), console("truecolor"))
    assert "nothing was watched" in text
