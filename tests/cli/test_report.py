"""`userfault report`: from a trace file to the terminal, a file, or numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from support.cli import run_cli
from support.traces import matmul, stencil
from userfault._trace import write_trace
from userfault.cli._app import app
from userfault.cli._output import UsageError
from userfault.cli._report.run import parse_window


def run(*arguments: str) -> Result:
    """Run the command in this process, which is faster; output is no terminal."""
    return CliRunner().invoke(app, ["report", *arguments], env={"COLUMNS": "120"})


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "run.uft"
    write_trace(stencil(), path)
    return str(path)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("heatmap", "1-9: heat"),
        ("timeline", "a, 4 MiB: 100 % read and written each 100 ms"),
        ("wss", ", by object"),
        ("table", "Parts that were never touched"),
    ],
)
def test_each_report_in_a_terminal(trace: str, report: str, said: str) -> None:
    done = run(report, trace)
    assert done.exit_code == 0
    assert said in done.stdout
    assert "coefficients" in done.stdout
    assert "Recording took" in done.stdout
    assert done.stderr == ""


def test_it_draws_without_the_engine(trace: str) -> None:
    code = (
        "import sys; sys.modules['userfault._engine'] = None; sys.argv[0] = 'userfault';"
        "from userfault.cli import main; main()"
    )
    assert "coefficients" in run_cli("report", "table", trace, code=code).check()


def test_numbers_for_programs(trace: str) -> None:
    values = json.loads(run("heatmap", trace, "--json", "--kind", "written", "--object", "a").stdout)
    assert values["report"] == "heatmap"
    assert [strip["name"] for strip in values["panels"][0]["strips"]] == ["a"]


def test_a_file_is_written_and_named(trace: str, tmp_path: Path) -> None:
    path = str(tmp_path / "run.html")
    done = run("heatmap", trace, "-o", path, "--width", "900", "--height", "300")
    assert done.stdout.splitlines() == [
        "a and b: 100 % read and written each 100 ms; coefficients: 3 % read each 100 ms",
        f"report: {path}",
    ]
    assert "<!DOCTYPE html>" in Path(path).read_text()
    again = run("table", trace, "-o", path)
    assert again.exit_code == 1
    assert again.stderr == f"userfault: {path} exists; add --force to overwrite it\n"
    assert run("table", trace, "-o", path, "--force").exit_code == 0


def test_a_picture_and_windows(trace: str, tmp_path: Path) -> None:
    text = run_cli(
        "report", "wss", trace, "--window", "100ms", "--window", "1s", "-o", "wss.png", cwd=tmp_path
    ).check()
    assert text.startswith("Working set within 1 s: ")
    assert (tmp_path / "wss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-o", "x.bmp"], 2, "--output x.bmp: a report ends in .png, .svg, .pdf, .html, .json"),
        (["-o", "no/x.png"], 1, "no/x.png: there is no folder no"),
        (["--object", "nix"], 1, "the trace has no object 'nix'; it has 'a', 'b', 'coefficients'"),
    ],
)
def test_mistakes_are_said_in_one_line(trace: str, arguments: list[str], code: int, said: str) -> None:
    done = run("heatmap", trace, *arguments)
    assert done.exit_code == code
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_json_is_printed_or_written(trace: str) -> None:
    done = run("heatmap", trace, "-o", "x.json", "--json")
    assert done.exit_code == 2
    assert "give one of them" in json.loads(done.stdout)["error"]["message"]


def test_a_reader_that_has_enough_is_no_error(trace: str) -> None:
    code = (
        "import os, sys; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1);"
        "from userfault.cli import main; main()"
    )
    done = run_cli("report", "heatmap", trace, code=code)
    assert done.stderr == ""


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a trace")
    for name, said in (("text", "no trace"), ("gone", "gone cannot be read: No such file or directory")):
        done = run("table", str(tmp_path / name))
        assert done.exit_code == 1
        assert said in done.stderr


def test_a_cut_trace_is_drawn_and_said_to_be_cut(tmp_path: Path) -> None:
    whole = tmp_path / "whole.uft"
    write_trace(matmul(), whole)
    cut = tmp_path / "cut.uft"
    cut.write_bytes(whole.read_bytes()[:-20])
    assert "INCOMPLETE: the program ended before" in run("heatmap", str(cut)).stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("100ms", 0.1), (" 2 min ", 120), ("0.5", 0.5), (".5h", 1800), ("7µs", 7e-6)],
)
def test_windows_are_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_window(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "0", "0ms", "-1s", "1 parsec", "1e3", "nan"])
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give a length of time, such as 1s"):
        parse_window(text)
