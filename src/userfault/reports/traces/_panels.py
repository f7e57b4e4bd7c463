"""What a report is made of: a title that says what was found, notes, and panels with numbers.

A panel knows what it shows, not how: the terminal, Matplotlib, the HTML page and JSON each draw the same panels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Bars",
    "Chart",
    "Column",
    "HeatStrip",
    "Heatmap",
    "Note",
    "Panel",
    "Report",
    "Series",
    "Table",
    "Unit",
    "middles",
]

Unit = Literal["text", "bytes", "count", "share", "ns", "seconds"]


def middles(seconds: float, bins: int) -> NDArray[np.float64]:
    """Return the middles of equal parts of a time, in seconds."""
    return np.asarray((np.arange(bins) + 0.5) * seconds / bins, np.float64)


@dataclass(frozen=True)
class HeatStrip:
    """One object in a heat map, or several of one name and size, one after another.

    Attributes:
        name: What is written on the axis.
        about: What else is known of it: type, shape, where it was made.
        finding: What it did, in a few words.
        nbytes: Its size in bytes.
        span: Bytes that all rows of cells cover: whole pages, so more than its size.
        lead: Bytes of the first page that lie before it.
        itemsize: Bytes of a row of the array, 0 if it is none.
        lives: When it was there, as pairs of seconds.
        drawn: How many rows of the picture it takes.
        heat: Of each cell (`rows, columns`; row 0 is the object's beginning), the share of its bytes that was touched,
            as a mean over the cell's time. Of a paged memory, the share that was resident.
        hue: Of each cell: 0 nothing, 1 read, 2 written, 3 both, 4 touched, no matter how, 5 resident.
        kinds: Of each cell of a paged memory, the event that matters most (`EventKind`), 0 if there was none.
    """

    name: str
    about: str
    finding: str
    nbytes: int
    span: int
    lead: int
    itemsize: int
    lives: tuple[tuple[float, float], ...]
    drawn: int
    heat: NDArray[np.float32]
    hue: NDArray[np.uint8]
    kinds: NDArray[np.uint8] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return types that JSON has."""
        plain: dict[str, Any] = {
            "name": self.name, "about": self.about, "finding": self.finding, "nbytes": self.nbytes,
            "row_nbytes": self.span / max(len(self.heat), 1), "first_row_begins": -self.lead,
            "lives_s": [list(life) for life in self.lives],
            "heat": np.round(self.heat.astype(float), 5).tolist(),
            "hue": self.hue.tolist(),
        }  # fmt: skip
        if self.kinds is not None:
            plain["kinds"] = self.kinds.tolist()
        return plain


@dataclass(frozen=True)
class Heatmap:
    """Time to the right, objects above each other, within each the addresses downwards.

    Attributes:
        seconds: How long all columns together are.
        strips: From top to bottom.
    """

    seconds: float
    strips: tuple[HeatStrip, ...]

    @property
    def columns(self) -> int:
        """How many columns each strip has."""
        return self.strips[0].heat.shape[1] if self.strips else 0

    def as_dict(self) -> dict[str, Any]:
        """Return types that JSON has."""
        return {
            "type": "heatmap",
            "seconds": self.seconds,
            "column_s": self.seconds / max(self.columns, 1),
            "hues": ["", "read", "written", "both", "touched", "resident"],
            "strips": [strip.as_dict() for strip in self.strips],
        }


@dataclass(frozen=True)
class Series:
    """A line, or a layer of a stack.

    Attributes:
        name: For the legend.
        values: One for each x; NaN where there is none.
        colour: As #RRGGBB; all grounds have the same.
        dashed: Whether the line is dashed.
    """

    name: str
    values: NDArray[np.float64]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Values over time, or over percentiles.

    Attributes:
        title: What is shown, and what it says.
        unit: Of the values.
        x: Where the values are: seconds, or percents; the same number for each series.
        series: From the bottom upwards.
        stacked: Whether the layers lie above each other.
        over: What `x` is.
        marks: Seconds and words: when objects came and went.
    """

    title: str
    unit: Unit
    x: NDArray[np.float64]
    series: tuple[Series, ...]
    stacked: bool = False
    over: Literal["time", "percent"] = "time"
    marks: tuple[tuple[float, str], ...] = ()

    @property
    def most(self) -> float:
        """The highest value, of a stack the highest sum; 0 if there is none."""
        if not self.series or not len(self.x):
            return 0.0
        values = np.nan_to_num(np.array([one.values for one in self.series]))
        return float((values.sum(axis=0) if self.stacked else values).max(initial=0.0))

    def as_dict(self) -> dict[str, Any]:
        """Return types that JSON has."""
        return {
            "type": "chart", "title": self.title, "unit": self.unit, "over": self.over, "stacked": self.stacked,
            "x": np.round(self.x, 6).tolist(),
            "series": [
                {"name": one.name, "colour": one.colour, "dashed": one.dashed,
                 "values": [None if value != value else value for value in np.round(one.values, 3).tolist()]}
                for one in self.series
            ],
            "marks": [list(mark) for mark in self.marks],
        }  # fmt: skip


@dataclass(frozen=True)
class Bars:
    """A histogram of times.

    Attributes:
        title: What is shown, and what it says.
        edges_ns: Ends of the bars, one more than there are bars.
        counts: How high they are.
        marks: Nanoseconds and words, for percentiles.
    """

    title: str
    edges_ns: NDArray[np.float64]
    counts: NDArray[np.int64]
    marks: tuple[tuple[float, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return types that JSON has."""
        return {
            "type": "bars", "title": self.title, "edges_ns": self.edges_ns.tolist(),
            "counts": self.counts.tolist(), "marks": [list(mark) for mark in self.marks],
        }  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the unit of its values, and what is said when one points at it."""

    name: str
    unit: Unit = "text"
    about: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of values; None where there is none.

    Attributes:
        columns: Headings.
        rows: A value for each column.
        title: What is shown, and what it says.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return types that JSON has."""
        return {
            "type": "table", "title": self.title,
            "columns": [{"name": column.name, "unit": column.unit} for column in self.columns],
            "rows": [list(row) for row in self.rows],
        }  # fmt: skip


Panel = Heatmap | Chart | Bars | Table


@dataclass(frozen=True)
class Note:
    """A sentence below a report; `loud` if it limits what the report says."""

    text: str
    loud: bool = False


@dataclass(frozen=True)
class Report:
    """A report that any form can be drawn from.

    Attributes:
        name: "heatmap", "timeline", "wss" or "table".
        title: What was found.
        subtitle: Of what, for how long.
        panels: From top to bottom.
        notes: What must be known to read it.
    """

    name: str
    title: str
    subtitle: str
    panels: tuple[Panel, ...]
    notes: tuple[Note, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return types that JSON has."""
        return {
            "report": self.name, "title": self.title, "subtitle": self.subtitle,
            "notes": [{"text": note.text, "loud": note.loud} for note in self.notes],
            "panels": [panel.as_dict() for panel in self.panels],
        }  # fmt: skip
