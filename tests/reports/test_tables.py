"""Tables, as the text that people see."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from reports import examples
from userfault.reports import format_duration
from userfault.reports.tables import facts_table, run_table


def text(table: Table, width: int = 100) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    return output.getvalue()


def test_runs_say_what_was_read_and_whether_it_was_right() -> None:
    printed = text(run_table(examples.run()))
    for expected in (
        "look-ups",
        "1.5 s",
        "750 ms",
        "1.5 µs / 2.5 ms",
        "1 MiB (0.0%)",
        "3 MiB",
        "400",
        "same as zarr",
    ):
        assert expected in printed
    assert printed.rstrip().endswith("yes")


def test_wrong_results_are_loud() -> None:
    assert text(run_table(examples.run(checked=False))).rstrip().endswith("NO")
    assert not examples.run(checked=False).checked


def test_facts_keep_long_values() -> None:
    printed = text(facts_table({"codecs": "x" * 150, "shape": "1 × [2]"}), width=80)
    assert printed.count("x") == 150
    assert "1 × [2]" in printed


@pytest.mark.parametrize(
    ("nanoseconds", "expected"),
    [(0, "0 ns"), (999, "999 ns"), (1000, "1 µs"), (1_234_567, "1.23 ms"), (61e9, "61 s")],
)
def test_durations(nanoseconds: float, expected: str) -> None:
    assert format_duration(nanoseconds) == expected
