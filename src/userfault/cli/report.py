"""`userfault report`: a trace as a heat map, a time line, a working set, or a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from userfault.cli._output import DebugOption, JsonOption, command

if TYPE_CHECKING:
    from userfault._trace import Trace
    from userfault.reports.traces import Canvas, Report

__all__ = ["app"]

app = typer.Typer(
    help=(
        "Draw what a trace has recorded: in the terminal, or with -o as a picture, a page or numbers.\n\n"
        "Reports need no userfaultfd: a trace can be drawn on any machine."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_Trace = Annotated[
    Path, typer.Argument(help="The trace, as `userfault record` wrote it.", show_default=False)
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="File: .png, .svg, .pdf, .html (a page that needs nothing else) or .json.",
        show_default="the terminal",
    ),
]
_Objects = Annotated[
    list[str] | None,
    typer.Option(
        "--object", help="Only this object, or those that fit a pattern such as 'tmp*'. Repeatable."
    ),
]
_Kind = Annotated[
    Literal["accessed", "written", "read_only"] | None,
    typer.Option("--kind", help="What counts.", show_default="all that is known"),
]
_Width = Annotated[int | None, typer.Option(help="Columns of text, or pixels of a file.", min=40, max=20000)]
_Height = Annotated[
    int | None, typer.Option(help="Lines of text, or pixels of a file, for all objects.", min=4, max=20000)
]
_Force = Annotated[bool, typer.Option("--force", help="Overwrite the file that --output names.")]


@app.command("heatmap")
@command
def heatmap(
    trace: _Trace,
    output: _Output = None,
    objects: _Objects = None,
    kind: _Kind = None,
    width: _Width = None,
    height: _Height = None,
    force: _Force = False,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Which parts of which object were read and written when.

    Time goes to the right, and each object from its beginning downwards; colour says how much of a cell was touched:
    blue is read, orange written, purple both. Of paged memories it shows what was resident and why it was loaded. A
    strip is as long as its object lived.
    """
    from userfault.cli._report.run import Target, deliver
    from userfault.reports import traces

    def make(found: Trace, canvas: Canvas) -> Report:
        return traces.heatmap(found, canvas, objects=objects or (), kind=kind)

    deliver(trace, make, Target(output, width, height, force=force, as_json=as_json))


@app.command("timeline")
@command
def timeline(
    trace: _Trace,
    output: _Output = None,
    objects: _Objects = None,
    width: _Width = None,
    force: _Force = False,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What happened when: bytes touched by object, loads and evictions, how long faults took."""
    from userfault.cli._report.run import Target, deliver
    from userfault.reports import traces

    def make(found: Trace, canvas: Canvas) -> Report:
        return traces.timeline(found, objects=objects or ())

    deliver(trace, make, Target(output, width, None, force=force, as_json=as_json))


@app.command("wss")
@command
def wss(
    trace: _Trace,
    output: _Output = None,
    objects: _Objects = None,
    kind: _Kind = None,
    window: Annotated[
        list[str] | None,
        typer.Option(
            "--window", help="Length, such as 1s or 100ms. Repeatable.", show_default="a look, ten looks, all"
        ),
    ] = None,
    width: _Width = None,
    force: _Force = False,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The working set: how many bytes are in use within a window of time, and which objects they are of."""
    from userfault.cli._report.run import Target, deliver, parse_window
    from userfault.reports import traces

    windows = tuple(parse_window(text) for text in window or ())

    def make(found: Trace, canvas: Canvas) -> Report:
        return traces.wss(found, objects=objects or (), kind=kind, windows=windows)

    deliver(trace, make, Target(output, width, None, force=force, as_json=as_json))


@app.command("table")
@command
def table(
    trace: _Trace,
    output: _Output = None,
    objects: _Objects = None,
    window: Annotated[
        str | None,
        typer.Option("--window", help="For what is touched at a time, such as 1s.", show_default="a look"),
    ] = None,
    width: _Width = None,
    force: _Force = False,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Objects in numbers: size, touched, written, heat, faults; their hottest parts, and those never touched."""
    from userfault.cli._report.run import Target, deliver, parse_window
    from userfault.reports import traces

    within = parse_window(window) if window is not None else None

    def make(found: Trace, canvas: Canvas) -> Report:
        return traces.table(found, objects=objects or (), window=within)

    deliver(trace, make, Target(output, width, None, force=force, as_json=as_json))
