"""Reports on traces: `heatmap`, `timeline`, `wss` and `table` make a `Report`; `save` and `show` draw it.

A report is plain data: a title that says what was found, notes, and panels with numbers. What draws it is chosen by
where it goes: a file's suffix (pictures need Matplotlib), or a Rich console.

Example:
    >>> from userfault.reports import traces
    >>> from userfault.track import read_trace
    >>> traces.save(traces.heatmap(read_trace("run.uft")), "run.html")  # doctest: +SKIP
"""

from userfault.reports.traces._files import SUFFIXES, canvas_of, save
from userfault.reports.traces._heat import Canvas
from userfault.reports.traces._panels import Report
from userfault.reports.traces._reports import heatmap, table, timeline, wss
from userfault.reports.traces._show import canvas_of_console, show

__all__ = [
    "SUFFIXES",
    "Canvas",
    "Report",
    "canvas_of",
    "canvas_of_console",
    "heatmap",
    "save",
    "show",
    "table",
    "timeline",
    "wss",
]
