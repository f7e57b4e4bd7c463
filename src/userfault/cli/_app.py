"""The list of commands."""

from __future__ import annotations

import typer

from userfault.cli import demo, doctor, info, record, report, version, watch

__all__ = ["app"]

app = typer.Typer(
    name="userfault",
    help=(
        "Memory that fills itself: arrays of any size and origin as ordinary NumPy arrays, paged in as they"
        " are touched, within a budget.\n\n"
        "Start with **userfault demo**; if it does not run here, **userfault doctor** says"
        " why."
    ),
    epilog="Exit codes: 0 success, 1 failure (explained on stderr), 2 wrong usage, 130 interrupted.",
    rich_markup_mode="markdown",  # reflows docstrings
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TRY, _LOOK = "Try it", "Look into things"

app.command("demo", rich_help_panel=_TRY)(demo.demo)
app.command("info", rich_help_panel=_LOOK)(info.info)
# Options end at the program's name: what follows is the program's own.
app.command("record", rich_help_panel=_LOOK, context_settings={"allow_interspersed_args": False})(
    record.record
)
app.add_typer(report.app, name="report", rich_help_panel=_LOOK)
app.command("watch", rich_help_panel=_LOOK)(watch.watch)
app.command("doctor", rich_help_panel=_LOOK)(doctor.doctor)
app.command("version", rich_help_panel=_LOOK)(version.version)


@app.callback()
def _root() -> None:
    # Without a callback Typer would make a lone command the program itself.
    pass
