"""The probe at work: runs every trial once, and makes findings of what came of them.

Loaded by the first call of `probe`, because nobody else needs the trials.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from userfault.kernel._architecture import architecture
from userfault.kernel._probing import facts, remedies
from userfault.kernel._probing.areas import TrialError, UntriedError
from userfault.kernel._probing.catalogue import SUBJECTS, Subject, Trial
from userfault.kernel._probing.doors import Doors, say
from userfault.kernel._probing.findings import Access, Finding, KernelReport, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.kernel._probing.trials import Lab

__all__ = ["examine"]


@dataclass(frozen=True, slots=True)
class _Outcome:
    status: Status
    evidence: str
    error: int | None = None
    fix: str = ""


def _run(trial: Trial, lab: Lab | None) -> _Outcome:
    if lab is None and not trial.bare:
        return _Outcome(Status.UNTRIED, "not tried", fix="a userfaultfd, see there")
    try:
        return _Outcome(Status.WORKS, trial(lab))
    except UntriedError as failure:
        return _Outcome(Status.UNTRIED, str(failure), fix=failure.fix)
    except TrialError as failure:
        return _Outcome(Status.MISSING, str(failure))
    except OSError as failure:
        exhausted = remedies.for_exhaustion(failure.errno)
        status = Status.UNTRIED if exhausted else Status.MISSING
        return _Outcome(status, say(failure.errno or -1), failure.errno, exhausted)


def _answers(doors: Doors, here: remedies.Surroundings, setting: str | None) -> dict[str, _Outcome]:
    """Answer what needs no trial of its own."""

    def outcome(*, works: bool, evidence: str, fix: str) -> _Outcome:
        return _Outcome(Status.WORKS if works else Status.MISSING, evidence, fix=fix)

    return {
        "userfaultfd": outcome(
            works=doors.best.is_open,
            evidence=str(doors.best),
            fix=remedies.for_no_access(doors.restricted.error, here),
        ),
        "kernel-mode faults": outcome(
            works=doors.access is Access.FULL,
            evidence=f"{doors.device}; {doors.syscall}",
            fix=remedies.for_full_access(doors.device.error, here),
        ),
        "device": outcome(
            works=doors.device.is_open,
            evidence=str(doors.device),
            fix=remedies.for_device(doors.device.error, here),
        ),
        "huge pages": outcome(
            works=setting in ("always", "madvise"),
            evidence=f"transparent_hugepage/enabled: {setting}",
            fix=remedies.for_huge_pages(setting),
        ),
    }


def _findings(lab: Lab | None, here: remedies.Surroundings, known: dict[str, _Outcome]) -> Iterator[Finding]:
    outcomes: dict[Trial, _Outcome] = {}
    for subject in SUBJECTS:
        yield _finding(subject, lab, here, outcomes, known)


def _finding(
    subject: Subject,
    lab: Lab | None,
    here: remedies.Surroundings,
    outcomes: dict[Trial, _Outcome],
    known: dict[str, _Outcome],
) -> Finding:
    trial = subject.trial
    if trial is None:
        outcome = known[subject.name]
    else:
        if trial not in outcomes:
            outcomes[trial] = _run(trial, lab)
        outcome = outcomes[trial]
    fix = outcome.fix or remedies.for_trial(subject.name, subject.since, subject.lacking, outcome.error, here)
    return subject.found(outcome.status, outcome.evidence, fix)


def examine(by_device: Callable[[int], int], by_syscall: Callable[[int], int]) -> KernelReport:
    """Try everything, through these ways to a userfaultfd."""
    doors = Doors.tried(by_device, by_syscall)
    here = remedies.Surroundings(
        release=os.uname().release,
        filtered=facts.seccomp_filtered(),
        container=facts.in_container(),
        misc_minor=facts.misc_minor(),
    )
    setting = facts.huge_page_setting()
    return KernelReport(
        release=here.release,
        architecture=architecture(),
        page_size=mmap.PAGESIZE,
        access=doors.access,
        opened_by=doors.best.name if doors.best.is_open else "",
        unprivileged_userfaultfd=facts.unprivileged_sysctl(),
        ptrace_capability=facts.has_ptrace_capability(),
        seccomp_filtered=here.filtered,
        container=here.container,
        features=doors.offered(),
        huge_pages=setting,
        huge_page_size=facts.huge_page_size(),
        memory_limit=facts.memory_limit(),
        physical_memory=facts.physical_memory(),
        findings=tuple(_findings(doors.lab, here, _answers(doors, here, setting))),
    )
