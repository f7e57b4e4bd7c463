"""Reports on a Rich console, with the colours that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from userfault.errors import MissingExtraError
from userfault.reports._palette import Look
from userfault.reports.traces._heat import Canvas

if TYPE_CHECKING:
    from rich.console import Console

    from userfault.reports.traces._panels import Report

__all__ = ["canvas_of_console", "show"]

_WIDEST: Final = 160
_LINES: Final = 24
_MOST_LINES: Final = 44
# Beside the heat map: title, axis, legend, notes.
_OTHER_LINES: Final = 9


def _size(console: Console, width: int | None, height: int | None) -> tuple[int, int]:
    lines = max(console.height - _OTHER_LINES, 8) if console.is_terminal else _LINES
    return width or min(console.width, _WIDEST), height or min(lines, _MOST_LINES)


def canvas_of_console(console: Console, *, width: int | None = None, height: int | None = None) -> Canvas:
    """Return what a heat map has to draw on in a terminal: two cells for each character.

    Args:
        console: Where it is to be shown.
        width: In columns of text; by default the console's.
        height: In lines of text, for all objects together; by default what is about a screen.
    """
    from userfault.reports.traces._terminal_heat import LABEL_WIDTH

    columns, lines = _size(console, width, height)
    grow_to = 2 * (height or _MOST_LINES)
    return Canvas(max(columns - LABEL_WIDTH, 10), 2 * lines, least=2, multiple=2, grow_to=grow_to)


def show(report: Report, console: Console, *, width: int | None = None, height: int | None = None) -> None:
    """Print a report. Where there are no colours, a heat map is made of digits.

    Raises:
        MissingExtraError: Rich is not installed.
    """
    try:
        from userfault.reports.traces._terminal import render
    except ImportError as error:
        raise MissingExtraError.for_module("rich", "cli", "drawing in a terminal") from error
    columns, lines = _size(console, width, height)
    console.print(render(report, width=columns, height=lines, look=_look(console)), width=columns)


def _look(console: Console) -> Look | None:
    if console.no_color or not console.color_system:
        return None
    return Look("few" if console.color_system in ("standard", "windows") else "dark")
