"""The command line, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from support.processes import Finished, run_python

_MAIN = "from userfault.cli import main; main()"
_SURROUNDINGS = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}


def run_cli(
    *arguments: str,
    code: str = _MAIN,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 110,
) -> Finished:
    """Run `userfault` with these arguments; `code` may prepare the process first.

    Args:
        arguments: What follows the program's name.
        code: The program, if it is to do more than to call `main`.
        cwd: Its working folder; by default this process's.
        env: Environment variables on top of this process's.
        timeout_s: Seconds until it is killed.
    """
    return run_python(code, timeout_s, arguments=arguments, cwd=cwd, env={**_SURROUNDINGS, **(env or {})})
