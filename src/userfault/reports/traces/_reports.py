"""The four reports: from a trace to a title and panels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault._trace import working_set
from userfault.reports._text import format_duration
from userfault.reports.traces._findings import headline
from userfault.reports.traces._heat import AnyKind, Canvas, heat_map
from userfault.reports.traces._objects import Choice, Group, choose, groups
from userfault.reports.traces._panels import Note, Report, middles
from userfault.reports.traces._table import table_panels
from userfault.reports.traces._timeline import resident_chart, timeline_panels
from userfault.reports.traces._words import format_share, plural
from userfault.reports.traces._working_sets import by_number, usual_windows, working_set_panels
from userfault.sizes import format_count, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from userfault._trace import Trace

__all__ = ["heatmap", "table", "timeline", "wss"]

# Intervals that differ by less are as they were asked for.
_SLOWER = 1.3
# As for JSON.
_CANVAS = Canvas(200, 128, least=8, grow_to=1 << 16)


def heatmap(
    trace: Trace, canvas: Canvas = _CANVAS, *, objects: Sequence[str] = (), kind: AnyKind = None
) -> Report:
    """Draw time × address × heat.

    Args:
        trace: What was recorded.
        canvas: How many cells there are.
        objects: Names of the objects to show, or patterns; all that have room, if there are none.
        kind: What counts as heat; by default all that was recorded, with reads and writes apart.

    Raises:
        RangeError: The trace has no object of that name.
    """
    found = groups(trace, objects)
    able, unable = _able(found, kind)
    choice = choose(trace, able, canvas.most, all_of_them=bool(objects))
    shown = choice.shown
    more = _left_out(choice)
    if unable:
        more.append(Note(f"Left out, as it is not known of them what was {_WORDS[kind]}: {_names(unable)}"))
    return Report(
        "heatmap", headline(trace, shown), subtitle(trace), (heat_map(trace, shown, canvas, kind),),
        (*notes(trace), *more),
    )  # fmt: skip


_WORDS: dict[AnyKind, str] = {"accessed": "read", "written": "written", "read_only": "only read"}


def _able(found: Sequence[Group], kind: AnyKind) -> tuple[list[Group], list[Group]]:
    """Part the groups into those of which this kind is known, and the others."""
    able: list[Group] = []
    unable: list[Group] = []
    for group in found:
        known = kind is None or group.first.watched == "faults"
        known = known or (kind == "accessed" and group.tells_reads)
        known = known or (kind == "written" and group.tells_writes)
        known = known or (kind == "read_only" and group.tells_reads and group.tells_writes)
        (able if known else unable).append(group)
    return able, unable


def _names(found: Sequence[Group]) -> str:
    return _listing([group.label for group in found])


def _listing(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} others" if len(names) > most else "")


def subtitle(trace: Trace) -> str:
    """Say of what and for how long."""
    total = sum(one.nbytes for one in trace.objects)
    facts = [
        _command(trace.about.get("command", "")),
        f"{format_duration(trace.duration_ns)}, {plural(len(trace.objects), 'object')} of {format_size(total)}",
    ]
    return ": ".join(fact for fact in facts if fact)


def _command(command: object) -> str:
    words = [str(word) for word in command] if isinstance(command, list | tuple) else str(command).split(" ")
    # Where a program lies says little, and takes much room.
    return " ".join(word.rpartition("/")[2] if word.startswith("/") else word for word in words)


def notes(trace: Trace) -> tuple[Note, ...]:
    """Say what limits a report, and what the recording cost."""
    found = []
    if not trace.complete:
        found.append(
            Note("INCOMPLETE: the program ended before the trace was closed, or the file was cut", loud=True)
        )
    if trace.lost:
        found.append(
            Note(f"{plural(trace.lost, 'event')} LOST: counts of loads and evictions are too low", loud=True)
        )
    if not trace.objects:
        found.append(Note("The trace has no objects: nothing was watched", loud=True))
    cost = trace.cost
    if cost.wall_ns and trace.complete:
        said = f"Recording took {format_share(cost.share)} of one CPU"
        if cost.samples:
            said += f" in {plural(cost.samples, 'sample')}"
        if cost.traps:
            said += f", and {format_count(cost.traps)} more page faults in the program"
        found.append(Note(said))
    every, used = trace.about.get("every"), trace.about.get("every_used")
    if every and used and used > _SLOWER * every:
        asked, got = format_duration(every * 1e9), format_duration(used * 1e9)
        why = "to stay within the budget of the recording"
        if not trace.about.get("held_back", True):
            why = "as the recorder did not come to look: the program held the GIL, or CPUs were busy"
        found.append(Note(f"Looks are {got} apart instead of {asked}, {why}"))
    return (*found, *(Note(text) for text in _of_objects(trace)))


def _of_objects(trace: Trace) -> list[str]:
    """Return how objects were watched, and the recorder's notes on them, each once for all that it is about."""
    how = {"writes": "Writes", "accesses": "Reads and writes", "faults": "Loads and evictions"}
    said: dict[str, None] = {}
    for one in trace.objects:
        by = f" by {one.method}" if one.method and one.watched != "faults" else ""
        said[f"{how[one.watched]} recorded{by}, in units of {format_size(one.granularity)}"] = None
    names = {one.name for one in trace.objects}
    about: dict[str, list[str]] = {}
    for note in trace.about.get("notes", ()):
        name, _, text = str(note).partition(": ")
        about.setdefault(text, []).append(name) if name in names else said.setdefault(str(note))
    return [*said, *(f"{_listing(those)}: {text}" for text, those in about.items())]


def timeline(trace: Trace, *, objects: Sequence[str] = (), bins: int = 200, most: int = 12) -> Report:
    """Show what happened when: bytes touched by object, events of paged memories, how long faults took.

    Args:
        trace: What was recorded.
        objects: Names of the objects to show, or patterns.
        bins: Into how many parts the time is divided.
        most: Objects that are shown, those in which most happened.

    Raises:
        RangeError: The trace has no object of that name.
    """
    found = groups(trace, objects)
    choice = choose(trace, found, most, all_of_them=bool(objects))
    shown = choice.shown
    return Report(
        "timeline", headline(trace, shown), subtitle(trace), timeline_panels(trace, shown, bins),
        (*notes(trace), *_left_out(choice)),
    )  # fmt: skip


def wss(
    trace: Trace,
    *,
    objects: Sequence[str] = (),
    kind: AnyKind = None,
    windows: Sequence[float] = (),
    bins: int = 200,
) -> Report:
    """Show the working set: bytes touched within a window, as percentiles, over time, and by object.

    Args:
        trace: What was recorded.
        objects: Names of the objects that count, or patterns.
        kind: What counts as a touch.
        windows: Lengths in seconds; by default one look, ten looks and all of the time.
        bins: Into how many parts the time is divided.

    Raises:
        RangeError: The trace has no object of that name, or a window has no length.
    """
    found = groups(trace, objects)
    sampled = [group for group in found if group.first.watched != "faults"]
    able, unable = _able(sampled, kind)
    more = []
    if len(sampled) < len(found):
        more.append(
            Note(
                "Of paged memories only loads are known, not touches: what was resident stands for their working set"
            )
        )
    if unable:
        more.append(Note(f"Left out, as it is not known of them what was {_WORDS[kind]}: {_names(unable)}"))
    paged = [group for group in found if group.first.watched == "faults"]
    at = middles(trace.duration_ns / 1e9, bins)
    resident = tuple(resident_chart(trace, group, at) for group in paged)
    if not able or not len(trace.samples):
        title = resident[0].title if resident else "No touches were recorded"
        return Report("wss", title, subtitle(trace), resident, (*notes(trace), *more))
    panels, title = working_set_panels(trace, able, windows or usual_windows(trace), kind, bins)
    return Report("wss", title, subtitle(trace), (*panels, *resident), (*notes(trace), *more))


def table(
    trace: Trace, *, objects: Sequence[str] = (), window: float | None = None, most: int = 50
) -> Report:
    """List objects in numbers, and their hot and cold parts.

    Args:
        trace: What was recorded.
        objects: Names of the objects to list, or patterns.
        window: For what is touched at a time, in seconds; by default the time between two looks.
        most: Objects that are listed, those in which most happened.

    Raises:
        RangeError: The trace has no object of that name, or the window has no length.
    """
    found = groups(trace, objects)
    choice = choose(trace, found, most, all_of_them=bool(objects))
    shown = choice.shown
    ids = [number for group in shown if group.first.watched != "faults" for number in group.ids]
    sets = {window or 0.0: working_set(by_number(trace), window, objects=ids)} if ids else {}
    panels = table_panels(trace, shown, sets) if shown else ()
    more = _left_out(choice)
    if ids:
        within = f"within {format_duration(window * 1e9)}" if window else "between two looks"
        more.append(
            Note(
                f"Heat: share of the time in which a page was touched, mean of all pages; at a time: {within}"
            )
        )
    return Report("table", headline(trace, shown), subtitle(trace), panels, (*notes(trace), *more))


def _left_out(choice: Choice) -> list[Note]:
    said = []
    if choice.crowded:
        said.append(f"{plural(choice.crowded, 'object')} more, in which less happened")
    if choice.quiet:
        said.append(
            f"{plural(choice.quiet, 'object')} of {format_size(choice.quiet_bytes)} in which nothing happened"
        )
    return [Note(f"Left out: {one} (--object chooses)") for one in said]
