"""`python -m benchmarks`: measures every row, or those named, and prints the table."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

from benchmarks import machine, table
from benchmarks.harness import Comparison, Row, Scale, run

GROUPS = (
    "faults",
    "delivery",
    "writing",
    "workers",
    "tracking",
    "tracking_accesses",
    "recording",
    "replay",
    "scans",
    "lookups",
    "replacement",
    "startup",
    "peers",
    "kernel",
)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.data is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        options.data = cache / "userfault" / "benchmarks"
    options.data.mkdir(parents=True, exist_ok=True)
    scale = Scale(options.quick, options.repeats or (1 if options.quick else 5), options.data)
    if options.list:
        for group, comparison in _comparisons(scale, options.rows):
            print(
                *(f"{group}/{comparison.name}/{reference.label}" for reference in comparison.references),
                sep="\n",
            )
        return 0

    chosen = _comparisons(scale, options.rows)
    first = next(chosen, None)
    if first is None:
        print(f"no row is called {' or '.join(options.rows)}; --list prints the names", file=sys.stderr)
        return 2
    if not options.quick:
        machine.touch_free_memory(min(3 * 2**30, machine.available_memory() // 3))
    facts = machine.facts()
    print(table.head(facts), flush=True)
    rows: list[Row] = []
    last_source = ""
    for group, comparison in chain([first], chosen):
        if comparison.not_run:
            print(f"\n# {group}/{comparison.name} is not run here: it needs {comparison.not_run}")
            continue
        for row in run(group, comparison, scale.repeats, realtime=options.realtime):
            if row.source != last_source:
                print(table.source(row))
                last_source = row.source
            print(table.line(row), flush=True)
            rows.append(row)
    print(table.summary(rows))
    if options.json is not None:
        flags = [f"--{name}" for name in ("quick", "realtime") if getattr(options, name)]
        command = " ".join(["python -m benchmarks", *flags, *options.rows])
        options.json.write_text(table.as_json(facts, rows, command) + "\n")
        print(f"written: {options.json}")
    return 1 if any(row.verdict == "FAILED" for row in rows) else 0


def _comparisons(scale: Scale, patterns: list[str]) -> Iterator[tuple[str, Comparison]]:
    """Those comparisons of which some row is wanted. A group's data is made only when one of its rows is."""
    for group in GROUPS:
        if patterns and not any(pattern.split("/")[0] in (group, "*") for pattern in patterns):
            continue
        for comparison in importlib.import_module(f"benchmarks.{group}").comparisons(scale):
            wanted = tuple(
                reference
                for reference in comparison.references
                if not patterns or _matches(f"{group}/{comparison.name}/{reference.label}", patterns)
            )
            if wanted:
                yield group, replace(comparison, references=wanted)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*") for pattern in patterns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures userfault against bare C loops and peers. Ratios are userfault / reference.",
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="a group, a row, or a pattern such as 'scans/*' (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: to see that it runs, not to measure"
    )
    parser.add_argument("--repeats", type=int, help="repetitions of each side (default: 5)")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="measure ahead of all other programs (SCHED_FIFO; needs root): for short rows on a busy machine",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="where test data is kept (default: the user's cache)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
