"""Shares, spans and lists as people read them."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

from userfault.reports._text import format_duration
from userfault.sizes import format_count, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from userfault.reports.traces._panels import Unit

__all__ = ["format_share", "format_value", "listed", "plural", "ticks", "wrap"]


def format_share(share: float) -> str:
    """Return a share as a percentage that is never rounded to all or nothing.

    Example:
        >>> format_share(0.9996), format_share(0.034), format_share(0.00021), format_share(1)
        ('99.9 %', '3 %', '0.02 %', '100 %')
    """
    percent = share * 100
    if percent <= 0:
        return "0 %"
    if percent >= 100:
        return "100 %"
    if percent > 99:
        return f"{min(percent, 99.9):.1f} %".replace(".0 ", " ")
    if percent >= 1:
        return f"{percent:.0f} %"
    if percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.2f}".rstrip("0").rstrip(".") + " %"


def format_value(value: Any, unit: Unit) -> str:
    """Return a value with its unit, "–" if there is none."""
    if value is None:
        return "–"
    if unit == "text":
        return str(value)
    if unit == "bytes":
        return format_size(value)
    if unit == "count":
        return format_count(round(value))
    if unit == "share":
        return format_share(value)
    return format_duration(value if unit == "ns" else value * 1e9)


def plural(count: int, word: str) -> str:
    """Return a count with its word: "1 object", "2 objects"."""
    return f"{format_count(count)} {word}{'' if count == 1 else 's'}"


def ticks(most: float, wanted: int = 5) -> list[float]:
    """Return round values from 0 to at most `most`, about `wanted` of them."""
    if most <= 0:
        return [0.0]
    step = most / wanted
    scale = 10.0 ** _exponent(step)
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= step * 0.999)
    return [round(step * number, 12) for number in range(int(most / step * (1 + 1e-9)) + 1)]


def _exponent(value: float) -> int:
    exponent = 0
    while value >= 10:
        value, exponent = value / 10, exponent + 1
    while value < 1:
        value, exponent = value * 10, exponent - 1
    return exponent


def listed(words: Iterable[str]) -> str:
    """Join words: "a, b and c"."""
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines, but never between a number and its unit."""
    kept = re.sub(r"(?<=\d) (?=\S)", "\u00a0", text)
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(kept, width)]
