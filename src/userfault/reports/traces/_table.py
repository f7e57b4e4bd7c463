"""Objects in numbers, and their hot and cold parts in the object's own terms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from userfault._trace import EventKind, cold, fault_latency, hot, totals
from userfault.reports.traces._panels import Column, Table
from userfault.reports.traces._working_sets import by_number
from userfault.sizes import format_count, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from userfault._trace import ObjectTotals, Region, Trace, TracedObject, WorkingSet
    from userfault.reports.traces._objects import Group
    from userfault.reports.traces._panels import Panel

__all__ = ["rows_or_bytes", "table_panels"]

_MOST_REGIONS: Final = 12
# Of one object.
_MOST_PARTS: Final = 4
# Smaller parts than this share of an object are noise in a list.
_LEAST_PART: Final = 0.005


def table_panels(trace: Trace, shown: Sequence[Group], found: dict[float, WorkingSet]) -> tuple[Panel, ...]:
    """Return a row for each object, and the regions that are hottest, and those that were never touched.

    Args:
        trace: What was recorded.
        shown: The objects, each group in one row.
        found: The working set within a window in seconds, with objects called by their numbers; at most one.
    """
    numbered = by_number(trace)
    of = {one.name: one for one in totals(numbered)}
    sampled = any(group.first.watched != "faults" for group in shown)
    paged = any(group.first.watched == "faults" for group in shown)
    columns = [Column("object"), Column("size", "bytes")]
    if sampled:
        columns += [Column("touched", "bytes"), Column("written", "bytes"), Column("heat", "share")]
        columns += [Column("at a time p50", "bytes"), Column("p99", "bytes")]
    if paged:
        columns += [Column("loaded", "bytes"), Column("faults", "count"), Column("ahead", "count")]
        columns += [Column("evicted", "count"), Column("fault p50", "ns"), Column("p99", "ns")]
    rows = tuple(
        _row(trace, group, [of[str(number)] for number in group.ids], found, sampled=sampled, paged=paged)
        for group in shown
    )
    # Nobody knows reads where only writes were recorded, and a column without values says nothing.
    known = [at for at in range(len(columns)) if any(row[at] is not None for row in rows)]
    rows = tuple(tuple(row[at] for at in known) for row in rows)
    panels: list[Panel] = [Table(tuple(columns[at] for at in known), rows)]
    if sampled:
        panels += _regions(numbered, shown)
    return tuple(panels)


def _row(
    trace: Trace,
    group: Group,
    parts: list[ObjectTotals],
    found: dict[float, WorkingSet],
    *,
    sampled: bool,
    paged: bool,
) -> tuple[Any, ...]:
    values: list[Any] = [group.label, group.first.nbytes]
    is_paged = group.first.watched == "faults"
    if sampled:
        if is_paged:
            values += [None] * 5
        else:
            values += [
                _largest([part.touched for part in parts]), _largest([part.written for part in parts]),
                sum(part.heat for part in parts) / len(parts), *_at_a_time(group, found),
            ]  # fmt: skip
    if paged:
        values += _of_faults(trace, group, parts) if is_paged else [None] * 6
    return tuple(values)


def _largest(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _at_a_time(group: Group, found: dict[float, WorkingSet]) -> list[int | None]:
    for one in found.values():
        nbytes = sum((one.by_object[str(number)] for number in group.ids), 0 * one.nbytes)
        values = replace(one, nbytes=nbytes).percentiles((50, 99))
        return [values[50], values[99]]
    return [None, None]


def _of_faults(trace: Trace, group: Group, parts: list[ObjectTotals]) -> list[Any]:
    def counted(*kinds: EventKind) -> int:
        return sum(part.events.get(kind, 0) for part in parts for kind in kinds)

    latency = fault_latency(trace, group.ids)
    stage = latency.stages.get("fault")
    half: float | None
    most: float | None
    if latency.count and latency.took_ns[-1] > 0:
        half, most = latency.percentile(50), latency.percentile(99)
    elif stage is not None and stage.count:
        half, most = stage.percentile(50), stage.percentile(99)
    else:
        half = most = None
    ahead = counted(EventKind.READAHEAD, EventKind.PREFETCH, EventKind.REPLAY)
    loaded = sum(part.loaded for part in parts)
    return [loaded, counted(EventKind.DEMAND), ahead, counted(EventKind.EVICT), half, most]


def _regions(numbered: Trace, shown: Sequence[Group]) -> list[Panel]:
    # Of objects that follow each other, the last one stands for all.
    labels = {str(group.ids[-1]): group for group in shown if group.first.watched != "faults"}
    ids = [int(name) for name in labels]
    if not ids:
        return []
    reads = any(group.tells_reads for group in shown)
    word = "touched" if reads else "written"
    panels: list[Panel] = []
    for title, regions, with_heat in (
        ("Hottest parts", _hottest(numbered, ids), True),
        (f"Parts that were never {word}, largest first", cold(numbered, limit=200, objects=ids), False),
    ):
        rows = []
        for region in regions:
            thing = labels[region.object].first
            # A whole object that is hot is worth a line; crumbs are not.
            if region.nbytes < max(_LEAST_PART * thing.nbytes, 1):
                continue
            heat = (region.heat,) if with_heat else ()
            rows.append((labels[region.object].label, rows_or_bytes(thing, region), region.nbytes, *heat))
        columns = (Column("object"), Column("part"), Column("size", "bytes"))
        if rows:
            more = (Column("heat", "share"),) if with_heat else ()
            panels.append(Table((*columns, *more), tuple(rows[:_MOST_REGIONS]), title))
    return panels


def _hottest(numbered: Trace, ids: list[int]) -> list[Region]:
    found: list[Region] = []
    for number in ids:
        # Half as hot as the hottest page is hot: of what is touched evenly, that is all of it and not a list of crumbs.
        for step in range(1, 8):
            if hot(numbered, at_least=0.5**step, limit=1, objects=number):
                found += hot(numbered, at_least=0.5 ** min(step + 1, 7), limit=_MOST_PARTS, objects=number)
                break
    return sorted(found, key=lambda region: (-region.heat, -region.nbytes))


def rows_or_bytes(thing: TracedObject, region: Region) -> str:
    """Say where a region is: rows of an array, or bytes.

    Rows that lie in it in part count as well: pages end in the middle of rows.
    """
    if region.start == 0 and region.stop == thing.nbytes:
        return "all of it"
    if thing.shape and thing.shape[0] > 1 and thing.nbytes % thing.shape[0] == 0:
        row = thing.nbytes // thing.shape[0]
        first, last = region.start // row, -(-region.stop // row)
        more = ", ..." if len(thing.shape) > 1 else ""
        return f"[{first}:{last}{more}]"
    return (
        f"bytes {format_count(region.start)} to {format_count(region.stop)} ({format_size(region.start)} in)"
    )
