"""What a probe says: of one thing that a system can or cannot do, and of all of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from userfault.kernel import abi

__all__ = ["Access", "Finding", "Group", "KernelReport", "Level", "Negotiation", "Status"]


class Access(StrEnum):
    """Whose page faults a process may trap."""

    FULL = "full"  # its own, and those of system calls on its behalf
    USER_MODE = "user mode"  # only its own; a system call that meets a missing page gets EFAULT
    NONE = "none"


class Level(StrEnum):
    """What a finding means for userfault."""

    REQUIRED = "required"  # without it there are no arrays
    USED = "used"  # arrays use it, and are slower or less complete without
    OPTIONAL = "optional"  # for writers of their own handlers, and parts of userfault that are still to come


class Group(StrEnum):
    """What kind of thing a finding is about."""

    ABILITY = "ability"  # what people want to do; a summary of the others
    FEATURE = "feature"  # a bit of UFFDIO_API
    MEMORY = "memory"  # an operation on one type of memory, with the registration mode that it goes with
    PAGEMAP = "pagemap"  # what PAGEMAP_SCAN tells
    CALL = "call"  # a request or system call for which the type of memory makes no difference


class Negotiation(StrEnum):
    """What a program has to do before it can use a thing."""

    REQUESTED = "requested"  # ask for the bit in UFFDIO_API; without that it is off
    OFFERED = "offered"  # nothing: the bit in UFFDIO_API's answer only tells that it is there
    REGISTERED = "registered"  # register the range with this mode
    CALLED = "called"  # nothing: there is no bit for it, only the call tells


class Status(StrEnum):
    """What came of trying it."""

    WORKS = "works"
    MISSING = "missing"
    UNTRIED = "untried"  # something it needs is not there at the moment; it may work


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a system may or may not do.

    Attributes:
        name: Short name, stable across releases; kernel things have the kernel's name without its prefix.
        group: What kind of thing it is.
        memory: Type of memory it was tried on ("anonymous", "shmem", …), "" if it is about none.
        since: The Linux release that brought it.
        level: How much userfault depends on it.
        negotiated: What a program has to do before it can use it.
        enables: What it is good for.
        status: What came of it here.
        evidence: What was seen when it was tried.
        fix: What to do to get it, one step a line; "" if it works.
    """

    name: str
    group: Group
    memory: str
    since: str
    level: Level
    negotiated: Negotiation
    enables: str
    status: Status
    evidence: str
    fix: str

    @property
    def available(self) -> bool:
        """Whether it was tried and worked."""
        return self.status is Status.WORKS

    @property
    def title(self) -> str:
        """Name and memory, unique within its group."""
        return f"{self.name} on {self.memory}" if self.memory else self.name


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Everything `probe` found.

    Attributes:
        release: Kernel release, as uname has it.
        architecture: Architecture of this process.
        page_size: In bytes.
        access: Whose faults can be trapped.
        opened_by: What gave the best access: "/dev/userfaultfd", "userfaultfd(2)" or "".
        unprivileged_userfaultfd: The sysctl's value, None if the kernel has none.
        ptrace_capability: Whether CAP_SYS_PTRACE is there, and counts.
        seccomp_filtered: Whether a seccomp filter is on the process.
        container: Whether this looks like a container.
        features: The feature bits that the kernel offers, with those that this version does not know.
        huge_pages: Transparent huge page setting, None if the kernel has none.
        huge_page_size: In bytes.
        memory_limit: Smallest control group limit in bytes, None if unlimited.
        physical_memory: In bytes.
        findings: All findings, the important ones first.
    """

    release: str
    architecture: str
    page_size: int
    access: Access
    opened_by: str
    unprivileged_userfaultfd: int | None
    ptrace_capability: bool
    seccomp_filtered: bool
    container: bool
    features: abi.Feature
    huge_pages: str | None
    huge_page_size: int | None
    memory_limit: int | None
    physical_memory: int
    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Whether everything that arrays cannot do without is there."""
        return all(finding.available for finding in self.findings if finding.level is Level.REQUIRED)

    def find(self, name: str, memory: str = "") -> Finding:
        """Return one finding: the first of this name, on this type of memory if it is given.

        Raises:
            LookupError: There is none.

        Example:
            >>> from userfault.kernel import probe
            >>> probe().find("COPY (MISSING)", "hugetlb").since
            '4.11'
        """
        for finding in self.findings:
            if finding.name == name and memory in ("", finding.memory):
                return finding
        known = sorted({finding.name for finding in self.findings})
        raise LookupError(f"no finding {name!r} with memory {memory!r}; there are {', '.join(known)}")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["features"] = [name for bit in abi.Feature if bit in self.features and (name := bit.name)]
        unknown = int(self.features) & ~sum(abi.Feature)
        values["unknown_feature_bits"] = [bit for bit in range(64) if unknown >> bit & 1]
        values["findings"] = [_plain(finding) for finding in self.findings]
        values["usable"] = self.usable
        return values


def _plain(finding: Finding) -> dict[str, Any]:
    values = {field.name: getattr(finding, field.name) for field in fields(finding)}
    return {**values, "available": finding.available}
