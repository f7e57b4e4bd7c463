"""Reports as one HTML page that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import base64
import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault.reports._palette import KINDS, Look, level
from userfault.reports.traces._cells import HUES, alive, hues_of, kinds_of
from userfault.reports.traces._panels import Chart, Heatmap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from userfault.reports.traces._panels import HeatStrip, Panel, Report

__all__ = ["page"]


def page(report: Report) -> str:
    """Return the page."""
    folder = files("userfault.reports.traces")
    payload = {
        "panels": [_panel(panel) for panel in report.panels],
        "hues": HUES,
        "kinds": {int(kind): entry for kind, entry in KINDS.items()},
        "looks": {"light": _look(Look("light")), "dark": _look(Look("dark"))},
    }
    notes = (
        f'<p class="{"loud" if note.loud else "faint"}">{html.escape(note.text)}</p>' for note in report.notes
    )
    parts = {
        "title": html.escape(report.title),
        "subtitle": html.escape(report.subtitle),
        "notes": "\n".join(notes),
        "style": folder.joinpath("page.css").read_text("utf-8").rstrip(),
        "script": folder.joinpath("page.js").read_text("utf-8").rstrip(),
        # A name such as "</script>" must not end the data.
        "data": json.dumps(payload, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # Piece by piece: what is filled in may look like a place to fill in.
    pieces = folder.joinpath("page.html").read_text("utf-8").split("{{")
    made = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        made += [parts[name], rest]
    return "".join(made)


def _look(look: Look) -> dict[str, Any]:
    return {"untouched": look.untouched, "ramps": [_text(look.ramp(hue)) for hue in HUES]}


def _panel(panel: Panel) -> dict[str, Any]:
    if isinstance(panel, Heatmap):
        hues = hues_of(panel)
        return {
            "type": "heatmap",
            "seconds": panel.seconds,
            "hues": [number for number, hue in enumerate(HUES, 1) if hue in hues],
            "kinds": [int(kind) for kind in kinds_of(panel)],
            "strips": [_strip(strip, panel.seconds) for strip in panel.strips],
        }
    plain = panel.as_dict()
    if isinstance(panel, Chart):
        plain["most"] = panel.most
        plain["span"] = float(panel.x[-1] + panel.x[0]) if len(panel.x) else 0.0
    return plain


def _strip(strip: HeatStrip, seconds: float) -> dict[str, Any]:
    rows, columns = strip.heat.shape
    return {
        "name": strip.name,
        "about": strip.about,
        "finding": strip.finding,
        "nbytes": strip.nbytes,
        "lead": strip.lead,
        "span": strip.span,
        "itemsize": strip.itemsize,
        "drawn": strip.drawn,
        "rows": rows,
        "columns": columns,
        "heat": _text(np.rint(level(strip.heat) * 255).astype(np.uint8)),
        "hue": _text(strip.hue),
        "kinds": "" if strip.kinds is None else _text(strip.kinds),
        "alive": _text((alive(strip, seconds) | (strip.hue.max(axis=0, initial=0) > 0)).astype(np.uint8)),
    }


def _text(cells: NDArray[np.uint8]) -> str:
    return base64.b64encode(np.ascontiguousarray(cells).tobytes()).decode("ascii")
