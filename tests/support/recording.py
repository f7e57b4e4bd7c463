"""Programs under `userfault record`, and what their traces have."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from support.cli import run_cli
from support.processes import Finished
from userfault.track import Trace, methods, read_trace

__all__ = ["LOOKS", "pages_of", "record", "untold", "write_program"]

# What a program that is recorded begins with, to wait until the recorder has looked so often. A process that it spawns
# has no recorder.
LOOKS = """
import time
from userfault.track._running import running
recorder = next(iter(running), None)
def wait(count):
    end = recorder.cost.samples + count
    while recorder.cost.samples < end:
        time.sleep(0.001)
def wait_for(name):
    end = time.monotonic() + 20
    while name not in recorder.names and time.monotonic() < end:
        wait(1)
"""


def untold() -> bool:
    """Return whether this kernel does not tell which pages are written."""
    return not any(found.name == "wp-async" and found.available for found in methods())


def write_program(folder: Path, code: str, name: str = "program.py") -> str:
    """Write a program, which may be indented as the test that holds it, and return its path."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return str(path)


def record(*arguments: str, folder: Path) -> tuple[Finished, dict[str, Any], Trace]:
    """Record a program in a folder, and return how it ended, the summary, and the trace."""
    finished = run_cli("record", "--json", "--every", "0.02", *arguments, cwd=folder)
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert not any("looking for arrays failed" in note for note in summary["notes"]), summary["notes"]
    return finished, summary, read_trace(summary["path"])


def pages_of(trace: Trace, name: str) -> set[int]:
    """Return the pages of an object that were touched at any time."""
    number = trace.object(name).id
    found: set[int] = set()
    for sample in trace.samples:
        if sample["object"] == number:
            for run in trace.runs[sample["first"] : sample["first"] + sample["runs"]]:
                found.update(range(run["page"], run["page"] + run["count"]))
    return found
