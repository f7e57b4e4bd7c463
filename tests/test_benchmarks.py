"""The benchmarks run and give figures. No test asserts a time: that depends on the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.processes import run_python

ROOT = Path(__file__).parent.parent
PROGRAM = "import sys; from benchmarks.__main__ import main; sys.exit(main(sys.argv[1:]))"


GROUPS = [
    "faults", "delivery", "writing", "workers", "tracking", "tracking_accesses", "recording", "replay", "scans",
    "lookups", "replacement", "startup", "peers", "kernel",
]  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_every_row_of_a_group_gives_figures(group: str, tmp_path: Path) -> None:
    result = tmp_path / "rows.json"
    arguments = ["--quick", "--data", str(tmp_path / "data"), "--json", str(result), group]
    done = run_python(PROGRAM, timeout_s=100, arguments=arguments, cwd=ROOT)
    text = done.check()
    report = json.loads(result.read_text())
    assert {"cpu", "kernel", "page size", "numpy"} <= set(report["machine"])
    assert report["rows"]
    for row in report["rows"]:
        assert row["name"].startswith(f"{group}/")
        assert row["name"] in text
        assert row["verdict"] in ("ok", "MISSED", "-")
        assert all(figure > 0 for figure in (*row["userfault"], *row["reference"]))
        assert row["pinning"]
        assert row["source"]


def test_rows_are_chosen_by_name(tmp_path: Path) -> None:
    arguments = ["--quick", "--list", "--data", str(tmp_path), "faults/fill-*"]
    names = run_python(PROGRAM, arguments=arguments, cwd=ROOT).check().split()
    assert names
    assert all(name.startswith("faults/fill-") for name in names)


def test_a_name_without_rows_is_an_error(tmp_path: Path) -> None:
    done = run_python(PROGRAM, arguments=["--quick", "--data", str(tmp_path), "faults/none"], cwd=ROOT)
    assert done.returncode == 2
    assert "no row is called faults/none" in done.stderr


def test_a_side_that_fails_is_a_failed_row_with_its_reason(tmp_path: Path) -> None:
    program = """
    from benchmarks.harness import Comparison, Reference, Side, run
    from benchmarks.table import line

    def side(value, check):
        return Side("benchmarks.faults:bare", {"command": ["echo", f'{{"value": {value}}}'], "scale_by": 1.0})

    broken = Side("benchmarks.faults:bare", {"command": ["false"], "scale_by": 1.0})
    references = (Reference("ok", side(1, 0)), Reference("no", broken))
    for row in run("g", Comparison("c", "s", side(2, 0), references, "source"), 2):
        print(row.verdict, row.ratio, row.failure)
    """
    first, second = run_python(program, cwd=ROOT).check().splitlines()
    assert first == "- 2.0 None"
    assert second.startswith("FAILED None reference: ")


def test_a_target_may_be_of_the_figure_itself_and_a_reference_run_elsewhere() -> None:
    program = """
    from benchmarks.harness import Comparison, Reference, Side, at_most, figure_at_most, run

    def side(value):
        return Side("benchmarks.faults:bare", {"command": ["echo", f'{{"value": {value}}}'], "scale_by": 1.0})

    references = (
        Reference("ratio", side(1), at_most(100), "on another CPU"),
        Reference("met", side(1), figure_at_most(100, "ms")),
        Reference("missed", side(1000), figure_at_most(50, "ms")),
    )
    for row in run("g", Comparison("c", "ms", side(99), references, "source", one_cpu=True), 1):
        print(row.verdict, row.target, row.pinning, sep="; ")
    """
    assert run_python(program, cwd=ROOT).check().splitlines() == [
        "ok; ≤ 100; all on one CPU; reference: on another CPU",
        "ok; ≤ 100 ms; all on one CPU",
        "MISSED; ≤ 50 ms; all on one CPU",
    ]
