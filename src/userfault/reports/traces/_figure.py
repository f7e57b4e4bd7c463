"""Reports as Matplotlib figures, for PNG, SVG and PDF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from userfault._trace import EventKind
from userfault.errors import MissingExtraError
from userfault.reports._palette import KINDS, Look, level
from userfault.reports._text import format_duration
from userfault.reports.traces._cells import colours, hues_of, kinds_of
from userfault.reports.traces._panels import Bars, Chart, Heatmap, Report, Table
from userfault.reports.traces._words import format_value, ticks, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from userfault.reports.traces._panels import Panel, Unit

__all__ = ["PIXELS_PER_INCH", "figure"]

PIXELS_PER_INCH: Final = 150
_INK, _FAINT, _LOUD = "#333333", "#767676", "#B34000"
_LOOK: Final = Look("light")
# In inches.
_CHART_HEIGHT, _BARS_HEIGHT, _ROW_HEIGHT, _LEGEND_HEIGHT = 2.1, 1.9, 0.26, 0.5
_ROWS_PER_INCH: Final = 120
_LABEL_LETTERS: Final = 26
_MOST_MARKS: Final = 40
# Of a table.
_LETTERS_PER_INCH: Final = 12.5
_BYTES: Final = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))
_TIMES: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))


def figure(report: Report, *, width: int) -> Figure:
    """Draw a report, `width` pixels wide and as high as it gets.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.for_module("matplotlib", "cli", "drawing a picture") from error
    inches = width / PIXELS_PER_INCH
    heights = [_height(panel) for panel in report.panels] or [0.5]
    letters = round(inches * 10.2)
    title = wrap(report.title, round(letters * 0.92))
    notes = [(line, note.loud) for note in report.notes for line in wrap(note.text, round(letters * 1.3))]
    head, foot = 0.26 * len(title) + 0.34, 0.19 * len(notes) + 0.12
    total = head + sum(heights) + foot
    # Not pyplot: it keeps figures alive, and looks for a display.
    drawing = Figure(figsize=(inches, total), facecolor="white")
    FigureCanvasAgg(drawing)
    # Names of objects may hold dollar signs, which would begin a formula.
    plain: dict[str, Any] = {"parse_math": False, "ha": "left", "va": "top"}
    for line, text in enumerate(title):
        at = 1 - (0.09 + 0.26 * line) / total
        drawing.text(0.012, at, text, fontsize=12.5, fontweight="bold", color=_INK, **plain)
    drawing.text(0.012, 1 - (head - 0.24) / total, report.subtitle, fontsize=9, color=_FAINT, **plain)
    top = head
    for panel, inches_high in zip(report.panels, heights, strict=False):
        _panel(drawing, panel, 1 - (top + inches_high) / total, inches_high / total, inches, total)
        top += inches_high
    for line, (text, loud) in enumerate(notes):
        style: dict[str, Any] = {"color": _LOUD, "fontweight": "bold"} if loud else {"color": _FAINT}
        drawing.text(0.012, (foot - 0.05 - 0.19 * line) / total, text, fontsize=8.5, **style, **plain)
    return drawing


def _height(panel: Panel) -> float:
    if isinstance(panel, Heatmap):
        rows = sum(strip.drawn for strip in panel.strips) + _gap(panel) * (len(panel.strips) - 1)
        return rows / _ROWS_PER_INCH + _LEGEND_HEIGHT if panel.strips else 0.1
    if isinstance(panel, Table):
        return _ROW_HEIGHT * (len(panel.rows) + 2)
    return _BARS_HEIGHT if isinstance(panel, Bars) else _CHART_HEIGHT


def _panel(drawing: Figure, panel: Panel, bottom: float, height: float, inches: float, total: float) -> None:
    left, right = 2.25 / inches, 1 - 0.3 / inches
    if isinstance(panel, Heatmap):
        if panel.strips:
            axes = drawing.add_axes(
                (left, bottom + _LEGEND_HEIGHT / total, right - left, height - _LEGEND_HEIGHT / total)
            )
            _heat(axes, panel)
        return
    if isinstance(panel, Table):
        axes = drawing.add_axes((0.012, bottom, 0.976, height))
        _table(axes, panel)
        return
    room = 0.42 / total
    # Legends stand beside charts, never on them.
    wide = right - (0.75 + (1.35 if isinstance(panel, Chart) else 0.0)) / inches
    axes = drawing.add_axes((0.75 / inches, bottom + room, wide, height - room - 0.3 / total))
    _plain(axes)
    if isinstance(panel, Bars):
        _bars(axes, panel)
    else:
        _chart(axes, panel)


def _gap(heat: Heatmap) -> int:
    return 6 if len(heat.strips) > 1 else 0


def _heat(axes: Axes, heat: Heatmap) -> None:
    gap = _gap(heat)
    seconds = heat.seconds or 1e-9
    top = 0
    for strip in heat.strips:
        cells = colours(strip, heat.seconds, _LOOK)
        extent = (0.0, seconds, top + strip.drawn, top)
        axes.imshow(cells, extent=extent, aspect="auto", interpolation="nearest")
        size, _, about = strip.about.partition(", ")
        name = strip.name if len(strip.name) <= _LABEL_LETTERS else f"{strip.name[: _LABEL_LETTERS - 1]}…"
        lines = [size, *wrap(strip.finding, 35), *wrap(about, 35)]
        # A line of text is 17 rows high.
        lines = lines[: max(0, (strip.drawn - 16) // 17)]
        label: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "left", "va": "top",
            "annotation_clip": False, "parse_math": False,
        }  # fmt: skip
        axes.annotate(name, (0, top), xytext=(-152, 1), fontsize=9.5, fontweight="bold", color=_INK, **label)
        axes.annotate("\n".join(lines), (0, top), xytext=(-152, -11.5), fontsize=8, color=_FAINT, **label)
        top += strip.drawn + gap
    axes.set_xlim(0, seconds)
    axes.set_ylim(top - gap, 0)
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    _times(axes, seconds)
    _legend(axes, heat)


def _legend(axes: Axes, heat: Heatmap) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for hue in hues_of(heat):
        if hue == "resident":
            handles.append(Patch(color=_LOOK.hue(hue, 1.0), label="resident"))
            continue
        for share, label in ((0.01, "1 %"), (0.1, "10 %"), (1.0, f"100 % of a cell {hue}")):
            place = float(level(np.array(share)))
            handles.append(Patch(color=_LOOK.hue(hue, place), label=label))
    handles += [Patch(color=_LOOK.kind(kind), label=KINDS[kind][0]) for kind in kinds_of(heat)]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(-0.003, -0.26 / _inches(axes)), frameon=False, fontsize=8,
        ncols=max(len(handles), 1), handlelength=1.0, handletextpad=0.4, columnspacing=1.0, borderaxespad=0,
    )  # fmt: skip


def _inches(axes: Axes) -> float:
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    return float(axes.get_position().height * drawing.get_size_inches()[1])


def _times(axes: Axes, seconds: float) -> None:
    places = ticks(seconds, 8)
    axes.set_xticks(places, [format_duration(place * 1e9) if place else "0" for place in places])
    axes.tick_params(colors=_INK, labelsize=8.5)


def _scale(most: float, unit: Unit) -> tuple[float, str]:
    """Return the unit in which values up to `most` are easy to read, and its name."""
    if unit in ("bytes", "ns"):
        known = _BYTES if unit == "bytes" else _TIMES
        return next(((float(scale), name) for scale, name in known if most >= scale), (1.0, known[-1][1]))
    return (0.01, "%") if unit == "share" else (1.0, unit)


def _chart(axes: Axes, chart: Chart) -> None:
    scale, unit = _scale(chart.most, chart.unit)
    bottom = np.zeros(len(chart.x))
    # Over time, values are those of intervals.
    stepped = chart.over == "time" and len(chart.x) > 1 and chart.unit != "ns"
    for one in chart.series:
        name = _unmathed(one.name)
        if chart.stacked:
            top = bottom + np.nan_to_num(one.values)
            step: Any = "mid" if stepped else None
            axes.fill_between(
                chart.x, bottom / scale, top / scale, step=step, color=one.colour, lw=0, label=name
            )
            bottom = top
        else:
            line: Any = {"drawstyle": "steps-mid"} if stepped else {"marker": "o", "markersize": 2.5}
            if chart.over == "percent":
                line = {}
            axes.plot(chart.x, one.values / scale, color=one.colour, linewidth=1.6, label=name,
                      linestyle="--" if one.dashed else "-", **line)  # fmt: skip
    for at, word in chart.marks[:_MOST_MARKS]:
        axes.axvline(at, color=_INK, linewidth=0.7, alpha=0.45)
        if len(chart.marks) <= 6:
            axes.annotate(word, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), rotation=90, va="top",
                          textcoords="offset points", fontsize=7.5, color=_INK, parse_math=False)  # fmt: skip
    axes.set_ylim(0, chart.most / scale * 1.08 or 1)
    axes.set_ylabel(unit, color=_INK, fontsize=9)
    if chart.over == "time":
        seconds = float(chart.x[-1] + chart.x[0]) if len(chart.x) else 1.0
        axes.set_xlim(0, seconds or 1.0)
        _times(axes, seconds)
    else:
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent of the time", color=_INK, fontsize=9)
    _title(axes, chart.title)
    if chart.series:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8,
                    frameon=False, handlelength=1.2)  # fmt: skip


def _unmathed(text: str) -> str:
    # Labels that begin with "_" are left out of legends.
    return text.replace("$", r"\$") if not text.startswith("_") else f" {text}".replace("$", r"\$")


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=_INK, fontweight="bold", parse_math=False, pad=5)


def _bars(axes: Axes, bars: Bars) -> None:
    edges = np.maximum(bars.edges_ns, 1.0)
    colour = KINDS[EventKind.DEMAND][1]
    axes.bar(
        edges[:-1], bars.counts, np.diff(edges), align="edge", color=colour, edgecolor="white", linewidth=0.5
    )
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    places = edges[:: max(1, len(edges) // 8)]
    axes.set_xticks(places, [format_duration(place) for place in places])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, max(int(bars.counts.max(initial=0)), 1) * 1.3)
    for number, (at, name) in enumerate(bars.marks):
        # To the left of its line where there is no room on the right.
        left = np.log(at / edges[0]) > 0.85 * np.log(edges[-1] / edges[0])
        axes.axvline(at, color=_INK, linewidth=1.0, linestyle="--")
        axes.annotate(f"{name} {format_duration(at)}", (at, 1), xycoords=("data", "axes fraction"), fontsize=8,
                      color=_INK, xytext=(-3 if left else 3, -1 - 11 * number), textcoords="offset points", va="top",
                      ha="right" if left else "left")  # fmt: skip
    axes.set_ylabel("faults", color=_INK, fontsize=9)
    _title(axes, bars.title)


def _table(axes: Axes, table: Table) -> None:
    axes.set_axis_off()
    cells = [
        [format_value(value, column.unit) for value, column in zip(row, table.columns, strict=True)]
        for row in table.rows
    ]
    letters = [
        max([len(column.name), *(min(len(row[at]), 40) for row in cells)]) + 3
        for at, column in enumerate(table.columns)
    ]
    # As wide as its text, and no wider: what belongs together stands together.
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    whole = max(sum(letters), float(drawing.get_size_inches()[0]) * _LETTERS_PER_INCH)
    ends = np.cumsum(letters) / whole
    starts = ends - np.array(letters) / whole
    lines = len(cells) + 2
    if table.title:
        axes.text(
            0,
            1 - 0.5 / lines,
            table.title,
            fontsize=9.5,
            fontweight="bold",
            color=_INK,
            va="center",
            parse_math=False,
        )
    for line, row in enumerate([[column.name for column in table.columns], *cells], 1):
        at = 1 - (line + 0.5) / lines
        for number, text in enumerate(row):
            left = table.columns[number].unit == "text"
            where = starts[number] if left else ends[number] - 1.2 / whole
            shown = text if len(text) <= 40 else f"{text[:39]}…"
            axes.text(
                where, at, shown, ha="left" if left else "right", va="center", fontsize=8.5, color=_INK,
                fontweight="bold" if line == 1 else "normal", parse_math=False,
            )  # fmt: skip
    axes.plot([0, ends[-1]], [1 - 2 / lines] * 2, color=_FAINT, linewidth=0.7)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8.5)
