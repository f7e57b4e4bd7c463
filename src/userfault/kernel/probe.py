"""What this kernel, this user and this container can do with userfaultfd, found out by trying.

    >>> from userfault.kernel import probe
    >>> report = probe()
    >>> for finding in report.findings:
    ...     print(finding.name, finding.available, finding.fix)  # doctest: +SKIP

Probing takes some milliseconds, leaves nothing behind, needs no privilege and cannot hang (see `_trials`).
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from userfault.kernel import _facts, _remedies, _trials, abi
from userfault.kernel._ioc import architecture
from userfault.kernel._syscalls import ioctl, open_by_device, open_by_syscall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Access", "Finding", "KernelReport", "Level", "probe"]


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


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a system may or may not do.

    Attributes:
        name: Short name, stable across releases.
        since: The Linux release that brought it.
        available: Whether it worked here.
        level: How much userfault depends on it.
        enables: What it is good for.
        evidence: What was seen when it was tried.
        fix: What to do to get it, "" if it is available.
    """

    name: str
    since: str
    available: bool
    level: Level
    enables: str
    evidence: str
    fix: str


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
        features: The feature bits that the kernel offers.
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

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self)
        values["features"] = [name for bit in abi.Feature if bit in self.features and (name := bit.name)]
        values["usable"] = self.usable
        return values


@dataclass(frozen=True, slots=True)
class _Subject:
    name: str
    since: str
    level: Level
    enables: str

    def found(self, *, available: bool, evidence: str, fix: str = "") -> Finding:
        remedy = "" if available else fix
        return Finding(self.name, self.since, available, self.level, self.enables, evidence, remedy)


_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
_R, _U, _O = Level.REQUIRED, Level.USED, Level.OPTIONAL
_USERFAULTFD: Final = _Subject("userfaultfd", "4.3", _R, "everything else")
_FULL_ACCESS: Final = _Subject(
    "faults of system calls", "4.3", _U, "a.tofile(), os.write(fd, a), sock.send(a) without populate() first"
)
_DEVICE: Final = _Subject("device", "6.1", _O, "full access by file permission alone, also in containers")
_HUGE_PAGES: Final = _Subject("huge pages", "2.6.38", _U, "huge pages for large fills, with move")
_SUBJECTS: Final = (
    _Subject("missing pages", "4.3", _R, "arrays that fill themselves when they are touched"),
    _Subject("poison", "6.6", _U, "an error for the one block whose source is gone, not for the whole array"),
    _Subject("move", "6.8", _U, "filling 2 MiB at once, 2.5-3 times as fast as copying"),
    _Subject("batched eviction", "6.13", _U, "many blocks evicted with one TLB flush"),
    _Subject("write protection", "5.7", _O, "writable arrays that know which blocks changed"),
    _Subject("write protection of empty pages", "6.4", _O, "tracking writes to untouched memory"),
    _Subject("write tracking", "6.7", _O, "which pages were written, without a handler"),
    _Subject("access tracking", "7.3", _O, "which pages were read, without a handler"),
    _Subject("access traps", "7.3", _O, "eviction of cold pages that stay mapped"),
    _Subject("shared memory, missing", "4.11", _O, "paging of memory that several processes share"),
    _Subject("shared memory, minor", "5.14", _O, "handing over pages that are in the page cache already"),
    _Subject("zero pages", "4.3", _O, "empty memory without copying"),
    _Subject("sigbus delivery", "4.14", _O, "faults served by the faulting thread itself"),
    _Subject("exact addresses", "5.18", _O, "the exact address of an access instead of its page"),
    _Subject("thread ids", "4.14", _O, "which thread touched a page"),
    _Subject("events", "4.11", _O, "following mremap, munmap and madvise of the memory of another process"),
    _Subject("fork events", "4.11", _O, "following the children of another process"),
)


@dataclass(frozen=True, slots=True)
class _Door:
    """One way to get a userfaultfd, and what came of it."""

    name: str
    opener: Callable[[int], int]
    user_mode_only: bool
    error: int | None

    @property
    def is_open(self) -> bool:
        return self.error is None

    @property
    def flags(self) -> int:
        return _FLAGS | (abi.OpenFlag.USER_MODE_ONLY if self.user_mode_only else 0)

    def __str__(self) -> str:
        return f"{self.name}: {_say(self.error)}"


def _say(error: int | None) -> str:
    return "works" if error is None else f"{errno.errorcode.get(error, str(error))}: {os.strerror(error)}"


def _try_door(name: str, opener: Callable[[int], int], *, user_mode_only: bool) -> _Door:
    untried = _Door(name, opener, user_mode_only, None)
    try:
        os.close(opener(untried.flags))
    except OSError as failure:
        return replace(untried, error=failure.errno if failure.errno is not None else errno.EIO)
    return untried


def _offered(door: _Door) -> abi.Feature:
    """Ask which features the kernel knows; a successful UFFDIO_API can be made once per descriptor."""
    if not door.is_open:
        return abi.Feature(0)
    fd = door.opener(door.flags)
    try:
        answer = ioctl(fd, abi.Request.API, abi.API.pack(abi.UFFD_API, 0, 0))
    finally:
        os.close(fd)
    return abi.Feature(abi.API.unpack(answer)[1])


def _run_trials(door: _Door, release: str) -> Iterator[Finding]:
    guard = _trials.user_mode_only if door.user_mode_only else _trials.sigbus_guarded
    experiments = _trials.trials()
    for subject in _SUBJECTS:
        if not door.is_open:
            yield subject.found(available=False, evidence="not tried", fix="a userfaultfd, see above")
            continue
        error: int | None = None
        try:
            evidence = experiments[subject.name](guard(door.opener))
        except OSError as failure:
            error, evidence = failure.errno, _say(failure.errno or errno.EIO)
        except _trials.TrialError as failure:
            evidence = str(failure)
        else:
            yield subject.found(available=True, evidence=evidence)
            continue
        fix = _remedies.for_feature(subject.name, subject.since, release, error)
        yield subject.found(available=False, evidence=evidence, fix=fix)


def probe() -> KernelReport:
    """Try everything and report it.

    The order of the doors is the engine's: the device, the system call, the system call for user mode only.
    """
    release = os.uname().release
    filtered, container = _facts.seccomp_filtered(), _facts.in_container()
    device = _try_door(abi.UFFD_DEVICE, open_by_device, user_mode_only=False)
    syscall = _try_door("userfaultfd(2)", open_by_syscall, user_mode_only=False)
    restricted = _try_door("userfaultfd(2)", open_by_syscall, user_mode_only=True)
    full = next((door for door in (device, syscall) if door.is_open), None)
    best = full or restricted
    access = Access.FULL if full else Access.USER_MODE if best.is_open else Access.NONE
    # The trials want USER_MODE_ONLY, by whichever door knows it.
    guarded = (_try_door(door.name, door.opener, user_mode_only=True) for door in (restricted, device))
    trial_door = next((door for door in guarded if door.is_open), best)
    setting = _facts.huge_page_setting()
    huge = setting in ("always", "madvise")
    doors = (
        _USERFAULTFD.found(
            available=best.is_open,
            evidence=str(best),
            fix=_remedies.for_no_access(restricted.error, filtered=filtered, container=container),
        ),
        _FULL_ACCESS.found(
            available=full is not None,
            evidence=f"{device}; {syscall}",
            fix=_remedies.for_full_access(device_error=device.error, filtered=filtered, container=container),
        ),
        _DEVICE.found(
            available=device.is_open,
            evidence=str(device),
            fix=_remedies.for_device(device.error, release, container=container),
        ),
        _HUGE_PAGES.found(
            available=huge,
            evidence=f"transparent_hugepage/enabled: {setting}",
            fix=_remedies.for_huge_pages(setting),
        ),
    )
    return KernelReport(
        release=release,
        architecture=architecture(),
        page_size=mmap.PAGESIZE,
        access=access,
        opened_by=best.name if best.is_open else "",
        unprivileged_userfaultfd=_facts.unprivileged_sysctl(),
        ptrace_capability=_facts.has_ptrace_capability(),
        seccomp_filtered=filtered,
        container=container,
        features=_offered(trial_door),
        huge_pages=setting,
        huge_page_size=_facts.huge_page_size(),
        memory_limit=_facts.memory_limit(),
        physical_memory=_facts.physical_memory(),
        findings=(*doors, *_run_trials(trial_door, release)),
    )
