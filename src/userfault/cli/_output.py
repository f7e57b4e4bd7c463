"""What commands share: consoles, JSON, common options, and how errors become exit codes."""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console

from userfault.errors import UserfaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "DebugOption",
    "JsonOption",
    "UsageError",
    "command",
    "error_console",
    "print_json",
    "table_console",
]

_P = ParamSpec("_P")

_FAILED, _WRONG_USAGE, _INTERRUPTED = 1, 2, 130

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print the whole traceback of an error.")]


class UsageError(Exception):
    """Arguments that do not fit together or do not make sense."""


def table_console() -> Console:
    """Return the console for results. Where the output is no terminal, lines are wide rather than wrapped."""
    return Console() if sys.stdout.isatty() else Console(width=120, highlight=False)


def error_console() -> Console:
    """Return the console for progress and errors, which never mix with results."""
    # No markup: messages have brackets of their own, such as in `userfault[cli]`.
    return Console(stderr=True, highlight=False, markup=False)


def print_json(values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Print the one JSON object of a command."""
    print(json.dumps(values, indent=indent, ensure_ascii=False))


def command(function: Callable[_P, int | None]) -> Callable[_P, None]:
    """Turn a function that returns an exit code, or raises, into a command.

    Errors are one line on stderr. With `as_json` they are an object with one key, "error", on stdout as well,
    so that programs need not read text.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            code = function(*args, **kwargs) or 0
        except (typer.Exit, typer.Abort, SystemExit):
            raise
        except BaseException as error:
            if kwargs.get("debug"):
                raise
            code = _report(error, as_json=bool(kwargs.get("as_json")))
        raise typer.Exit(code)

    return run


def _report(error: BaseException, *, as_json: bool) -> int:
    if isinstance(error, BrokenPipeError):
        # As `| head` does. The interpreter flushes stdout when it ends, and must not fail at that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    if isinstance(error, KeyboardInterrupt):
        print("userfault: interrupted", file=sys.stderr)
        return _INTERRUPTED
    if isinstance(error, UserfaultError | UsageError):
        text = str(error)
    elif isinstance(error, Exception):
        text = f"{type(error).__name__}: {error} (unexpected; --debug shows where it comes from)"
    else:
        raise error
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": text}})
    print(f"userfault: {text}", file=sys.stderr)
    return _WRONG_USAGE if isinstance(error, UsageError) else _FAILED
