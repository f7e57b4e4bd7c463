"""The command line: `userfault`, or `python -m userfault`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command that `sys.argv` asks for and exit with its code.

    0 is success, 1 a failure that one line on stderr explains, 2 wrong usage, 130 an interrupt.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        from userfault.errors import MissingExtraError

        missing = MissingExtraError.for_module(error.name or "typer", "cli", "the command line")
        sys.exit(f"userfault: {missing}")
    from userfault.cli._app import app

    app(prog_name="userfault")
