"""The reasons for which a kernel is expected to skip tests: one file for each release series, compared with a run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "expected"


def file_of(series: str) -> Path:
    """Return the file of a series ("6.1")."""
    return FOLDER / f"{series}.toml"


def read(path: Path) -> set[str]:
    """Return the expected reasons; none if there is no file."""
    try:
        return set(tomllib.loads(path.read_text())["skips"])
    except FileNotFoundError:
        return set()


def write(path: Path, reasons: set[str], series: str) -> None:
    """Write the file anew."""
    lines = [
        f"# Why tests are skipped on Linux {series}; `make test-kernels ARGS=--write-expected` writes this file.",
        "skips = [",
        *(f"  {_quoted(reason)}," for reason in sorted(reasons)),
        "]",
        "",
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))


def differences(path: Path, expected: set[str], skips: dict[str, list[str]]) -> list[str]:
    """Return what is wrong with the reasons of a run, and which line of the file to change."""
    name = path.relative_to(FOLDER.parent.parent.parent) if path.is_relative_to(FOLDER) else path
    unexpected = [
        f"skipped, and that is not expected ({len(tests)}, {tests[0]} for one): make it run, or add to {name}:\n"
        f"  {_quoted(reason)},"
        for reason, tests in sorted(skips.items())
        if reason not in expected
    ]
    vanished = [
        f"expected to be skipped, and nothing was: if that is right, remove from {name}:\n  {_quoted(reason)},"
        for reason in sorted(expected - skips.keys())
    ]
    return unexpected + vanished


def _quoted(reason: str) -> str:
    # A TOML basic string is a JSON string, except that DEL must be escaped.
    return json.dumps(reason, ensure_ascii=False).replace("\x7f", "\\u007f")
