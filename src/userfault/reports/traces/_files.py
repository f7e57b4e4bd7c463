"""Reports as files: the suffix says as what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from userfault.reports.traces._heat import Canvas

if TYPE_CHECKING:
    from userfault.reports.traces._panels import Report

__all__ = ["SUFFIXES", "canvas_of", "save"]

_PICTURES: Final = (".png", ".svg", ".pdf")
SUFFIXES: Final = (*_PICTURES, ".html", ".json")
_WIDTH: Final = 1650


def canvas_of(path: str | Path, *, width: int | None = None, height: int | None = None) -> Canvas:
    """Return what a heat map has to draw on in such a file.

    Args:
        path: The file.
        width: Of a picture or page, in pixels; of JSON, in columns.
        height: Likewise: pixels, or rows, for all objects together. Many objects take more.

    Raises:
        ValueError: The suffix is none of `SUFFIXES`.
    """
    suffix = _suffix(path)
    if suffix == ".json":
        return Canvas(width or 200, height or 128, least=8, grow_to=1 << 16)
    if suffix == ".html":
        columns = min(max((width or 1200) // 2, 50), 1500)
        return Canvas(columns, height or 480, least=18, spread=1, grow_to=6000)
    # A cell is a bit larger than a pixel.
    columns = max(round((width or _WIDTH) * 0.55), 50)
    return Canvas(columns, round((height or 750) * 0.8), least=16, spread=1, grow_to=1300)


def save(report: Report, path: str | Path, *, width: int | None = None) -> None:
    """Write a report into a file; its suffix chooses the format.

    Args:
        report: What to draw.
        path: The file, which is overwritten.
        width: Of a picture, in pixels.

    Raises:
        ValueError: The suffix is none of `SUFFIXES`.
        MissingExtraError: A picture needs Matplotlib, which is not installed.
        OSError: The file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix in _PICTURES:
        from userfault.reports.traces._figure import PIXELS_PER_INCH, figure

        figure(report, width=width or _WIDTH).savefig(path, dpi=PIXELS_PER_INCH)
    elif suffix == ".html":
        from userfault.reports.traces._page import page

        path.write_text(page(report), "utf-8")
    else:
        text = json.dumps(report.as_dict(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        path.write_text(f"{text}\n", "utf-8")


def _suffix(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: a report ends in {', '.join(SUFFIXES)}")
    return suffix
