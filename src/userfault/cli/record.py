"""`userfault record`."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Annotated

import typer

from userfault.cli._output import DebugOption, JsonOption, command
from userfault.sizes import parse_size

__all__ = ["record"]


@command
def record(
    program: Annotated[str, typer.Argument(help="Script to run; with -m, module.", metavar="SCRIPT")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.", metavar="[ARGS]...")] = None,
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is the name of a module, as in python -m.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Trace to write.", show_default="SCRIPT.uft")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file that --output names.")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            help="Names of variables, such as grid,new or 'self.*'.", show_default="all large arrays"
        ),
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between two samples.", min=0.001)] = 0.1,
    accesses: Annotated[bool, typer.Option("--accesses", help="Reads too, apart from writes.")] = False,
    budget: Annotated[str, typer.Option(help="Share of one CPU that sampling may take.")] = "3%",
    larger_than: Annotated[str, typer.Option(help="Record arrays of this size and more.")] = "1 MiB",
    huge: Annotated[
        bool | None,
        typer.Option(
            "--huge/--no-huge",
            help="Advise the kernel to use huge pages, or not to.",
            show_default="as NumPy",
        ),
    ] = None,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Run a Python program and record which pages of its large arrays it writes, and when.

    Options of record end at SCRIPT; what follows is the program's. It runs in this process as `python SCRIPT` would,
    and its exit code is passed on. At its end a summary is printed on stderr; `userfault report` makes pictures of the
    trace.

    Arrays have the names of the variables that hold them; those that follow each other under one name share a row.
    What lives for less than a sample is counted only. Child processes are not recorded.

    Where sampling would take more than --budget, it is done less often than --every says.

    The default trace is overwritten at each run; a file named with --output only with --force.
    """
    from userfault.cli._record.program import Program
    from userfault.cli._record.session import Session
    from userfault.cli._record.settings import Settings, parse_share, trace_path

    wanted = Program(program, tuple(arguments or ()), is_module=module)
    settings = Settings(
        path=trace_path(wanted.stem, output, force=force),
        only=tuple(part.strip() for part in only.split(",") if part.strip()) if only else (),
        every=every,
        accesses=accesses,
        budget=parse_share(budget, what="--budget"),
        larger_than=max(parse_size(larger_than, what="--larger-than"), mmap.PAGESIZE),
        huge=huge,
        as_json=as_json,
    )
    wanted.enter()
    wanted.check()
    Session(wanted, settings).start()
    return wanted.run()
