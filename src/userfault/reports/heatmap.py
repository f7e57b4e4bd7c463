"""The same picture in a terminal: a grid of half blocks, time to the right, addresses upwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from userfault.errors import MissingExtraError
from userfault.reports._recording import Kind, Recording
from userfault.reports._replay import count, occupancy
from userfault.sizes import format_size

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["heatmap"]

_LABEL_WIDTH: Final = 9
# By rising priority: what a cell shows if several things happened in it. The colours are the picture's.
_KINDS: Final = (
    (Kind.EVICT, "evicted", "#9e9e9e"),
    (Kind.READAHEAD, "readahead", "#0072b2"),
    (Kind.PREFETCH, "prefetch", "#009e73"),
    (Kind.DEMAND, "on demand", "#d55e00"),
    (Kind.POISON, "poisoned", "#f0e442"),
)
# By the share of a cell that was resident: look-ups leave one block here, one there.
_RESIDENT: Final = ((0.0, "#204358"), (0.05, "#37759a"), (0.4, "#56b4e9"))
_NOTHING: Final = "#202020"


def heatmap(recording: Recording, *, width: int = 100, height: int = 24) -> Text:
    """Draw a recording as text, `width` columns by about `height` lines.

    Raises:
        MissingExtraError: Rich is not installed.

    Example:
        >>> from rich.console import Console
        >>> Console().print(heatmap(recording))  # doctest: +SKIP
    """
    try:
        from rich.text import Text
    except ImportError as error:
        raise MissingExtraError.for_module("rich", "cli", "drawing in a terminal") from error
    columns, lines = max(width - _LABEL_WIDTH, 10), max(height - 3, 4)
    colours = _cells(recording, columns, 2 * lines)[::-1]  # the highest address first
    text = Text(no_wrap=True)
    for line in range(lines):
        label = _offset_label(recording, line, lines)
        text.append(f"{label:>{_LABEL_WIDTH - 1}} ", style="dim")
        for upper, lower in zip(colours[2 * line], colours[2 * line + 1], strict=True):
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    seconds = f"{recording.seconds:.1f} s"
    text.append(" " * _LABEL_WIDTH + f"0{seconds:>{columns - 1}}\n", style="dim")
    text.append(" " * _LABEL_WIDTH)
    present = set(np.unique(recording.events["kind"]).tolist())
    for kind, name, colour in reversed(_KINDS):
        if kind in present:
            text.append("■ ", style=colour)
            text.append(f"{name}  ")
    text.append("■ ", style=_RESIDENT[-1][1])
    text.append("resident\n")
    return text


def _cells(recording: Recording, columns: int, rows: int) -> list[list[str]]:
    grid = np.full((rows, columns), _NOTHING, dtype=object)
    share = occupancy(recording, columns, rows)
    for least, colour in _RESIDENT:
        grid[share > least] = colour
    for kind, _, colour in _KINDS:
        happened = count(recording, kind, columns, rows) > 0
        # Where blocks come and go together, that they are there says more than that some went.
        grid[happened & (share == 0) if kind is Kind.EVICT else happened] = colour
    cells: list[list[str]] = grid.tolist()
    return cells


def _offset_label(recording: Recording, line: int, lines: int) -> str:
    if line == 0:
        return format_size(recording.nbytes)
    if line == lines // 2:
        return format_size(recording.nbytes / 2)
    return "0" if line == lines - 1 else ""
