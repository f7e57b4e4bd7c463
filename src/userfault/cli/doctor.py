"""`userfault doctor`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from userfault.cli._output import DebugOption, JsonOption, command, print_json, table_console
from userfault.kernel import KernelReport, probe
from userfault.kernel.probe import Access, Finding, Group, Level, Negotiation, Status
from userfault.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from userfault.track import MethodInfo

__all__ = ["doctor"]

# In a process of its own: what is sick may hang or die, and a thread that waits for a page holds the GIL.
_TRIAL = """
import numpy as np, userfault, userfault.cli._trial_source
origin = np.arange(1 << 18, dtype="<u4")
array = userfault.open({source})
assert array[200_000] == 200_000 and int(array[::1024].sum()) == int(origin[::1024].sum())
"""
_TRIAL_SECONDS = 60
_ARRAYS = {
    "arrays": (Level.REQUIRED, "4.3", "userfault.open of files and memory", "origin"),
    "worker processes": (
        Level.USED,
        "4.3",
        "sources in Python: Zarr, URLs, your own",
        "userfault.cli._trial_source.Counting(1 << 18)",
    ),
    "direct delivery": (
        Level.USED,
        "4.14",
        "open(delivery='direct')",
        "origin, delivery='direct'",
    ),
}
# In few words; `userfault.track.methods()` has all.
_TRACKED = {
    "wp-async": "any memory that can be written",
    "drop": "shared memory: memfd, /dev/shm, shared mmap",
    "stash": "NumPy arrays, bytearray, mmap",
    "rwp-async": "the same, shared memory, hugetlb",
    "blocks": "paged memory: userfault.open, empty, zeros",
}
_SYSTEM_CALLS = """\
With delivery='direct' a system call on a page that is missing, or clean and to be
written, gets EFAULT ("Bad address"): populate() first, or use delivery='thread'.
"""
_ACCESS = {
    Access.FULL: "Traps page faults of [bold]its own and of system calls[/bold], through",
    Access.USER_MODE: "Traps page faults of [bold]its own only[/bold], not of system calls, through",
    Access.NONE: "[bold red]Traps no page faults[/bold red]",
}
_LEVELS = {
    Level.REQUIRED: "Arrays need",
    Level.USED: "Arrays also use",
    Level.OPTIONAL: "Your own handlers",
}
_NEGOTIATION = "requested: ask for it in UFFDIO_API; offered: it works without being asked for"
_MARKS = "? could not be tried, see below    – there is no such thing"

AllOption = Annotated[
    bool,
    typer.Option("--all", "-a", help="Show every feature bit, type of memory, operation and system call."),
]


@command
def doctor(*, everything: AllOption = False, as_json: JsonOption = False, debug: DebugOption = False) -> int:
    """Tell what this kernel, user and container can do, and how to get what is missing.

    Everything is tried, nothing is concluded from version numbers. The exit code is 0 if arrays work here and
    1 if they do not.
    """
    from userfault.track import methods  # the engine comes with it: not for those who only want help

    report = probe()
    report = replace(report, findings=(*_try_arrays(report), *report.findings))
    tracking = methods()
    if as_json:
        print_json({**report.as_dict(), "tracking": [asdict(method) for method in tracking]})
    else:
        _print(report, tracking, everything=everything)
    return 0 if report.usable else 1


def _try_arrays(report: KernelReport) -> list[Finding]:
    findings = []
    for name, (level, since, enables, source) in _ARRAYS.items():
        status, evidence, fix = _try_array(report, source)
        findings.append(
            Finding(name, Group.ABILITY, "", since, level, Negotiation.CALLED, enables, status, evidence, fix)
        )
    return findings


def _try_array(report: KernelReport, source: str) -> tuple[Status, str, str]:
    if not report.usable:
        return Status.UNTRIED, "not tried", "what arrays need, see there"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL.format(source=source)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        evidence = f"no answer within {_TRIAL_SECONDS} s"
    except OSError as failure:
        evidence = f"no process could be started: {failure}"
    else:
        if done.returncode == 0:
            return Status.WORKS, "an array was opened and read in a process of its own", ""
        lines = done.stderr.strip().splitlines()
        evidence = lines[-1] if lines else f"the process ended with code {done.returncode}"
    return Status.MISSING, evidence, "see the evidence; if it makes no sense, report it"


def _tracking_findings(tracking: list[MethodInfo]) -> list[Finding]:
    return [
        Finding(
            f"{'reads and writes' if method.writes else 'accesses'}: {method.name}"
            if method.reads
            else f"writes: {method.name}",
            Group.ABILITY,
            "",
            method.since,
            Level.OPTIONAL,
            Negotiation.CALLED,
            _TRACKED.get(method.name, method.memory),
            Status.WORKS if method.available else Status.MISSING,
            method.needs,
            method.needs,
        )
        for method in tracking
    ]


def _print(report: KernelReport, tracking: list[MethodInfo], *, everything: bool) -> None:
    from userfault.reports.findings import findings_table, remedies

    console = table_console()
    limit = "no limit" if report.memory_limit is None else f"limited to {format_size(report.memory_limit)}"
    console.print(
        f"Linux {report.release} on {report.architecture}, pages of {format_size(report.page_size)},"
        f" {format_size(report.physical_memory)} of memory, {limit}",
        highlight=False,
    )
    console.print(f"{_ACCESS[report.access]} {report.opened_by}\n", highlight=False)
    abilities = [finding for finding in report.findings if finding.group is Group.ABILITY]
    width = max(len(finding.name) for finding in abilities) + 2
    for level, title in _LEVELS.items():
        group = [finding for finding in abilities if finding.level is level]
        first = level is Level.REQUIRED
        console.print(findings_table(title, group, headings=first, first_width=width))
        console.print()
    console.print(
        findings_table("Tracking tells", _tracking_findings(tracking), headings=False, first_width=width)
    )
    console.print()
    direct = next(finding for finding in abilities if finding.name == "direct delivery")
    if direct.status is Status.WORKS:
        console.print(_SYSTEM_CALLS, highlight=False)
    if everything:
        _print_details(console, report)
    shown = report.findings if everything else abilities
    for number, remedy in enumerate(remedies(shown)):
        if not number:
            console.print("[bold]What is missing, and how to get it[/bold]\n")
        console.print(remedy.what)
        console.print(remedy.steps, soft_wrap=True)
        console.print()
    if report.usable:
        console.print("[bold]Arrays work here.[/bold]", end="")
    else:
        console.print("[bold red]Arrays do not work here[/bold red]; the lines above say what to do.", end="")
    console.print("" if everything else " [dim]Every feature bit and type of memory: doctor --all[/dim]")


def _print_details(console: Console, report: KernelReport) -> None:
    from userfault.reports.findings import findings_table, memory_table

    def of(group: Group) -> list[Finding]:
        return [finding for finding in report.findings if finding.group is group]

    console.print(findings_table("Feature bits", of(Group.FEATURE), negotiation=True))
    console.print(f"[dim]{_NEGOTIATION}[/dim]")
    if unknown := report.as_dict()["unknown_feature_bits"]:
        console.print(f"The kernel offers bits that this version of userfault does not know: {unknown}")
    console.print()
    console.print(memory_table("Operation (mode)", of(Group.MEMORY)))
    console.print(f"[dim]{_MARKS}[/dim]\n")
    console.print(findings_table("PAGEMAP_SCAN", of(Group.PAGEMAP)))
    console.print()
    console.print(findings_table("Other calls", of(Group.CALL)))
    console.print()
