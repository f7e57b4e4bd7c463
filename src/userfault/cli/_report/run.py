"""From a trace file to a report where it is wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from userfault._trace import read_trace
from userfault.cli._output import UsageError, print_json, table_console
from userfault.errors import UserfaultError
from userfault.reports.traces import SUFFIXES, canvas_of, canvas_of_console, save, show

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from userfault._trace import Trace
    from userfault.reports.traces import Canvas, Report

__all__ = ["Target", "deliver", "parse_window"]

_SECONDS: Final = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a report goes.

    Attributes:
        path: The file, None for the terminal.
        width: Columns or pixels, None for what is usual there.
        height: Lines or pixels, likewise.
        force: Whether a file that is there may be overwritten.
        as_json: Whether the numbers are printed instead.
    """

    path: Path | None
    width: int | None
    height: int | None
    force: bool
    as_json: bool


def deliver(source: Path, make: Callable[[Trace, Canvas], Report], target: Target) -> None:
    """Read a trace, make a report of it, and print or write that.

    Raises:
        UsageError: The options do not fit together.
        UserfaultError: The trace cannot be read, or the file not be written.
    """
    _check(target)
    try:
        trace = read_trace(source)
    except OSError as error:
        raise UserfaultError(f"{source} cannot be read: {error.strerror or error}") from error
    size = {"width": target.width, "height": target.height}
    console = table_console()
    if target.as_json:
        print_json(make(trace, canvas_of("report.json", **size)).as_dict(), indent=None)
    elif target.path is None:
        show(make(trace, canvas_of_console(console, **size)), console, **size)
    else:
        report = make(trace, canvas_of(target.path, **size))
        try:
            save(report, target.path, width=target.width)
        except OSError as error:
            raise UserfaultError(f"{target.path} cannot be written: {error.strerror or error}") from error
        print(report.title)
        for note in report.notes:
            if note.loud:
                print(note.text)
        print(f"report: {target.path}")


def _check(target: Target) -> None:
    path = target.path
    if path is None:
        return
    if target.as_json:
        raise UsageError(
            f"--json prints, and --output {path} writes: give one of them (-o report.json writes JSON)"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--output {path}: a report ends in {', '.join(SUFFIXES)}")
    if path.exists() and not target.force:
        raise UserfaultError(f"{path} exists; add --force to overwrite it")
    if not path.parent.is_dir():
        raise UserfaultError(f"{path}: there is no folder {path.parent}")


def parse_window(text: str) -> float:
    """Return the seconds that a text such as "100ms" means.

    Raises:
        UsageError: It is no length of time, or 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zµ]*)\s*", text)
    if match is None or match[2] not in _SECONDS or not float(match[1]):
        raise UsageError(f"--window {text!r}: give a length of time, such as 1s, 100ms or 2min")
    return float(match[1]) * _SECONDS[match[2]]
