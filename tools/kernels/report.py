"""What is told of a run: what is wrong with it, and its part of the summary. Pure functions."""

from __future__ import annotations

import textwrap
from pathlib import Path

from kernels import expected
from kernels.results import Results, count, slowest

SLOWEST = 10
CONSOLE_LINES = 40


def problems(results: Results) -> list[str]:
    """Return what is wrong with the run of one machine, but for its skips."""
    wrong = [f"{name}\n{textwrap.indent(text.rstrip(), '  ')}" for name, text in results.failures().items()]
    wrong += results.troubles
    if not results.ended:
        where = (
            f"in {results.step}"
            if results.step
            else "after the tests"
            if results.steps
            else "before the tests"
        )
        during = f", while {results.running} was running" if results.running else ""
        wrong.append(f"the machine did not come to its end: it stopped {where}{during}")
    elif "pytest" in results.steps and (missing := sorted(set(results.expected) - set(results.tests))):
        wrong.append(
            f"{len(missing)} tests were collected on this machine and not run inside:\n{_some(missing)}"
        )
    if more := sorted(set(results.collected or ()) - set(results.expected)):
        wrong.append(f"{len(more)} tests were collected inside and not on this machine:\n{_some(more)}")
    return wrong


def needs_console(results: Results) -> bool:
    """Tell whether only the console can say what happened."""
    return not results.ended or bool(results.troubles)


def skip_problems(results: Results, series: str) -> list[str]:
    """Return the differences between the skips of a whole run and those that are expected."""
    path = expected.file_of(series)
    return expected.differences(path, expected.read(path), results.skips())


def console_tail(console: Path, emulator_log: Path) -> str:
    """Return the end of a console, where it says why a machine stopped, and all that the emulator itself said."""
    lines = console.read_text(errors="replace").replace("\r", "").splitlines()[-CONSOLE_LINES:]
    lines += emulator_log.read_text(errors="replace").splitlines()
    return f"the end of {console}:\n" + textwrap.indent("\n".join(lines), "  | ", lambda _: True)


def summary(results: Results) -> str:
    """Return the figures of a kernel: seconds, counts, skips, the slowest tests."""
    lines = [f"boot {results.boot_s:.1f} s"]
    for name, of in (("pytest", results.tests), ("engine", results.programs)):
        if of:
            lines.append(f"{name} {results.steps.get(name, 0):.1f} s: {count(of.values())}")
    lines += [f"skipped {len(names)}: {reason}" for reason, names in sorted(results.skips().items())]
    lines += [f"slow {seconds:.1f} s: {name}" for name, seconds in slowest(results, SLOWEST)]
    return "\n".join(lines)


def _some(ids: list[str]) -> str:
    more = f"\n  and {len(ids) - 10} more" if len(ids) > 10 else ""
    return textwrap.indent("\n".join(ids[:10]), "  ") + more
