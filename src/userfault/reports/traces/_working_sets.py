"""How much memory is in use at a time: the working set within windows, over time and by object."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from userfault._trace import working_set
from userfault.reports._palette import SERIES
from userfault.reports._text import format_duration
from userfault.reports.traces._panels import Chart, Column, Series, Table
from userfault.reports.traces._panels import middles as middles_of
from userfault.reports.traces._words import format_share, plural
from userfault.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from userfault._trace import Trace, WorkingSet
    from userfault._trace._touches import Kind
    from userfault.reports.traces._objects import Group
    from userfault.reports.traces._panels import Panel

__all__ = ["PERCENTS", "by_number", "usual_windows", "working_set_panels"]

PERCENTS: Final = (0, 25, 50, 75, 90, 100)
_MOST_LAYERS: Final = 7
_OTHERS: Final = "#B0B0B0"


def by_number(trace: Trace) -> Trace:
    """Return the trace with objects called by their numbers: names need not be unique."""
    return replace(trace, objects=tuple(replace(one, name=str(one.id)) for one in trace.objects))


def usual_windows(trace: Trace) -> tuple[float, ...]:
    """Return windows in seconds: one look and ten looks, as far as they are shorter than it, and all of the time."""
    samples = trace.samples
    whole = max(trace.duration_ns / 1e9, 1e-9)
    if not len(samples):
        return (whole,)
    # Intervals adapt to what they cost. A window that is shorter than one would often be empty.
    look = float(np.percentile(samples["stop_ns"] - samples["start_ns"], 95)) / 1e9
    return (*sorted({w for w in (_rounded(max(look, 1e-9)), _rounded(10 * look)) if w < whole}), whole)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.1g}")


def working_set_panels(
    trace: Trace, shown: Sequence[Group], windows: Sequence[float], kind: Kind | None, bins: int
) -> tuple[tuple[Panel, ...], str]:
    """Return percentiles, curves over time, and who contributes what; and a title that says the finding."""
    numbered = by_number(trace)
    ids = [number for group in shown for number in group.ids]
    found = [(window, working_set(numbered, window, kind=kind, objects=ids)) for window in windows]
    percentiles = [one.percentiles(PERCENTS) for _, one in found]
    columns = (Column("window", "seconds"), *(Column(f"p{percent}", "bytes") for percent in PERCENTS))
    rows = tuple(
        (window, *(values[percent] for percent in PERCENTS))
        for (window, _), values in zip(found, percentiles, strict=True)
    )
    middles = middles_of(trace.duration_ns / 1e9, bins)
    # The layers are those of the window in the middle: the shortest and the longest say least.
    window, middle = found[len(found) // 2]
    total = sum(group.first.nbytes for group in shown)
    half = percentiles[len(found) // 2][50]
    # Where nobody looked for reads, it is a set of writes only, and the report must not pass it off as more.
    known = kind or ("accessed" if any(group.tells_reads for group in shown) else "written")
    what = {"accessed": "Working set", "written": "Written", "read_only": "Only read"}[known]
    layers = _layers(shown, middle, middles)
    title = (
        f"{what} within {format_duration(window * 1e9)}: {format_size(half)} half of the time,"
        f" {format_size(middle.peak)} at most, of {format_size(total)}"
    )
    whole = sum(float(one.values.sum()) for one in layers)
    if len(layers) > 1 and whole:
        title += f"; {format_share(float(layers[0].values.sum()) / whole)} of it is {layers[0].name}"
    curves = tuple(
        Series(
            f"within {format_duration(one * 1e9)}",
            _resampled(curve, curve.nbytes, middles),
            SERIES[number % 8],
        )
        for number, (one, curve) in enumerate(found)
    )
    panels: list[Panel] = [
        Table(columns, rows, f"{what}: bytes that are not exceeded in this share of the time"),
        Chart(f"{what}, by percentile of the time", "bytes", np.arange(0, 101.0), _ranked(found), over="percent"),
        Chart(f"{what} within {format_duration(window * 1e9)}, by object", "bytes", middles,
              layers, stacked=True),
    ]  # fmt: skip
    if len(found) > 1:
        panels.append(Chart(f"{what}, over time", "bytes", middles, curves))
    return tuple(panels), title


def _ranked(found: Sequence[tuple[float, WorkingSet]]) -> tuple[Series, ...]:
    series = []
    for number, (window, one) in enumerate(found):
        values = np.array(list(one.percentiles(range(101)).values()), float)
        series.append(Series(f"within {format_duration(window * 1e9)}", values, SERIES[number % len(SERIES)]))
    return tuple(series)


def _layers(shown: Sequence[Group], found: WorkingSet, middles: NDArray[np.float64]) -> tuple[Series, ...]:
    layers = []
    for group in shown:
        nbytes = sum(
            (found.by_object[str(number)] for number in group.ids), np.zeros(len(found.times_ns), np.int64)
        )
        if nbytes.any():
            layers.append((group.label, _resampled(found, nbytes, middles)))
    layers.sort(key=lambda layer: -float(layer[1].sum()))
    kept = [
        Series(name, values, SERIES[number]) for number, (name, values) in enumerate(layers[:_MOST_LAYERS])
    ]
    rest = layers[_MOST_LAYERS:]
    if rest:
        kept.append(
            Series(plural(len(rest), "other"), np.sum([values for _, values in rest], axis=0), _OTHERS)
        )
    return tuple(kept)


def _resampled(
    found: WorkingSet, nbytes: NDArray[np.int64], middles: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the value that holds at each moment: that of the sample which it is in."""
    if not len(nbytes):
        return np.zeros(len(middles))
    at = np.searchsorted(found.times_ns, middles * 1e9)
    values: NDArray[np.float64] = nbytes[np.minimum(at, len(nbytes) - 1)].astype(float)
    values[at >= len(nbytes)] = 0.0
    return values
