"""`python -m kernels [KERNEL...]`: the kernel tests and the engine's tests on real kernels (`make test-kernels`).

Exit codes: 0 all is well; 1 a kernel failed; 2 wrong use; 3 nothing failed, but a kernel was not run, because there is
no QEMU here or the kernel could not be had.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

from kernels import apt, download, expected, here, machine, matrix, packages, report
from kernels.results import as_dict, combined

OK, FAILED, NOT_RUN = 0, 1, 3


def main(arguments: list[str] | None = None) -> int:
    """Run the matrix and return the exit code."""
    options = _parser().parse_args(arguments)
    options.output = options.output.resolve()
    if trouble := machine.missing():
        print(f"NOT RUN: {trouble}", file=sys.stderr)
        return NOT_RUN
    kernels, not_run = _kernels(options.kernels or packages.MATRIX)
    try:
        runs = matrix.run_all(kernels, options) if kernels else []
    except (here.PreparationError, matrix.BusyError) as error:
        print(error, file=sys.stderr)
        return FAILED
    facts = {
        kernel.name: _tell(kernel, [run for run in runs if run.kernel is kernel], options)
        for kernel in kernels
    }
    for name, why in not_run.items():
        print(f"\n=== {name}: NOT RUN\n{textwrap.indent(why, '  ')}")
        facts[name] = {"state": "NOT RUN", "why": why}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    states = {name: of_one["state"] for name, of_one in facts.items()}
    print("\nkernels:", ", ".join(f"{name} {state}" for name, state in states.items()))
    print(f"consoles, events and results: {options.output}")
    return FAILED if "FAILED" in states.values() else NOT_RUN if not_run else OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make test-kernels KERNELS='...' ARGS='...'",
        description="The kernel and engine tests on real kernels.",
    )
    names = ", ".join(packages.MATRIX)
    parser.add_argument(
        "kernels",
        nargs="*",
        type=_kernel_name,
        metavar="KERNEL",
        help=f"{names} (all of them), or a series like 6.19",
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="machines at a time (%(default)s)"
    )
    parser.add_argument("--processors", type=int, default=1, help="of one machine (%(default)s)")
    parser.add_argument("--seconds", type=float, default=840, help="until a machine is ended (%(default)s)")
    parser.add_argument(
        "--only", choices=("pytest", "engine"), help="run one of the two, and do not compare skips"
    )
    parser.add_argument(
        "--pytest",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="for pytest, in place of its tests here (--pytest=-krwp --pytest=tests/kernel), and do not compare skips",
    )
    parser.add_argument(
        "--write-expected",
        action="store_true",
        help="take the skips of these runs as those that are expected",
    )
    parser.add_argument(
        "--output", type=Path, default=matrix.OUTPUT, help="folder for all of it (%(default)s)"
    )
    return parser


def _kernel_name(text: str) -> str:
    if not packages.is_kernel_name(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no kernel: {', '.join(packages.MATRIX)}, or a series like 6.19"
        )
    return text


def _kernels(names: tuple[str, ...]) -> tuple[list[download.Download], dict[str, str]]:
    """Return the kernels that can be had, and why others cannot."""
    found, not_run = [], {}
    for name in dict.fromkeys(names):
        try:
            kernel, warning = download.kernel(name, download.cache_folder())
        except apt.UnavailableError as error:
            not_run[name] = str(error)
            continue
        print(f"{name} is Debian's {kernel.version}" + (f", {warning}" if warning else ""), flush=True)
        found.append(kernel)
    return found, not_run


def _tell(kernel: download.Download, runs: list[matrix.Run], options: argparse.Namespace) -> dict[str, Any]:
    """Print how a kernel's run went, and return its facts."""
    results = combined(run.results for run in runs)
    wrong = [problem for run in runs for problem in report.problems(run.results)]
    if results.ended and not options.pytest and options.only is None:
        if options.write_expected:
            expected.write(expected.file_of(kernel.series), set(results.skips()), kernel.series)
        wrong += report.skip_problems(results, kernel.series)
    wrong += [
        report.console_tail(run.machine.console, run.machine.log)
        for run in runs
        if report.needs_console(run.results)
    ]
    state = "FAILED" if wrong else "ok"
    # On a busy host the processor's seconds say more than the clock's.
    times = ", ".join(
        f"{run.step} {run.machine.ended_after_s:.0f} s (processor {run.machine.cpu_s:.0f} s)" for run in runs
    )
    print(f"\n=== {kernel.name}: {state}, Linux {results.release or kernel.version}: {times}")
    print(textwrap.indent(report.summary(results), "  "))
    for problem in wrong:
        print(f"  FAILED {problem}")
    return {"state": state, "version": kernel.version, "wrong": wrong, **as_dict(results)}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, matrix.end)
    sys.exit(main())
