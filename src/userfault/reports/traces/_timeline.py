"""What happened when: bytes touched by object, events of paged memories, how long faults took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from userfault._trace import LOADS, EventKind, Latency, demand_and_ahead, fault_latency
from userfault._trace._touches import touches_of
from userfault.reports._palette import KINDS, RESIDENT, SERIES, Look
from userfault.reports._replay import resident_over_time
from userfault.reports._text import format_duration
from userfault.reports.traces._findings import finding
from userfault.reports.traces._heat import recording_of
from userfault.reports.traces._panels import Bars, Chart, Series
from userfault.reports.traces._panels import middles as middles_of
from userfault.reports.traces._words import format_share
from userfault.sizes import format_count, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from userfault._trace import Trace
    from userfault._trace._touches import Kind
    from userfault.reports.traces._objects import Group
    from userfault.reports.traces._panels import Panel

__all__ = ["latency_bars", "resident_chart", "timeline_panels"]

_LIGHT: Final = Look("light")
_READ, _WRITTEN, _TOUCHED = (_LIGHT.hue(hue, 0.62) for hue in ("read", "written", "touched"))
_BARS: Final = 16


def timeline_panels(trace: Trace, shown: Sequence[Group], bins: int) -> tuple[Panel, ...]:
    """Return a chart for each object, and for the paged memories those of events and latencies."""
    middles = middles_of(trace.duration_ns / 1e9, bins)
    panels: list[Panel] = [
        _touches(trace, group, middles) for group in shown if group.first.watched != "faults"
    ]
    paged = [group for group in shown if group.first.watched == "faults"]
    for group in paged:
        panels += [_loads(trace, group, middles), *_other_events(trace, group, middles)]
        panels.append(resident_chart(trace, group, middles))
    ids = [number for group in paged for number in group.ids]
    latency = fault_latency(trace, ids)
    if len(latency.took_ns) and latency.took_ns[-1] > 0:
        panels.append(_latency_chart(trace, ids, latency, middles))
    bars = latency_bars(latency)
    if bars is not None:
        panels.append(bars)
    return tuple(panels)


def _touches(trace: Trace, group: Group, middles: NDArray[np.float64]) -> Chart:
    if not group.tells_reads:
        wanted: list[tuple[str, Kind, str]] = [("written", "written", _WRITTEN)]
    elif not group.tells_writes:
        wanted = [("touched", "accessed", _TOUCHED)]
    else:
        wanted = [("written", "written", _WRITTEN), ("read", "read_only", _READ)]
    made = [
        Series(name, _per_sample(trace, group, kind, len(middles)), colour) for name, kind, colour in wanted
    ]
    series = tuple(one for one in made if one.values.any()) or (made[-1],)
    marks = _births_and_deaths(trace, group)
    title = f"{group.label}, {format_size(group.first.nbytes)}: {finding(trace, group)}"
    return Chart(title, "bytes", middles, series, stacked=True, marks=marks)


def _births_and_deaths(trace: Trace, group: Group) -> tuple[tuple[float, str], ...]:
    marks = []
    for one in group.objects:
        if one.born_ns > trace.duration_ns // 200:
            marks.append((one.born_ns / 1e9, "made"))
        if one.died_ns is not None:
            marks.append((one.died_ns / 1e9, "freed"))
    return tuple(marks)


def _per_sample(trace: Trace, group: Group, kind: Kind, bins: int) -> NDArray[np.float64]:
    """Return the mean over each bin of the bytes that were touched between two looks."""
    total = np.zeros(bins + 1)
    scale = bins / max(trace.duration_ns, 1)
    for one in group.objects:
        found = touches_of(trace, one, kind)
        pages = np.bincount(found.sample, found.count, len(found.start_ns))
        nbytes = np.minimum(pages * one.granularity, one.nbytes)
        # What lies behind a moment, as differences from bin to bin: 1 - f in its own bin, f more in the next.
        for sign, moment in ((1.0, found.start_ns), (-1.0, found.start_ns + found.duration_ns)):
            at = np.clip(moment * scale, 0, bins)
            own = np.minimum(at.astype(np.int64), bins - 1)
            part = at - own
            np.add.at(total, own, sign * nbytes * (1 - part))
            np.add.at(total, own + 1, sign * nbytes * part)
    # Sums of many signed shares leave a dust of rounding.
    summed = np.cumsum(total)[:-1]
    return np.where(summed < 1e-3, 0.0, summed)


def _loads(trace: Trace, group: Group, middles: NDArray[np.float64]) -> Chart:
    series = _by_kind(trace, group, middles, LOADS)
    counts = ", ".join(one.name for one in series) or "nothing"
    return Chart(f"{group.label}: loads ({counts})", "bytes", middles, series, stacked=True)


def _other_events(trace: Trace, group: Group, middles: NDArray[np.float64]) -> list[Chart]:
    series = _by_kind(trace, group, middles, [kind for kind in KINDS if kind not in LOADS])
    return [Chart(f"{group.label}: evictions and writes", "bytes", middles, series)] if series else []


def _by_kind(
    trace: Trace, group: Group, middles: NDArray[np.float64], kinds: Sequence[EventKind]
) -> tuple[Series, ...]:
    activity = demand_and_ahead(trace, len(middles), group.ids)
    return tuple(
        Series(f"{format_count(int(activity.counts[kind].sum()))} {KINDS[kind][0]}",
               activity.nbytes[kind].astype(float), KINDS[kind][1])
        for kind in kinds if activity.counts[kind].any()
    )  # fmt: skip


def resident_chart(trace: Trace, group: Group, middles: NDArray[np.float64]) -> Chart:
    """Show how much of a paged memory was resident, as its loads and evictions tell."""
    values = np.zeros(len(middles))
    for one in group.objects:
        times, level = resident_over_time(recording_of(trace, one))
        values += level[np.clip(np.searchsorted(times, middles, side="right") - 1, 0, len(level) - 1)]
    peak = format_size(float(values.max(initial=0)))
    title = f"{group.label}: resident, {peak} of {format_size(group.first.nbytes)} at most"
    return Chart(title, "bytes", middles, (Series("resident", values, RESIDENT),), stacked=True)


def _latency_chart(trace: Trace, ids: list[int], latency: Latency, middles: NDArray[np.float64]) -> Chart:
    chosen = trace.events[np.isin(trace.events["object"], ids) & (trace.events["kind"] == EventKind.DEMAND)]
    # Few faults in a bin have no percentiles to speak of.
    bins = int(np.clip(len(chosen) // 8, 1, len(middles)))
    at = np.minimum(chosen["t_ns"] * float(bins) / max(trace.duration_ns, 1), bins - 1).astype(np.int64)
    values = np.full((3, bins), np.nan)
    for number in np.unique(at).tolist():
        values[:, number] = np.percentile(chosen["took_ns"][at == number].astype(float), (50, 90, 99))
    series = tuple(
        Series(name, one, colour, dashed)
        for name, one, colour, dashed in zip(
            ("p50", "p90", "p99"),
            values,
            (SERIES[0], SERIES[1], SERIES[4]),
            (False, False, True),
            strict=True,
        )
    )
    loads = np.isin(trace.events["kind"], LOADS) & np.isin(trace.events["object"], ids)
    share = len(chosen) / max(int(loads.sum()), 1)
    title = (
        f"What faults waited: p50 {format_duration(latency.percentile(50))}, p99"
        f" {format_duration(latency.percentile(99))}; {format_share(share)} of the loads were waited for"
    )
    return Chart(title, "ns", middles_of(trace.duration_ns / 1e9, bins), series)


def latency_bars(latency: Latency) -> Bars | None:
    """Return a histogram of what was recorded of each fault or, without that, of the memory's own counts."""
    took = latency.took_ns[latency.took_ns > 0].astype(float)
    if len(took):
        low, high = np.log10(took[0]), np.log10(max(took[-1], took[0] * 1.01))
        edges = 10.0 ** np.linspace(low, high, min(_BARS, max(4, len(took) // 3)) + 1)
        edges[-1] = max(edges[-1], took[-1])
        counts = np.histogram(took, edges)[0]
        marks = tuple((float(np.percentile(took, percent)), f"p{percent}") for percent in (50, 90, 99))
        return Bars(f"How long {format_count(len(took))} faults took", edges, counts.astype(np.int64), marks)
    histogram = latency.stages.get("fault")
    if histogram is None or not histogram.count:
        return None
    filled = np.flatnonzero(histogram.buckets)
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges = np.array([bucket_start(bucket) for bucket in range(first, last + 1)], float)
    marks = tuple((histogram.percentile(percent), f"p{percent}") for percent in (50, 90, 99))
    counted = np.array(histogram.buckets[first:last], np.int64)
    return Bars(f"How long {format_count(histogram.count)} faults took", edges, counted, marks)


def bucket_start(bucket: int) -> int:
    """Return where a bucket of `userfault.Histogram` begins: four an octave of nanoseconds."""
    if bucket < 4:
        return bucket
    return (4 + bucket % 4) << (bucket // 4 - 1)
