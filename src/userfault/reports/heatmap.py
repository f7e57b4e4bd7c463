"""The same picture in a terminal: a grid of half blocks, time to the right, addresses downwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.errors import MissingExtraError
from userfault.reports._palette import Look
from userfault.reports.traces._heat import Canvas, loads
from userfault.reports.traces._panels import Heatmap, HeatStrip
from userfault.sizes import format_size

if TYPE_CHECKING:
    from rich.text import Text

    from userfault.reports._recording import Recording

__all__ = ["heatmap"]


def heatmap(recording: Recording, *, width: int = 100, height: int = 24) -> Text:
    """Draw a recording as text, `width` columns by about `height` lines.

    Raises:
        MissingExtraError: Rich is not installed.

    Example:
        >>> from rich.console import Console
        >>> Console().print(heatmap(recording))  # doctest: +SKIP
    """
    try:
        from userfault.reports.traces._terminal_heat import LABEL_WIDTH, heat_text, legend
    except ImportError as error:
        raise MissingExtraError.for_module("rich", "cli", "drawing in a terminal") from error
    lines = max(height - 3, 4)
    canvas = Canvas(max(width - LABEL_WIDTH, 10), 2 * lines)
    rows = min(2 * lines, recording.blocks)
    heat, hue, kinds = loads([recording], canvas, rows, 2 * lines)
    strip = HeatStrip(
        recording.name, format_size(recording.nbytes), "", recording.nbytes, recording.blocks * recording.block, 0, 0,
        ((0.0, recording.seconds),), 2 * lines, heat, hue, kinds,
    )  # fmt: skip
    drawn = Heatmap(recording.seconds, (strip,))
    look = Look("dark")
    text = heat_text(drawn, height=lines, look=look).append("\n").append_text(legend(drawn, look))
    return text.append("\n")
