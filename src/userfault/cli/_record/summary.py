"""What `userfault record` says at the end."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from userfault.cli._output import error_console
from userfault.sizes import format_count, format_size

if TYPE_CHECKING:
    from pathlib import Path

    from userfault._trace import Trace

__all__ = ["Summary", "counted"]

_MOST_NAMES, _MOST_NOTES = 6, 5


@dataclass(frozen=True, slots=True)
class Summary:
    """A recording in a few lines.

    Attributes:
        path: The trace.
        trace: What is in it.
        notes: What else the reader must know, in sentences.
    """

    path: Path
    trace: Trace
    notes: tuple[str, ...] = ()

    def print(self, *, as_json: bool) -> None:
        """Print it on stderr, or as one line of JSON on stdout: stdout is the program's."""
        if as_json:
            print(json.dumps(self.as_dict(), ensure_ascii=False), flush=True)
            return
        console = error_console()
        for line in self.lines():
            console.print(line, soft_wrap=True)

    def lines(self) -> list[str]:
        """Return it for people."""
        trace, cost = self.trace, self.trace.cost
        path = _short(self.path)
        lines = [
            f"userfault: {_objects(trace)} in {counted(cost.samples, 'sample')} over"
            f" {trace.duration_ns / 1e9:.1f} s{_lost(trace)}",
            f"  cost: {cost.share:.1%} of one CPU, {counted(cost.traps, 'page fault')} more",
            f"  trace: {path} ({format_size(os.path.getsize(self.path))})",
        ]
        lines += [f"  note: {note}" for note in self.notes[:_MOST_NOTES]]
        if len(self.notes) > _MOST_NOTES:
            lines.append(f"  and {len(self.notes) - _MOST_NOTES} notes more (--json has all)")
        if trace.objects:
            lines.append(f"  next: userfault report heatmap {shlex.quote(path)}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return it for programs."""
        trace, cost = self.trace, self.trace.cost
        return {
            "path": str(self.path),
            "objects": [
                {
                    "name": one.name,
                    "nbytes": one.nbytes,
                    "dtype": one.dtype,
                    "shape": list(one.shape),
                    "site": one.site,
                    "watched": one.watched,
                    "method": one.method,
                    "granularity": one.granularity,
                }
                for one in trace.objects
            ],
            "samples": cost.samples,
            "seconds": trace.duration_ns / 1e9,
            "cpu_share": cost.share,
            "traps": cost.traps,
            "lost": trace.lost,
            "notes": list(self.notes),
        }


def _objects(trace: Trace) -> str:
    count = len(trace.objects)
    if not count:
        return "no large arrays"
    largest = sorted(trace.objects, key=lambda one: -one.nbytes)
    names = ", ".join(one.name for one in largest[:_MOST_NAMES])
    rest = f" and {count - _MOST_NAMES} more" if count > _MOST_NAMES else ""
    size = format_size(sum(one.nbytes for one in trace.objects))
    return f"{counted(count, 'array')} of {size} ({names}{rest})"


def _lost(trace: Trace) -> str:
    return f", {counted(trace.lost, 'event')} lost" if trace.lost else ", nothing lost"


def counted(count: int, noun: str) -> str:
    """Return "1 array", "2 arrays"."""
    return f"{format_count(count)} {noun if count == 1 else noun + 's'}"


def _short(path: Path) -> str:
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # the program has removed it
        return str(path)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
