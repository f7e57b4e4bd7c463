"""What a running process's memories do, for `userfault watch`: from the documents it sends to something Rich prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from userfault.errors import MissingExtraError
from userfault.reports._text import format_duration
from userfault.sizes import format_count, format_size
from userfault.stats import Histogram

try:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise MissingExtraError.for_module("rich", "cli", "printing tables") from error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Activity", "processes_table", "watch_view"]

_BUCKETS: Final = 160
_STAGES: Final = ("fault", "source", "write")
_MORE_STAGES: Final = ("queue", "install")
# Columns are as wide as what can come to stand in them; names take what is left, at least this much.
_TRAFFIC, _LATENCY, _LEAST_NAME = 16, 25, 15
_LINES_PER_MEMORY: Final = 4
_MOST_ERRORS: Final = 3
# The wide one has room for what is dirty and what is spilled.
_BAR, _BAR_WIDE = 18, 32
_FULL, _EMPTY = "━", "╌"


@dataclass(frozen=True, slots=True)
class Activity:
    """What a memory did between two documents.

    Attributes:
        seconds: Time between them; 0 if there is no earlier one: then everything counts since it was opened.
        faults: Page faults, those on clean blocks that were written to included.
        read: Bytes read from the source.
        written: Bytes written back.
        latency: Histograms by stage.
    """

    seconds: float
    faults: int
    read: int
    written: int
    latency: Mapping[str, Histogram]

    @classmethod
    def between(
        cls, memory: Mapping[str, Any], earlier: Mapping[str, Any] | None, seconds: float
    ) -> Activity:
        """Compare a memory with what it was `seconds` before."""
        # Smaller counters: another memory, which has the name and place of the earlier one.
        if (
            earlier is None
            or earlier["faults"] > memory["faults"]
            or earlier["bytes_read"] > memory["bytes_read"]
        ):
            earlier, seconds = None, 0.0

        def grown(*names: str) -> int:
            return sum(memory[name] - (earlier[name] if earlier else 0) for name in names)

        latency = {
            stage: _histogram(now, earlier["latency"].get(stage) if earlier else None)
            for stage, now in memory["latency"].items()
        }
        return cls(seconds, grown("faults", "upgrades"), grown("bytes_read"), grown("bytes_written"), latency)

    def per_second(self, count: int) -> float | None:
        """Return a count as a rate, None without an earlier document."""
        return count / self.seconds if self.seconds else None


def _histogram(now: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> Histogram:
    buckets = [0] * _BUCKETS
    for sign, document in ((1, now), (-1, earlier)):
        for bucket, count in document["buckets"] if document else ():
            buckets[bucket] += sign * count
    sum_ns = now["sum_ns"] - (earlier["sum_ns"] if earlier else 0)
    return Histogram(sum(buckets), sum_ns, tuple(buckets))


def watch_view(
    documents: Sequence[Mapping[str, Any]],
    *,
    command: str,
    width: int,
    height: int | None = None,
    busy_seconds: float = 0.0,
) -> Group:
    """Show the newest of a process's documents, with rates and latencies since the ones before it.

    Args:
        documents: Oldest first: rates are those since the last but one, latencies those since the oldest. With only one
            there are no rates, and latencies are those since each memory was opened.
        command: Command line of the process.
        width: Columns of the terminal.
        height: Lines of the terminal; memories that do not fit are counted only. None: all of them.
        busy_seconds: How long the process has not answered; 0 if it does.
    """
    newest = documents[-1]
    memories = newest["memories"]
    parts: list[Any] = [_head(newest, command, width), Text()]
    errors = _errors(memories)
    if memories:
        fit = len(memories)
        if height is not None:
            fit = max(1, (height - 6 - len(errors)) // _LINES_PER_MEMORY)
        shown = _largest(memories, fit)
        parts.append(_memories_table(shown, documents, width))
        if len(shown) < len(memories):
            parts.append(
                Text(f"and {len(memories) - len(shown)} smaller ones (--once and --json show all)", "dim")
            )
    else:
        parts.append(Text("No memory is open.", "dim"))
    parts += errors
    if busy_seconds:
        text = f"busy for {busy_seconds:.0f} s: it is stopped, or a thread waits for a page and holds the GIL"
        parts.append(Text(text, "bold yellow", overflow="ellipsis", no_wrap=True))
    return Group(*parts)


def _head(document: Mapping[str, Any], command: str, width: int) -> Group:
    first = Text.assemble((f"{document['pid']}", "bold"), f"  {command}", overflow="ellipsis", no_wrap=True)
    pager = document["pager"]
    if pager is None:
        return Group(first)
    resident, limit = pager["resident_bytes"] + pager["reserved_bytes"], pager["limit"]
    second = Text(no_wrap=True, overflow="ellipsis")
    second.append_text(_bar(resident, limit, min(24, width // 5)))
    second.append(f" {_of(resident, limit)} resident")
    if pager["workers_alive"] or pager["workers_lost"]:
        second.append(f"   {_counted(pager['workers_alive'], 'worker')}")
    if pager["workers_lost"]:
        second.append(f", {format_count(pager['workers_lost'])} lost", "yellow")
    return Group(first, second)


def _memories_table(
    memories: Sequence[Mapping[str, Any]], documents: Sequence[Mapping[str, Any]], width: int
) -> Table:
    columns = _columns(width, rates=len(documents) > 1)
    bar_width = columns["resident"]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    table.add_column("memory", no_wrap=True, overflow="ellipsis", ratio=1)
    for heading, column_width in columns.items():
        table.add_column(heading, no_wrap=True, width=column_width)
    for memory in memories:
        recent = Activity.between(memory, *_earlier(memory, documents, -2))
        whole = Activity.between(memory, None, 0.0)
        window = Activity.between(memory, *_earlier(memory, documents, 0))
        cells = {
            "resident": _residency(memory, bar_width),
            "a second": _traffic(recent, rates=True),
            "since opened": _traffic(whole, rates=False),
            "p50 / p99": _latencies(window, whole, _STAGES),
            "": _latencies(window, whole, _MORE_STAGES),
        }
        table.add_row(_name(memory), *(cells[heading] for heading in columns))
        if memory is not memories[-1]:
            table.add_row()
    return table


def _columns(width: int, *, rates: bool) -> dict[str, int]:
    """Choose the columns behind the name: heading and width. There are more of them where there is room."""
    columns = {"resident": _BAR}
    if rates:
        columns["a second"] = _TRAFFIC
    columns["since opened"] = _TRAFFIC
    columns["p50 / p99"] = _LATENCY
    columns[""] = _LATENCY

    def room() -> int:
        return width - _LEAST_NAME - sum(column + 1 for column in columns.values())

    if room() < 0:
        del columns[""]
    if rates and room() < 0:
        del columns["since opened"]
    columns["resident"] = min(_BAR_WIDE, _BAR + max(0, room() * 3 // 4))
    return columns


def _earlier(
    memory: Mapping[str, Any], documents: Sequence[Mapping[str, Any]], index: int
) -> tuple[Mapping[str, Any] | None, float]:
    """Find the memory in the document at `index`, or the first after it that has it, and the time since then."""
    newest = documents[-1]
    start = index if index >= 0 else max(0, len(documents) + index)
    for document in documents[start:-1]:
        for candidate in document["memories"]:
            if _key(candidate) == _key(memory):
                return candidate, (newest["time_ns"] - document["time_ns"]) / 1e9
    return None, 0.0


def _key(memory: Mapping[str, Any]) -> tuple[str, str, int]:
    return memory["name"], memory["id"], memory["nbytes"]


def _largest(memories: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    kept = sorted(memories, key=lambda memory: -memory["resident_bytes"])[:most]
    return [memory for memory in memories if memory in kept]


def _name(memory: Mapping[str, Any]) -> Text:
    text = Text()
    if memory["id"]:
        # In front: the end of a long name is cut off.
        text.append(f"#{memory['id']} ")
    text.append(memory["name"], "bold cyan")
    text.append(f"\n{format_size(memory['nbytes'])}", "none")
    if memory["mode"] != "r":
        text.append(f", {memory['mode']}")
    text.append("\n")
    failed = memory["error_count"] + memory["write_errors"]
    if memory["poisoned_blocks"]:
        text.append(_counted(memory["poisoned_blocks"], "bad block"), "bold red")
    elif failed:
        text.append(_counted(failed, "error"), "bold red")
    elif memory["retries"]:
        text.append(f"{format_count(memory['retries'])} tried again", "yellow")
    return text


def _residency(memory: Mapping[str, Any], width: int) -> Text:
    blocks = -(-memory["nbytes"] // memory["block"])
    resident, most = memory["resident_bytes"], min(memory["budget"], blocks * memory["block"]) or 1
    text = _bar(resident, most, width)
    text.append(f"\n{_of(resident, most)}\n")
    dirty, spilled = memory["dirty_bytes"], memory["scratch_bytes"]
    if dirty:
        text.append(f"{format_size(dirty)} dirty", "magenta")
    if spilled:
        said = f"{', ' if dirty else ''}{format_size(spilled)} spilled"
        # Where there is no room for both, what could be lost goes first.
        if len(text.plain.rpartition("\n")[2]) + len(said) <= width:
            text.append(said)
    return text


def _bar(part: int, whole: int, width: int) -> Text:
    filled = min(width, round(width * part / whole)) if whole else 0
    # Something is not nothing.
    filled = max(filled, 1) if part else 0
    return Text.assemble((_FULL * filled, "green"), (_EMPTY * (width - filled), "dim"))


def _of(part: int, whole: int) -> str:
    """Write "12 of 64 MiB", with the unit once where it is the same."""
    small, large = format_size(part), format_size(whole)
    value, _, unit = small.partition(" ")
    return f"{value if unit == large.partition(' ')[2] or not part else small} of {large}"


def _traffic(activity: Activity, *, rates: bool) -> Text:
    text = Text()
    for count, word in ((activity.faults, "faults"), (activity.read, "read"), (activity.written, "written")):
        value = activity.per_second(count) if rates else float(count)
        shown = "–" if value is None else _amount(value, word)
        text.append(f"{chr(10) if text else ''}{shown} {word}", "none" if value else "dim")
    return text


def _amount(value: float, word: str) -> str:
    if word != "faults":
        return format_size(value)
    # No more digits than the column holds.
    return format_count(round(value)) if value < 1e7 else f"{format_count(round(value / 1e6))} M"


def _latencies(window: Activity, whole: Activity, stages: Sequence[str]) -> Text:
    text = Text()
    for number, stage in enumerate(stages):
        text.append("" if number == 0 else "\n")
        recent = window.latency.get(stage)
        histogram = recent if recent and recent.count else whole.latency.get(stage)
        text.append(f"{stage:<7}", "dim")
        if histogram is None or not histogram.count:
            text.append(" –", "dim")
            continue
        values = " / ".join(format_duration(histogram.percentile(percent)) for percent in (50, 99))
        # Old news, where nothing happened lately.
        text.append(f" {values}", "none" if recent and recent.count else "dim")
    return text


def _errors(memories: Sequence[Mapping[str, Any]]) -> list[Text]:
    found = [(error["time_ns"], memory, error) for memory in memories for error in memory["errors"]]
    found.sort(key=lambda entry: entry[0])
    lines = []
    for _, memory, error in found[-_MOST_ERRORS:]:
        end = error["offset"] + error["length"]
        what = "write" if error["write"] else "read"
        line = f"{memory['name']}: {what} of bytes [{error['offset']}, {end}) failed: {error['detail']}"
        lines.append(Text(line, "red", no_wrap=True, overflow="ellipsis"))
    return [Text(), *lines] if lines else []


def _counted(count: int, word: str) -> str:
    return f"{format_count(count)} {word}{'' if count == 1 else 's'}"


def processes_table(processes: Sequence[tuple[int, str, Mapping[str, Any] | None]]) -> Table:
    """List processes by number: their memories and what is resident, or that they are busy, and their command."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("PID", justify="right", no_wrap=True)
    table.add_column("memories", justify="right", no_wrap=True)
    table.add_column("resident", justify="right", no_wrap=True)
    table.add_column("command", no_wrap=True, overflow="ellipsis")
    for pid, command, document in processes:
        if document is None:
            facts = [Text("busy", "yellow"), Text("")]
        else:
            resident = sum(memory["resident_bytes"] for memory in document["memories"])
            facts = [Text(format_count(len(document["memories"]))), Text(format_size(resident))]
        table.add_row(Text(str(pid), "bold"), *facts, Text(command))
    return table
