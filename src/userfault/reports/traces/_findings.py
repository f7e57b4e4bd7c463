"""What an object did, in a few words, and the title that a report gets from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from userfault._trace import LOADS, EventKind
from userfault._trace._touches import touches_of
from userfault.reports._text import format_duration
from userfault.reports.traces._objects import Group, activity
from userfault.reports.traces._words import format_share, listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from userfault._trace import Trace
    from userfault._trace._touches import Kind

__all__ = ["Facts", "facts_of", "finding", "headline"]

# What differs by less is called the same.
_ALIKE = 0.02
_MOST_NAMES = 3
_KINDS: Final[tuple[Kind, ...]] = ("accessed", "read_only", "written")


@dataclass(frozen=True)
class Facts:
    """What is known of a group of objects, as shares of its size.

    Attributes:
        touched: Share that was touched, or loaded, at least once.
        read: Share that was read and not written in at least one sample.
        written: Share that was written at least once.
        at_a_time: Share that was touched in a sample: the median over the time in which it was touched at all.
        active: Share of that time.
        every_ns: Length of a sample, likewise.
    """

    touched: float
    read: float
    written: float
    at_a_time: float
    active: float
    every_ns: float


def facts_of(trace: Trace, group: Group) -> Facts:
    """Summarize what a group's samples say; of a paged memory, what was loaded."""
    pages = max(group.first.pages, 1)
    if group.first.watched == "faults":
        events = trace.events[
            np.isin(trace.events["object"], group.ids) & np.isin(trace.events["kind"], LOADS)
        ]
        return Facts(len(np.unique(events["block"])) / pages, 0.0, 0.0, 0.0, 0.0, 0.0)
    touched, length = [], []
    ever = {kind: np.zeros(pages + 1, np.int64) for kind in _KINDS}
    for one in group.objects:
        found = touches_of(trace, one)
        touched.append(np.bincount(found.sample, found.count, len(found.start_ns)).astype(np.int64))
        length.append(found.duration_ns)
        for kind, edges in ever.items():
            some = found if kind == "accessed" else touches_of(trace, one, kind)
            np.add.at(edges, np.minimum(some.page, pages), 1)
            np.add.at(edges, np.minimum(some.page + some.count, pages), -1)
    share = {kind: float((np.cumsum(edges)[:-1] > 0).mean()) for kind, edges in ever.items()}
    counts, lengths = np.concatenate(touched), np.concatenate(length)
    busy = counts > 0
    return Facts(
        share["accessed"],
        share["read_only"],
        share["written"],
        min(_median(counts[busy], lengths[busy]) / pages, 1.0),
        float(lengths[busy].sum() / max(lengths.sum(), 1)),
        _median(lengths, lengths),
    )


def _median(values: NDArray[np.int64], weights: NDArray[np.int64]) -> float:
    """Return the value that is not exceeded for half of the time: intervals need not be equally long."""
    if not len(values):
        return 0.0
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(reached, reached[-1] / 2)]])


def finding(trace: Trace, group: Group) -> str:
    """Say what happened to a group of objects, for example "100 % read, 6 % at a time"."""
    facts = facts_of(trace, group)
    if group.first.watched == "faults":
        return _loads(trace, group, facts)
    if not facts.touched:
        if not np.isin(trace.samples["object"], group.ids).any():
            return "not looked at while it lived"
        return "never written" if group.first.watched == "writes" else "never touched"
    if not group.tells_reads:
        said = f"{format_share(facts.written or facts.touched)} written"
    elif not group.tells_writes:
        said = f"{format_share(facts.touched)} touched"
    elif not facts.written:
        said = f"{format_share(facts.read)} read"
    elif facts.written > facts.touched - _ALIKE and facts.read < _ALIKE:
        said = f"{format_share(facts.written)} written"
    elif abs(facts.read - facts.written) < _ALIKE:
        said = f"{format_share(max(facts.read, facts.written))} read and written"
    else:
        said = f"{format_share(facts.read)} read, {format_share(facts.written)} written"
    if facts.at_a_time > 0.8 * facts.touched:
        often = f"each {format_duration(facts.every_ns)}" if facts.active > 0.8 else ""
        return f"{said} {often}".strip() if often else f"{said} at once"
    return f"{said}, about {format_share(_about(facts.at_a_time))} at a time"


def _about(share: float) -> float:
    """Round a share, so that what is nearly the same reads the same."""
    return round(share * 20) / 20 if share >= 0.1 else float(f"{share:.1g}")


def _loads(trace: Trace, group: Group, facts: Facts) -> str:
    events = trace.events[np.isin(trace.events["object"], group.ids)]
    kinds = np.bincount(events["kind"], minlength=max(EventKind) + 1)
    loads = int(sum(kinds[kind] for kind in LOADS))
    if not loads:
        return "never loaded"
    waited = int(kinds[EventKind.DEMAND])
    said = f"{format_share(facts.touched)} loaded"
    if loads > 1.05 * facts.touched * group.first.pages:
        said += f", {loads / max(facts.touched * group.first.pages, 1):.1f} times each"
    ahead = loads - waited
    said += f", {format_share(ahead / loads)} of it ahead of demand" if ahead else ", all on demand"
    took = events["took_ns"][(events["kind"] == EventKind.DEMAND) & (events["took_ns"] > 0)]
    if len(took):
        half, most = (format_duration(float(np.percentile(took, percent))) for percent in (50, 99))
        said += f", faults take {half} (p50), {most} (p99)"
    return said


def headline(trace: Trace, found: Sequence[Group], most: int = 3) -> str:
    """Say what the busiest objects did: the title of a report."""
    if not found:
        return "Nothing was recorded"
    busy = activity(trace)

    def weight(group: Group) -> tuple[int, int]:
        return sum(busy[one.id] for one in group.objects), group.first.nbytes

    said: dict[str, list[str]] = {}
    for group in sorted(found, key=weight, reverse=True):
        said.setdefault(finding(trace, group), []).append(group.label)
        if len(said) == most:
            break
    return "; ".join(f"{_some(labels)}: {what}" for what, labels in said.items())


def _some(labels: list[str]) -> str:
    if len(labels) > _MOST_NAMES:
        return f"{', '.join(labels[: _MOST_NAMES - 1])} and {len(labels) - _MOST_NAMES + 1} others"
    return listed(labels)
