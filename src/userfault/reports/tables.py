"""Tables for the terminal. Each function takes plain data and returns a Rich table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from userfault.errors import MissingExtraError
from userfault.reports._text import format_duration
from userfault.sizes import format_count, format_rate, format_size

try:
    from rich import box
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise MissingExtraError.for_module("rich", "cli", "printing tables") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from userfault.reports._run import PhaseReport, RunReport

__all__ = ["facts_table", "run_table"]


_SMALL_STEP: Final = 1024


def facts_table(facts: Mapping[str, str]) -> Table:
    """List names and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    return table


def run_table(run: RunReport) -> Table:
    """Tell what each part of a run did, one column per part."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for phase in run.phases:
        table.add_column(phase.name, justify="right", no_wrap=True)
    rows: list[tuple[str, Callable[[PhaseReport], str]]] = [
        ("steps", lambda p: format_count(p.steps)),
        ("time", lambda p: format_duration(p.seconds * 1e9)),
        (f"time with {run.reference} alone", _reference_time),
        (
            "one step, p50 / p99",
            lambda p: f"{format_duration(p.step_p50_ns)} / {format_duration(p.step_p99_ns)}",
        ),
        ("elements used", lambda p: format_size(p.asked_bytes)),
        ("blocks touched", lambda p: f"{format_size(p.touched_bytes)} ({p.touched_bytes / run.nbytes:.1%})"),
        ("read from the source", lambda p: format_size(p.read_bytes)),
        ("throughput", _throughput),
        ("faults waited for", lambda p: format_count(p.faults)),
        ("blocks on demand", lambda p: format_count(p.blocks_demand)),
        ("blocks ahead", lambda p: format_count(p.blocks_ahead)),
        ("blocks evicted", lambda p: format_count(p.evictions)),
    ]
    for name, value in rows:
        table.add_row(name, *(value(phase) for phase in run.phases))
    table.add_row(f"same as {run.reference}", *(_verdict(phase) for phase in run.phases))
    return table


def _reference_time(phase: PhaseReport) -> str:
    return "" if phase.reference_seconds is None else format_duration(phase.reference_seconds * 1e9)


def _throughput(phase: PhaseReport) -> str:
    seconds = max(phase.seconds, 1e-9)
    # Of single elements, bytes say nothing.
    if phase.asked_bytes < phase.steps * _SMALL_STEP:
        return f"{format_count(round(phase.steps / seconds))} a second"
    return format_rate(phase.asked_bytes / seconds)


def _verdict(phase: PhaseReport) -> Text:
    if phase.checked is None:
        return Text("not checked", style="dim")
    return Text("yes", style="green") if phase.checked else Text("NO", style="bold red")
