"""Which objects a report shows, and which of them share a place in it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import numpy as np

from userfault.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from userfault._trace import Trace, TracedObject

__all__ = ["Choice", "Group", "activity", "choose", "groups"]

# The recorder numbers objects of one name: "own (2)".
_NUMBERED: Final = re.compile(r" \(\d+\)$|#\d+$")
# Temporaries of a loop need not be of exactly one size.
_ALIKE: Final = 0.1
# So few objects are shown even if nothing happened in them, and those that are this share of all bytes.
_FEW: Final = 6
_LARGE: Final = 0.05


@dataclass(frozen=True)
class Group:
    """An object, or several of one name and about one size that were there one after another: temporaries of a loop.

    Attributes:
        objects: By the time they appeared; all alike.
        label: What it is called in a report.
    """

    objects: tuple[TracedObject, ...]
    label: str

    @property
    def first(self) -> TracedObject:
        """The one that stands for all."""
        return self.objects[0]

    @property
    def ids(self) -> list[int]:
        """Their numbers in the trace."""
        return [one.id for one in self.objects]

    @property
    def tells_reads(self) -> bool:
        """Whether reads were recorded."""
        return self.first.watched == "accesses"

    @property
    def tells_writes(self) -> bool:
        """Whether it is known what was written."""
        return self.first.watched != "faults" and self.first.tells_writes

    @property
    def about(self) -> str:
        """Size, type, shape, and where it was made, on one line."""
        first = self.first
        kind = f"{_type_name(first.dtype)}[{', '.join(map(str, first.shape))}]" if first.shape else ""
        facts = [format_size(first.nbytes), kind, first.site, first.source]
        return ", ".join(fact for fact in facts if fact)

    def lives(self, trace: Trace) -> tuple[tuple[float, float], ...]:
        """When its objects were there and looked at, in seconds."""
        ids, firsts = np.unique(trace.samples["object"], return_index=True)
        # What happened before the first look begins is not known: it must not pass for nothing.
        begun = dict(zip(ids.tolist(), trace.samples["start_ns"][firsts].tolist(), strict=True))
        lives = []
        for one in self.objects:
            start = one.born_ns if one.watched == "faults" else begun.get(one.id)
            end = trace.duration_ns if one.died_ns is None else one.died_ns
            if start is not None:
                lives.append((start / 1e9, max(start, end) / 1e9))
        return tuple(lives)


def groups(trace: Trace, names: Sequence[str] = ()) -> tuple[Group, ...]:
    """Group a trace's objects, in the order in which they appeared.

    Args:
        trace: What was recorded.
        names: Only these objects: names, or patterns such as "tmp*". All, if there are none.

    Raises:
        RangeError: The trace has no object of a name.
    """
    alike: dict[tuple[object, ...], list[list[TracedObject]]] = {}
    for one in sorted(_wanted(trace, names), key=lambda candidate: (candidate.born_ns, candidate.id)):
        key = _NUMBERED.sub("", one.name), one.site, one.granularity, one.watched, one.method, one.dtype
        rows = alike.setdefault(key, [])
        for row in rows:
            if _follows(row[0], row[-1], one):
                row.append(one)
                break
        else:
            rows.append([one])
    found = sorted(
        (row for rows in alike.values() for row in rows), key=lambda row: (row[0].born_ns, row[0].id)
    )
    labels = [_label(row) for row in found]
    seen = Counter(labels)
    return tuple(
        Group(tuple(row), label if seen[label] == 1 else f"{label} #{row[0].id}")
        for row, label in zip(found, labels, strict=True)
    )


def _label(row: list[TracedObject]) -> str:
    name = row[0].name or f"object {row[0].id}"
    return name if len(row) == 1 else f"{_NUMBERED.sub('', name)} ×{len(row)}"


def _follows(first: TracedObject, last: TracedObject, one: TracedObject) -> bool:
    """Whether an object may take the place of one that is gone: about as large, and not there at the same time."""
    if last.died_ns is None or last.died_ns > one.born_ns:
        return False
    return abs(one.nbytes - first.nbytes) <= _ALIKE * first.nbytes


def _wanted(trace: Trace, names: Sequence[str]) -> list[TracedObject]:
    if not names:
        return list(trace.objects)
    wanted: set[int] = set()
    for name in names:
        exact = [one.id for one in trace.objects if one.name == name]
        found = exact or [one.id for one in trace.objects if fnmatchcase(one.name, name)]
        wanted.update(found or [trace.object(name).id])  # which raises, and says what there is
    return [one for one in trace.objects if one.id in wanted]


def _type_name(dtype: str) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


def activity(trace: Trace) -> dict[int, int]:
    """Return, by object, how many bytes were touched or loaded, as often as they were."""
    ends = np.concatenate(([0], np.cumsum(trace.runs["count"].astype(np.int64))))
    first = trace.samples["first"].astype(np.int64)
    pages = ends[first + trace.samples["runs"]] - ends[first]
    size = max((one.id for one in trace.objects), default=-1) + 1
    total = np.bincount(trace.samples["object"], pages, size)
    total += np.bincount(trace.events["object"], minlength=size)
    return {one.id: int(total[one.id]) * one.granularity for one in trace.objects}


@dataclass(frozen=True)
class Choice:
    """What a report shows.

    Attributes:
        shown: In the order in which they appeared.
        crowded: How many more there are in which something happened, but less.
        quiet: In how many nothing happened.
        quiet_bytes: The bytes of these.
    """

    shown: tuple[Group, ...]
    crowded: int = 0
    quiet: int = 0
    quiet_bytes: int = 0


def choose(trace: Trace, found: Sequence[Group], most: int, *, all_of_them: bool = False) -> Choice:
    """Choose the groups in which most happened, at most `most`.

    Those in which nothing happened are shown where there are few, and where they are large: that says something, too.
    """
    busy = activity(trace)
    weight = {id(group): sum(busy[one.id] for one in group.objects) for group in found}
    total = sum(group.first.nbytes for group in found)

    def speaks(group: Group) -> bool:
        return weight[id(group)] > 0 or group.first.nbytes >= _LARGE * total

    kept = [group for group in found if all_of_them or len(found) <= _FEW or speaks(group)]
    ranked = sorted(kept, key=lambda group: (weight[id(group)], group.first.nbytes), reverse=True)
    chosen = {id(group) for group in ranked[:most]}
    kept_ids = {id(group) for group in kept}
    quiet = [group for group in found if id(group) not in kept_ids]
    return Choice(
        tuple(group for group in found if id(group) in chosen),
        max(len(kept) - most, 0),
        sum(len(group.objects) for group in quiet),
        sum(one.nbytes for group in quiet for one in group.objects),
    )
