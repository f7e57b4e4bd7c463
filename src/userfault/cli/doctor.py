"""`userfault doctor`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from userfault.cli._output import DebugOption, JsonOption, command, print_json, table_console
from userfault.kernel import Finding, KernelReport, Level, probe
from userfault.sizes import format_size

__all__ = ["doctor"]

# In a process of its own: what is sick may hang or die, and a thread that waits for a page holds the GIL.
_TRIAL = """
import numpy as np, userfault, userfault.cli._trial_source
origin = np.arange(1 << 18, dtype="<u4")
array = userfault.open({source})
assert array[200_000] == 200_000 and int(array[::1024].sum()) == int(origin[::1024].sum())
"""
_TRIAL_SECONDS = 60
_ARRAYS = (
    Finding("arrays", "4.3", True, Level.REQUIRED, "userfault.open of files and memory", "", ""),
    Finding("worker processes", "4.3", True, Level.USED, "sources in Python: Zarr, URLs, your own", "", ""),
)


@command
def doctor(*, as_json: JsonOption = False, debug: DebugOption = False) -> int:
    """Tell what this kernel, user and container can do, and how to get what is missing.

    Everything is tried, nothing is concluded from version numbers. The exit code is 0 if arrays work here and
    1 if they do not.
    """
    report = probe()
    report = replace(report, findings=(*_try_arrays(report), *report.findings))
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    return 0 if report.usable else 1


def _try_arrays(report: KernelReport) -> list[Finding]:
    sources = ("origin", "userfault.cli._trial_source.Counting(1 << 18)")
    return [_try_array(report, finding, source) for finding, source in zip(_ARRAYS, sources, strict=True)]


def _try_array(report: KernelReport, finding: Finding, source: str) -> Finding:
    if not report.usable:
        return replace(finding, available=False, evidence="not tried", fix="what is required below")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL.format(source=source)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        evidence = f"no answer within {_TRIAL_SECONDS} s"
    else:
        if done.returncode == 0:
            return replace(finding, evidence="an array was opened and read in a process of its own")
        lines = done.stderr.strip().splitlines()
        evidence = lines[-1] if lines else f"the process ended with code {done.returncode}"
    return replace(
        finding, available=False, evidence=evidence, fix="see the evidence; if it makes no sense, report it"
    )


def _print(report: KernelReport) -> None:
    from userfault.reports.tables import findings_table

    console = table_console()
    limit = "none" if report.memory_limit is None else format_size(report.memory_limit)
    console.print(
        f"Linux {report.release} on {report.architecture}, pages of {format_size(report.page_size)},"
        f" {format_size(report.physical_memory)} of memory, control group limit: {limit}"
    )
    door = f", through {report.opened_by}" if report.opened_by else ""
    console.print(f"userfaultfd access: [bold]{report.access.value}[/bold]{door}\n")
    console.print(findings_table(report.findings))
    verdict = (
        "Arrays work here." if report.usable else "Arrays do not work here; the lines above say what to do."
    )
    console.print(f"[bold]{verdict}[/bold]")
