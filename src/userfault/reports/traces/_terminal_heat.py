"""A heat map in a terminal: half blocks in colour, or digits where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from rich.text import Text

from userfault._trace import EventKind
from userfault.reports._palette import KINDS, Look, level
from userfault.reports._text import format_duration
from userfault.reports.traces._cells import alive, colours, drawn_rows, hues_of, kinds_of
from userfault.reports.traces._words import ticks, wrap

if TYPE_CHECKING:
    from userfault.reports.traces._panels import Heatmap, HeatStrip

__all__ = ["LABEL_WIDTH", "heat_text", "legend", "time_axis"]

LABEL_WIDTH: Final = 24
# What stands for an event where there are no colours.
_LETTERS: Final = {
    EventKind.EVICT: "e",
    EventKind.DIRTY: "d",
    EventKind.WRITE: "w",
    EventKind.READAHEAD: "r",
    EventKind.PREFETCH: "p",
    EventKind.REPLAY: "y",
    EventKind.DEMAND: "D",
    EventKind.POISON: "X",
}


def heat_text(heat: Heatmap, *, height: int, look: Look | None) -> Text:
    """Draw a heat map whose strips have two rows for each line of text."""
    text = Text(no_wrap=True, overflow="crop")
    lines = sum(strip.drawn // 2 for strip in heat.strips)
    apart = len(heat.strips) > 1 and lines + len(heat.strips) - 1 <= height
    for number, strip in enumerate(heat.strips):
        if number and apart:
            text.append("\n")
        rows = _coloured_rows(strip, heat.seconds, look) if look else _plain_rows(strip, heat.seconds)
        for label, row in zip(_labels(strip, strip.drawn // 2), rows, strict=True):
            text.append_text(label).append_text(row).append("\n")
    return text.append_text(time_axis(heat.seconds, heat.columns))


def _labels(strip: HeatStrip, lines: int) -> list[Text]:
    room = LABEL_WIDTH - 1
    size, _, about = strip.about.partition(", ")
    name = Text(strip.name, "bold")
    facts = [*wrap(strip.finding, room), *wrap(about, room)]
    if name.cell_len + 1 + len(size) <= room:
        name.append(f" {size}", "not bold dim")
    else:
        facts.insert(0, size)
    words = [name, *(Text(fact, "dim") for fact in facts), *(Text() for _ in range(lines))][:lines]
    for word in words:
        word.truncate(room, overflow="ellipsis")
        word.pad_right(LABEL_WIDTH - word.cell_len)
    return words


def _coloured_rows(strip: HeatStrip, seconds: float, look: Look) -> list[Text]:
    cells = colours(strip, seconds, look)
    rows = []
    for upper, lower in zip(cells[::2], cells[1::2], strict=True):
        row = Text(no_wrap=True)
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            row.append("▀", f"{_hex(top)} on {_hex(bottom)}") if top[3] else row.append(" ")
        rows.append(row)
    return rows


def _hex(colour: list[int]) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _plain_rows(strip: HeatStrip, seconds: float) -> list[Text]:
    shown = drawn_rows(strip)
    heat = strip.heat[shown].reshape(-1, 2, strip.heat.shape[1]).max(axis=1)
    digits = np.array([".", *"123456789"])
    cells = digits[np.where(heat > 0, 1 + np.floor(level(heat) * 8.999), 0).astype(int)]
    if strip.kinds is not None:
        cells = np.where(heat > 0, "-", ".")
        kinds = strip.kinds[shown].reshape(heat.shape[0], 2, -1)
        for kind, letter in _LETTERS.items():
            cells[(kinds == kind).any(axis=1)] = letter
    cells[:, ~(alive(strip, seconds) | (heat.max(axis=0) > 0))] = " "
    return [Text("".join(row)) for row in cells]


def time_axis(seconds: float, columns: int) -> Text:
    """Label the columns with times: as many as have room."""
    line = [" "] * (LABEL_WIDTH + columns + 8)
    for moment in ticks(seconds, max(2, columns // 14)):
        label = format_duration(moment * 1e9) if moment else "0"
        at = LABEL_WIDTH + (round(moment / seconds * columns) if seconds else 0)
        at = min(at, LABEL_WIDTH + columns - len(label))
        if not "".join(line[at - 1 : at + len(label)]).strip():
            line[at : at + len(label)] = label
    return Text("".join(line).rstrip(), "dim")


def legend(heat: Heatmap, look: Look | None) -> Text:
    """Explain what the cells show."""
    if look is None:
        return _plain_legend(heat)
    text = Text()
    for hue in hues_of(heat):
        for share in (1.0,) if hue == "resident" else (0.001, 0.01, 0.1, 0.3, 1.0):
            text.append("█", look.hue(hue, float(level(np.array(share)))).lower())
        text.append(f"\u00a0{hue}   ")
    for kind in kinds_of(heat):
        text.append("█", look.kind(kind).lower()).append(f"\u00a0{KINDS[kind][0]}   ")
    if any(hue != "resident" for hue in hues_of(heat)):
        text.append("(0.1 % to 100 % of a cell)", "dim")
    return text


def _plain_legend(heat: Heatmap) -> Text:
    words = []
    if any(hue != "resident" for hue in hues_of(heat)):
        words.append("1-9: heat, from below 1 % to all of a cell")
    kinds = kinds_of(heat)
    if kinds:
        words += [f"{_LETTERS[kind]}: {KINDS[kind][0]}" for kind in kinds]
        words.append("-: resident")
    return Text("; ".join([*words, ".: nothing"]), "dim")
