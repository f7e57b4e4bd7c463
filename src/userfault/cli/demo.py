"""`userfault demo`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from userfault.cli._output import (
    DebugOption,
    JsonOption,
    UsageError,
    command,
    error_console,
    print_json,
    table_console,
)
from userfault.errors import InternalError, MissingExtraError, UserfaultError
from userfault.sizes import format_size, parse_size

if TYPE_CHECKING:
    from userfault.cli._demo.live import LiveLine
    from userfault.cli._demo.run import Outcome
    from userfault.cli._opened import RawOptions
    from userfault.reports import Recording, RunReport

__all__ = ["demo"]

_DEFAULT_PICTURE = "userfault-demo.png"
_BUDGET_SHARE = 10
# With fewer, those in flight are most of the budget.
_LEAST_BLOCKS = 16


@command
def demo(
    file: Annotated[
        str | None, typer.Argument(help="File or URL to use instead of the demo's own data.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", "-m", help="Budget, such as '256 MiB'.", show_default="a tenth of the data"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the elements of a raw file, such as '<f4'.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Shape of a raw file, such as 1000,512.")] = None,
    offset: Annotated[int, typer.Option(help="Where the elements of a raw file begin, in bytes.", min=0)] = 0,
    days: Annotated[int, typer.Option(help="Days of the demo's own data, about 1 MiB each.", min=2)] = 3652,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Picture: .png, .svg or .pdf.", show_default=_DEFAULT_PICTURE),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file that --output names.")] = False,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read an array that is ten times as large as the memory that it may use.

    Single elements at random, a sliding window, then everything, while only a tenth of the array may be in
    memory; the results are compared with what the format's own library reads. Prints a table and draws a
    picture of which blocks were touched when.

    Without FILE it uses ten years of synthetic daily rain: a Zarr array of 3.5 GiB, made once (300 MB on
    disk, some 20 seconds) and kept in the cache folder ($XDG_CACHE_HOME or ~/.cache, below userfault/demo;
    safe to delete).

    The default picture, userfault-demo.png, is overwritten at each run; a file named with --output only with
    --force.
    """
    from userfault.cli._opened import RawOptions

    raw = RawOptions.parse(dtype, shape, offset)
    path = _picture_path(output, force=force)
    outcome = _Job(file, memory, raw, days).run()
    picture = _draw(outcome.recording, path, required=output is not None)
    if as_json:
        print_json({**outcome.report.as_dict(), "picture": str(picture) if picture else None})
    else:
        _print(outcome.report, outcome.recording, picture)
    if not outcome.report.checked:
        raise InternalError(
            f"the results differ from those of {outcome.report.reference}; please report this"
        )


def _picture_path(output: Path | None, *, force: bool) -> Path:
    from userfault.reports.picture import SUFFIXES

    path = output or Path(_DEFAULT_PICTURE)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--output {path}: a picture ends in {', '.join(SUFFIXES)}")
    if output is not None and path.exists() and not force:
        raise UserfaultError(f"{path} exists; add --force to overwrite it")
    if not path.parent.is_dir():
        raise UserfaultError(f"{path}: there is no folder {path.parent}")
    return path


@dataclass(frozen=True, slots=True)
class _Job:
    file: str | None
    memory: str | None
    raw: RawOptions
    days: int

    def run(self) -> Outcome:
        """Make the data if they are not there, open, measure, compare."""
        from userfault.cli._demo.live import LiveLine

        with LiveLine() as live:
            url = self.file or self._own_data(live)
            return self._measure(url, live)

    def _own_data(self, live: LiveLine) -> str:
        from userfault.cli._demo.data import ensure

        return str(ensure(self.days, progress=lambda done, total: live.step("making the data", done, total)))

    def _measure(self, url: str, live: LiveLine) -> Outcome:
        from userfault.cli._demo.reference import open_reference
        from userfault.cli._demo.run import run
        from userfault.cli._opened import opened

        budget = self._budget(url)
        began = time.monotonic()
        with opened(url, self.raw, budget) as found:
            seconds = time.monotonic() - began
            if found.memory is None:
                raise UserfaultError(f"{url} has no elements: there is nothing to show")
            transposed = any(not array.flags.c_contiguous for array in found.arrays.values())
            arrays = {name: array.T if transposed else array for name, array in found.arrays.items()}
            offset = None if self.raw.dtype is None else self.raw.offset
            name = url.rstrip("/").rpartition("/")[2] or url
            with open_reference(url, arrays, offset=offset, transposed=transposed) as reference:
                return run(name, arrays, found.memory, reference, open_seconds=seconds, watch=live.watch)

    def _budget(self, url: str) -> int:
        if self.memory is not None:
            return parse_size(self.memory, what="--memory")
        from userfault.cli._opened import opened

        with opened(url, self.raw) as found:
            if found.memory is None:
                raise UserfaultError(f"{url} has no elements: there is nothing to show")
            return max(found.memory.nbytes // _BUDGET_SHARE, _LEAST_BLOCKS * found.memory.block)


def _draw(recording: Recording, path: Path, *, required: bool) -> Path | None:
    from userfault.reports.picture import draw

    try:
        draw(recording, path)
    except MissingExtraError as error:
        if required:
            raise
        error_console().print(f"userfault: {error}; the terminal has to do")
        return None
    except OSError as error:
        raise UserfaultError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _print(report: RunReport, recording: Recording, picture: Path | None) -> None:
    from rich.markup import escape

    from userfault.reports import format_duration
    from userfault.reports.heatmap import heatmap
    from userfault.reports.tables import run_table

    console = table_console()
    console.print(
        f"[bold]{escape(report.name)}[/bold]: {format_size(report.nbytes)} of array within a budget of"
        f" {format_size(report.budget)}, in blocks of {format_size(report.block)};"
        f" opened in {format_duration(report.open_seconds * 1e9)}"
    )
    console.print(run_table(report))
    over = report.resident_peak / report.budget
    console.print(
        f"resident peak: {format_size(report.resident_peak)} ({over:.0%} of the budget);"
        f" the kernel saw {format_size(report.kernel_peak)}"
    )
    half, most = format_duration(report.fault_p50_ns), format_duration(report.fault_p99_ns)
    console.print(f"a fault took {half} (p50), {most} (p99)")
    if report.result:
        console.print(report.result)
    if picture is None:
        console.print(heatmap(recording, width=min(console.width, 110)))
    else:
        console.print(f"picture: {picture}", soft_wrap=True, markup=False)
