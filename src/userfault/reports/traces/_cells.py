"""The colours of a heat map's cells, for every form that has colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from userfault.reports._palette import KINDS, Hue, Look, blend, level

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from userfault._trace import EventKind
    from userfault.reports.traces._panels import Heatmap, HeatStrip

__all__ = ["HUES", "alive", "colours", "drawn_rows", "hues_of", "kinds_of"]

# By the numbers in `HeatStrip.hue`, from 1 on.
HUES: Final[tuple[Hue, ...]] = ("read", "written", "both", "touched", "resident")


def drawn_rows(strip: HeatStrip) -> NDArray[np.int64]:
    """Return which of the strip's rows each drawn row shows: small objects are drawn larger than they are."""
    return np.arange(strip.drawn) * len(strip.heat) // max(strip.drawn, 1)


def alive(strip: HeatStrip, seconds: float) -> NDArray[np.bool_]:
    """Return in which columns the object was there."""
    columns = strip.heat.shape[1]
    there = np.zeros(columns, bool)
    scale = columns / max(seconds, 1e-12)
    for born, died in strip.lives:
        first = min(int(born * scale), columns - 1)
        there[first : max(first + 1, int(np.ceil(died * scale - 1e-9)))] = True
    return there


def colours(strip: HeatStrip, seconds: float, look: Look) -> NDArray[np.uint8]:
    """Return the cells of a strip as `(drawn, columns, 4)`: transparent where it was not there."""
    image = np.zeros((*strip.heat.shape, 4), np.uint8)
    there = alive(strip, seconds) | (strip.hue.max(axis=0, initial=0) > 0)
    image[:, there, :3] = blend(look.untouched)
    image[:, there, 3] = 255
    place = np.rint(level(strip.heat) * 255).astype(np.uint8)
    for number, hue in enumerate(HUES, 1):
        chosen = strip.hue == number
        if chosen.any():
            image[chosen, :3] = look.ramp(hue)[place[chosen]]
    if strip.kinds is not None:
        for kind in KINDS:
            image[strip.kinds == kind, :3] = blend(look.kind(kind))
    return image[drawn_rows(strip)]


def hues_of(heat: Heatmap) -> list[Hue]:
    """Return the hues that occur, for a legend."""
    found = {int(number) for strip in heat.strips for number in np.unique(strip.hue)}
    return [hue for number, hue in enumerate(HUES, 1) if number in found]


def kinds_of(heat: Heatmap) -> list[EventKind]:
    """Return the kinds of events that occur, the most important first."""
    found = {
        int(number) for strip in heat.strips if strip.kinds is not None for number in np.unique(strip.kinds)
    }
    return [kind for kind in reversed(KINDS) if kind in found]
