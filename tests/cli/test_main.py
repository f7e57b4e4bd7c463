"""Help, versions, exit codes, and what is said when something is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from support.cli import run_cli
from userfault.cli._output import DebugOption, JsonOption, UsageError, command
from userfault.errors import BudgetError


def test_help_names_every_command_in_its_group() -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    for text in ("Try it", "demo", "Look into things", "info", "watch", "doctor", "version", "Exit codes"):
        assert text in done.stdout
    assert "Traceback" not in done.stderr


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "userfault", "version", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "python" in json.loads(done.stdout)


def test_no_arguments_is_a_request_for_help() -> None:
    done = run_cli()
    assert "Usage: userfault" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["demo", "info", "watch", "doctor", "version"])
def test_every_command_has_help_and_json(name: str) -> None:
    done = run_cli(name, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert "--debug" in done.stdout


def test_version() -> None:
    values = json.loads(run_cli("version", "--json").check())
    assert values["kernel"] == os.uname().release
    assert values["python"] == sys.version.split()[0]
    assert run_cli("version").check().startswith("userfault ")


@pytest.mark.parametrize(
    "arguments", [("frobnicate",), ("demo", "--no-such"), ("info",), ("demo", "--offset", "-1")], ids=" ".join
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_typer_one_sentence_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from userfault.cli import main; main()"
    done = run_cli("doctor", code=code)
    assert done.returncode == 1
    assert done.stderr == "userfault: the command line needs typer: pip install 'userfault[cli]'\n"


def test_without_rich_one_sentence_says_what_to_install() -> None:
    code = "import sys; sys.modules['rich'] = None; from userfault.cli import main; main()"
    done = run_cli("version", code=code)
    assert done.returncode == 1
    assert done.stderr == "userfault: the command line needs rich: pip install 'userfault[cli]'\n"


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @command
    def fail(*, as_json: JsonOption = False, debug: DebugOption = False) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BudgetError("memory: '1 B' is too small"), 1, "userfault: memory: '1 B' is too small\n"),
        (UsageError("not both"), 2, "userfault: not both\n"),
        (KeyboardInterrupt(), 130, "userfault: interrupted\n"),
        (
            ZeroDivisionError("oops"),
            1,
            "userfault: ZeroDivisionError: oops (unexpected; --debug shows where it comes from)\n",
        ),
    ],
)
def test_errors_are_one_line_and_a_code(error: BaseException, code: int, text: str) -> None:
    result = CliRunner().invoke(app_that_raises(error))
    assert result.exit_code == code
    assert result.stderr == text
    assert result.stdout == ""


def test_errors_in_json() -> None:
    result = CliRunner().invoke(app_that_raises(BudgetError("too small")), ["--json"])
    values: dict[str, Any] = json.loads(result.stdout)
    assert values == {"error": {"type": "BudgetError", "message": "too small"}}
    assert result.exit_code == 1


def test_debug_lets_the_error_through() -> None:
    result = CliRunner().invoke(app_that_raises(BudgetError("too small")), ["--debug"])
    assert isinstance(result.exception, BudgetError)


def test_an_interrupt_is_130_in_real_life() -> None:
    # The process tells when it waits; SIGINT comes only then.
    code = (
        "import sys, typer, signal\n"
        "from userfault.cli._output import command\n"
        "app = typer.Typer(pretty_exceptions_enable=False)\n"
        "@app.command()\n@command\n"
        "def wait() -> None:\n"
        "    print('waiting', flush=True)\n"
        "    while True: signal.pause()\n"
        "app()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "userfault: interrupted\n"
