"""What a recording is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from userfault.cli._output import UsageError
from userfault.errors import UserfaultError

__all__ = ["SUFFIX", "Settings", "parse_share", "trace_path"]

SUFFIX = ".uft"


@dataclass(frozen=True, slots=True)
class Settings:
    """What to record, and how.

    Attributes:
        path: The trace.
        only: Patterns of names; none: all.
        every: Seconds between two samples.
        accesses: Whether reads are told apart from writes; otherwise writes only.
        budget: Share of one CPU for sampling.
        larger_than: Bytes from which on an array is recorded.
        huge: Whether arrays get huge pages, None: as NumPy has it.
        as_json: Whether the summary is a JSON object on stdout.
    """

    path: Path
    only: tuple[str, ...] = ()
    every: float = 0.1
    accesses: bool = False
    budget: float = 0.03
    larger_than: int = 1 << 20
    huge: bool | None = None
    as_json: bool = False

    @property
    def every_ns(self) -> int:
        """Nanoseconds between two samples."""
        return int(self.every * 1e9)

    def wants(self, name: str) -> bool:
        """Whether a variable of this name is to be recorded. A pattern fits a whole name, or its last part."""
        last = name.rpartition(".")[2]
        return not self.only or any(fnmatchcase(name, each) or fnmatchcase(last, each) for each in self.only)


def parse_share(text: str, *, what: str) -> float:
    """Return a share such as "3%" or "0.03" as a number.

    Raises:
        UsageError: It is none, or not above 0 and at most 1.
    """
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UsageError(f"{what} {text!r}: give a share above 0 and up to 100%, such as 3% or 0.03")
    return share


def trace_path(stem: str, output: Path | None, *, force: bool) -> Path:
    """Return where the trace goes, as an absolute path: the program may change its folder.

    Raises:
        UsageError: `output` has another suffix.
        UserfaultError: It exists and may not be overwritten, or its folder does not.
    """
    path = (output or Path(stem + SUFFIX)).absolute()
    if path.suffix != SUFFIX:
        raise UsageError(f"--output {output}: a trace ends in {SUFFIX}")
    if output is not None and path.exists() and not force:
        raise UserfaultError(f"{output} exists; add --force to overwrite it")
    if not path.parent.is_dir():
        raise UserfaultError(f"{output}: there is no folder {path.parent}")
    return path
