"""Reports in a terminal."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from rich.console import Group as Lines
from rich.table import Table as RichTable
from rich.text import Text

from userfault.reports._text import format_duration
from userfault.reports.traces._panels import Bars, Chart, Heatmap, Report, Table
from userfault.reports.traces._terminal_heat import LABEL_WIDTH, heat_text, legend, time_axis
from userfault.reports.traces._words import format_value

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import RenderableType

    from userfault.reports._palette import Look
    from userfault.reports.traces._panels import Panel

__all__ = ["render"]

# Upwards, and to the right.
_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_PARTS: Final = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"]
_BAR_WIDTH: Final = 40
# Charts of few series have room for tall ones: lines by the most series.
_LINES: Final = ((2, 3), (4, 2))


def render(report: Report, *, width: int, height: int, look: Look | None) -> RenderableType:
    """Make something that Rich prints.

    Args:
        report: What is drawn; its heat map has two rows for each line.
        width: Columns of the terminal.
        height: Lines for a heat map.
        look: The colours; None if there are none.
    """
    parts: list[RenderableType] = [Text(report.title, "bold"), Text(report.subtitle, "dim")]
    for panel in report.panels:
        drawn = _panel(panel, width, height, look)
        if drawn is not None:
            parts += [Text(), drawn]
    if report.notes:
        parts.append(Text())
    parts += [Text(note.text, "bold yellow" if note.loud else "dim") for note in report.notes]
    return Lines(*parts)


def _panel(panel: Panel, width: int, height: int, look: Look | None) -> RenderableType | None:
    if isinstance(panel, Heatmap):
        if not panel.strips:
            return None
        return Lines(heat_text(panel, height=height, look=look), legend(panel, look))
    if isinstance(panel, Bars):
        return _bars(panel)
    if isinstance(panel, Table):
        return _table(panel)
    # The percentiles stand in a table above: a terminal needs no curve of them.
    return _chart(panel, width) if panel.over == "time" else None


def _chart(chart: Chart, width: int) -> Text:
    columns = max(10, width - LABEL_WIDTH - 12)
    text = Text(no_wrap=True, overflow="ellipsis").append(chart.title, "bold").append("\n")
    # All series have the same scale, so that they can be compared.
    most = max((float(np.nanmax(one.values, initial=0)) for one in chart.series), default=0.0)
    lines = next((tall for most_series, tall in _LINES if len(chart.series) <= most_series), 1)
    for one in reversed(chart.series):
        label = Text(one.name, no_wrap=True)
        label.truncate(LABEL_WIDTH - 1, overflow="ellipsis")
        label.pad_right(LABEL_WIDTH - label.cell_len)
        values = _fit(np.nan_to_num(one.values), columns)
        heights = (
            np.ceil(values / most * lines * 8 - 1e-9).astype(int) if most > 0 else np.zeros(columns, int)
        )
        for line in reversed(range(lines)):
            cells = "".join(_EIGHTHS[part] for part in np.clip(heights - 8 * line, 0, 8))
            text.append_text(label if line == lines - 1 else Text(" " * LABEL_WIDTH))
            text.append(cells, one.colour.lower())
            if line == lines - 1:
                text.append(f" {format_value(float(np.nanmax(one.values, initial=0)), chart.unit)}", "dim")
            text.append("\n")
    seconds = float(chart.x[-1] + chart.x[0]) if len(chart.x) else 0.0
    return text.append_text(time_axis(seconds, columns))


def _fit(values: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Take the highest of neighbours, or repeat them, so that there are as many values as columns."""
    if not len(values):
        return np.zeros(columns)
    edges = np.arange(columns + 1) * len(values) // columns
    pairs = pairwise(edges)
    return np.array([values[first : max(last, first + 1)].max() for first, last in pairs])


def _bars(bars: Bars) -> Text:
    text = Text(no_wrap=True, overflow="crop").append(bars.title, "bold")
    most = int(bars.counts.max(initial=0))
    for low, high, count in zip(bars.edges_ns[:-1], bars.edges_ns[1:], bars.counts.tolist(), strict=True):
        text.append(f"\n{format_duration(low):>10} – {format_duration(high):<10} ")
        whole, part = divmod(-(-count * _BAR_WIDTH * 8 // most) if most else 0, 8)
        cells = "█" * whole + _PARTS[part]
        text.append(f"{cells:<{_BAR_WIDTH}}", "#d55e00").append(f" {count:,}", "dim")
        for at, name in bars.marks:
            if low <= at < high:
                text.append(f"  ← {name} {format_duration(at)}", "bold")
    return text


def _table(table: Table) -> RenderableType:
    made = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        justify: Literal["left", "right"] = "left" if column.unit == "text" else "right"
        made.add_column(Text(column.name), justify=justify, overflow="fold")
    for row in table.rows:
        values = zip(row, table.columns, strict=True)
        # Names of objects may look like markup.
        made.add_row(*(Text(format_value(value, column.unit)) for value, column in values))
    return Lines(Text(table.title, "bold"), made) if table.title else made
