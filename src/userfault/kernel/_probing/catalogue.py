"""Everything that the probe tries: what it is called, since when it exists, what it is good for, and its trial.

One trial often answers several questions (a bit, an ability, a type of memory); it is run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from userfault.kernel._kinds import MemoryKind
from userfault.kernel._probing import call_trials, message_trials, trials
from userfault.kernel._probing.findings import Finding, Group, Level, Negotiation, Status
from userfault.kernel.abi import FEATURE_SINCE, Feature, PageCategory

if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.kernel._probing.trials import Lab

__all__ = ["SUBJECTS", "Subject", "Trial"]


@dataclass(frozen=True, slots=True)
class Trial:
    """An experiment, equal to every other that does the same.

    Attributes:
        function: Returns what it saw, or raises TrialError, UntriedError or OSError.
        memory: The type of memory to do it on, None if that is no question.
        bare: Whether it needs no userfaultfd.
    """

    function: Callable[..., str]
    memory: MemoryKind | None = None
    bare: bool = False

    def __call__(self, lab: Lab | None) -> str:
        return self.function(lab) if self.memory is None else self.function(lab, self.memory)


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing to find out; the attributes are those of `Finding`.

    Attributes:
        trial: How to find out.
        lacking: What else than its age a kernel may lack for it.
    """

    name: str
    group: Group
    since: str
    level: Level
    negotiated: Negotiation
    enables: str
    trial: Trial | None
    memory: str = ""
    lacking: str = ""

    def found(self, status: Status, evidence: str, fix: str = "") -> Finding:
        """Make the finding."""
        remedy = "" if status is Status.WORKS else fix
        return Finding(
            self.name, self.group, self.memory, self.since, self.level, self.negotiated, self.enables,
            status, evidence, remedy,
        )  # fmt: skip


_R, _U, _O = Level.REQUIRED, Level.USED, Level.OPTIONAL
_REQUESTED, _OFFERED = Negotiation.REQUESTED, Negotiation.OFFERED
_REGISTERED, _CALLED = Negotiation.REGISTERED, Negotiation.CALLED
_ANON, _SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
_PRIVATE_SHMEM, _HUGETLB, _PRIVATE_HUGETLB = (
    MemoryKind.PRIVATE_SHMEM,
    MemoryKind.HUGETLB,
    MemoryKind.PRIVATE_HUGETLB,
)

# What else than its age a kernel may lack.
_NEEDS_WP = "an architecture with CONFIG_HAVE_ARCH_USERFAULTFD_WP"
_NEEDS_MARKERS = "a kernel built with CONFIG_PTE_MARKER_UFFD_WP=y"
_NEEDS_MINOR = "a 64-bit architecture with CONFIG_HAVE_ARCH_USERFAULTFD_MINOR"
_NEEDS_RWP = "a 64-bit kernel built with CONFIG_USERFAULTFD_RWP=y"
_NEEDS_MONITOR = "a kernel built with CONFIG_PROC_PAGE_MONITOR=y"
_NEEDS_TRACKING = "a kernel built with CONFIG_PTE_MARKER_UFFD_WP=y and CONFIG_PROC_PAGE_MONITOR=y"
_NEEDS_SOFT_DIRTY = "a kernel built with CONFIG_MEM_SOFT_DIRTY=y (write tracking does its work)"
_NEEDS_HUGETLB = "a kernel built with CONFIG_HUGETLBFS=y"
_NEEDS_SHMEM = "a kernel built with CONFIG_SHMEM=y"
_NEEDS_ADVISE = "a kernel built with CONFIG_ADVISE_SYSCALLS=y, and a seccomp profile that allows the call"
_FILE_SYSTEM = "files on ext4, XFS or btrfs; overlayfs and tmpfs do not know it"

_ASKED: Final[dict[Feature, Trial]] = {}


def _ask(feature: Feature) -> Trial:
    return _ASKED.setdefault(feature, Trial(trials.negotiated(feature)))


def _events(lab: Lab) -> str:
    """Try the three events that any process may have."""
    for trial in (message_trials.remap_event, message_trials.remove_event, message_trials.unmap_event):
        trial(lab)
    return "mremap, munmap and madvise were reported"


def _ability(
    name: str, since: str, enables: str, trial: Trial | None, lacking: str = "", *, level: Level = _O
) -> Subject:
    return Subject(name, Group.ABILITY, since, level, _CALLED, enables, trial, lacking=lacking)


def _abilities() -> tuple[Subject, ...]:
    # Those without a trial are answered by the probe itself: from the doors, and from a setting.
    return (
        _ability("userfaultfd", "4.3", "everything else", None, level=_R),
        _ability(
            "missing pages", "4.3", "arrays that fill themselves when touched",
            Trial(trials.copy, _ANON), level=_R,
        ),
        _ability(
            "kernel-mode faults", "4.3", "os.write(fd, a), a.tofile() on missing pages",
            None, level=_U,
        ),
        _ability("huge pages", "2.6.38", "2 MiB pages for large fills, with move", None, level=_U),
        _ability(
            "poison", "6.6", "an error where a block's source is gone",
            Trial(trials.poison, _ANON), _NEEDS_MARKERS, level=_U,
        ),
        _ability(
            "write protection", "5.7", "arrays that can be written; snapshots",
            Trial(trials.write_protect, _ANON), _NEEDS_WP, level=_U,
        ),
        _ability(
            "move", "6.8", "fast fills of 2 MiB; safe direct I/O",
            Trial(trials.move, _ANON), level=_U,
        ),
        _ability(
            "batched eviction", "6.13", "many blocks evicted with one TLB flush",
            Trial(call_trials.batched_advice, bare=True), _NEEDS_ADVISE, level=_U,
        ),
        _ability("device", "6.1", "kernel-mode faults by file permission", None),
        _ability(
            "write tracking", "6.7", "which pages were written; no handler",
            Trial(trials.write_tracking, _ANON), _NEEDS_TRACKING,
        ),
        _ability(
            "access tracking", "7.3", "which pages were touched; no handler",
            Trial(trials.access_tracking, _ANON), _NEEDS_RWP,
        ),
        _ability(
            "access traps", "7.3", "stopping every access; safe eviction",
            Trial(trials.rw_protect, _ANON), _NEEDS_RWP,
        ),
        _ability(
            "shared memory", "4.11", "filling memory that processes share",
            Trial(trials.copy, _SHMEM), _NEEDS_SHMEM,
        ),
        _ability(
            "minor faults", "5.14", "mapping shared pages without copying them",
            Trial(trials.trap_minor, _SHMEM), _NEEDS_MINOR,
        ),
        _ability("events", "4.11", "mremap, munmap, madvise of another process", Trial(_events)),
        _ability("fork events", "4.11", "following another process's children", _ask(Feature.EVENT_FORK)),
    )  # fmt: skip


def _feature(
    bit: Feature, enables: str, trial: Trial, lacking: str = "", *,
    negotiated: Negotiation = _REQUESTED, level: Level = _O,
) -> Subject:  # fmt: skip
    assert bit.name is not None, bit
    return Subject(
        bit.name, Group.FEATURE, FEATURE_SINCE[bit], level, negotiated, enables, trial, lacking=lacking
    )


def _features() -> tuple[Subject, ...]:
    messages = message_trials
    return (
        _feature(
            Feature.PAGEFAULT_FLAG_WP, "write protection, anonymous",
            Trial(trials.write_protect, _ANON), _NEEDS_WP, negotiated=_OFFERED,
        ),
        _feature(Feature.EVENT_FORK, "another process's children", _ask(Feature.EVENT_FORK)),
        _feature(
            Feature.EVENT_REMAP, "memory that a process moves", Trial(messages.remap_event)
        ),
        _feature(
            Feature.EVENT_REMOVE, "pages that a process drops", Trial(messages.remove_event)
        ),
        _feature(
            Feature.MISSING_HUGETLBFS, "filling huge pages (hugetlb)", _ask(Feature.MISSING_HUGETLBFS),
            _NEEDS_HUGETLB, negotiated=_OFFERED,
        ),
        _feature(
            Feature.MISSING_SHMEM, "filling shared memory", Trial(trials.copy, _SHMEM), _NEEDS_SHMEM,
            negotiated=_OFFERED,
        ),
        _feature(
            Feature.EVENT_UNMAP, "memory that a process unmaps", Trial(messages.unmap_event)
        ),
        _feature(Feature.SIGBUS, "faults as signals, no handler", _ask(Feature.SIGBUS)),
        _feature(Feature.THREAD_ID, "which thread touched a page", Trial(messages.thread_id)),
        _feature(
            Feature.MINOR_HUGETLBFS, "mapping cached huge pages", _ask(Feature.MINOR_HUGETLBFS),
            _NEEDS_MINOR, negotiated=_OFFERED,
        ),
        _feature(
            Feature.MINOR_SHMEM, "mapping cached pages", Trial(trials.trap_minor, _SHMEM),
            _NEEDS_MINOR, negotiated=_OFFERED,
        ),
        _feature(
            Feature.EXACT_ADDRESS, "the address, not its page", Trial(messages.exact_address)
        ),
        _feature(
            Feature.WP_HUGETLBFS_SHMEM, "write protection, shared memory",
            Trial(trials.write_protect, _SHMEM), _NEEDS_MARKERS, negotiated=_OFFERED,
        ),
        _feature(
            Feature.WP_UNPOPULATED, "write protection, empty pages",
            Trial(trials.write_protect_empty), _NEEDS_MARKERS,
        ),
        _feature(
            Feature.POISON, "an error instead of a page",
            Trial(trials.poison, _ANON), _NEEDS_MARKERS, negotiated=_OFFERED, level=_U,
        ),
        _feature(
            Feature.WP_ASYNC, "write tracking, of files too",
            Trial(trials.write_tracking, _ANON), _NEEDS_TRACKING,
        ),
        _feature(
            Feature.MOVE, "filling and taking out by moving", Trial(trials.move, _ANON),
            negotiated=_OFFERED, level=_U,
        ),
        _feature(Feature.RWP, "access traps", Trial(trials.rw_protect, _ANON), _NEEDS_RWP),
        _feature(
            Feature.RWP_ASYNC, "access tracking", Trial(trials.access_tracking, _ANON),
            _NEEDS_RWP,
        ),
    )  # fmt: skip


def _operation(
    name: str, since: str, memories: tuple[MemoryKind, ...], enables: str, function: Callable[..., str],
    lacking: str = "", *, negotiated: Negotiation = _REGISTERED,
) -> tuple[Subject, ...]:  # fmt: skip
    """Ask for an operation on each of some types of memory; its name tells the registration mode as well."""
    return tuple(
        Subject(name, Group.MEMORY, since, _O, negotiated, enables, Trial(function, memory), memory, lacking)
        for memory in memories
    )


def _operations() -> tuple[Subject, ...]:
    anon, shmem = (_ANON,), (_SHMEM, _PRIVATE_SHMEM)
    hugetlb = (_HUGETLB, _PRIVATE_HUGETLB)
    every = (*anon, *shmem, *hugetlb)
    fill, zero = "filling a missing page", "filling with zeros"
    return (
        *_operation("COPY (MISSING)", "4.3", anon, fill, trials.copy),
        *_operation("COPY (MISSING)", "4.11", (*shmem, *hugetlb), fill, trials.copy),
        *_operation("ZEROPAGE (MISSING)", "4.3", anon, zero, trials.zeropage),
        *_operation("ZEROPAGE (MISSING)", "4.14", shmem, zero, trials.zeropage),
        *_operation(
            "POISON (MISSING)", "6.6", every, "an error instead of a page", trials.poison, _NEEDS_MARKERS
        ),
        *_operation("MOVE (MISSING)", "6.8", anon, "filling without a copy", trials.move),
        *_operation(
            "CONTINUE (MINOR)", "5.14", shmem, "mapping a cached page", trials.trap_minor, _NEEDS_MINOR
        ),
        *_operation(
            "CONTINUE (MINOR)", "5.13", hugetlb, "mapping a cached page", trials.trap_minor, _NEEDS_MINOR
        ),
        *_operation("WRITEPROTECT (WP)", "5.7", anon, "stopping writers", trials.write_protect, _NEEDS_WP),
        *_operation(
            "WRITEPROTECT (WP)", "5.19", (*shmem, *hugetlb), "stopping writers", trials.write_protect,
            _NEEDS_MARKERS,
        ),
        *_operation(
            "WP_ASYNC (WP)", "6.7", (*every, MemoryKind.FILE), "which pages were written", trials.write_tracking,
            _NEEDS_TRACKING, negotiated=_REQUESTED,
        ),
        *_operation(
            "RWPROTECT (RWP)", "7.3", every, "stopping readers and writers", trials.rw_protect, _NEEDS_RWP,
            negotiated=_REQUESTED,
        ),
        *_operation(
            "RWP_ASYNC (RWP)", "7.3", every, "which pages were read", trials.access_tracking, _NEEDS_RWP,
            negotiated=_REQUESTED,
        ),
    )  # fmt: skip


def _category(
    category: PageCategory, since: str, enables: str, lacking: str, *, bare: bool = True
) -> Subject:
    assert category.name is not None, category
    trial = Trial(trials.category(category), bare=bare)
    return Subject(category.name, Group.PAGEMAP, since, _O, _CALLED, enables, trial, lacking=lacking)


def _pagemap() -> tuple[Subject, ...]:
    known = PageCategory
    return (
        _category(known.WPALLOWED, "6.7", "memory that is write-tracked", _NEEDS_TRACKING, bare=False),
        _category(known.WRITTEN, "6.7", "pages written since they were protected", _NEEDS_TRACKING, bare=False),
        _category(known.FILE, "6.7", "pages of files and shared memory", _NEEDS_MONITOR),
        _category(known.PRESENT, "6.7", "resident pages", _NEEDS_MONITOR),
        _category(known.SWAPPED, "6.7", "pages in swap", _NEEDS_MONITOR),
        _category(known.PFNZERO, "6.7", "pages read and never written", _NEEDS_MONITOR),
        _category(known.HUGE, "6.7", "huge pages", _NEEDS_MONITOR),
        _category(known.SOFT_DIRTY, "6.8", "pages written since clear_refs", _NEEDS_SOFT_DIRTY),
        _category(known.GUARD, "6.15", "guard pages", _NEEDS_MONITOR),
        _category(known.ACCESSED, "7.3", "pages touched since they were protected", _NEEDS_RWP, bare=False),
        Subject(
            "WP_MATCHING", Group.PAGEMAP, "6.7", _O, _CALLED, "finding and protecting again in one call",
            Trial(trials.protected_scan), lacking=_NEEDS_TRACKING,
        ),
    )  # fmt: skip


def _call(
    name: str, since: str, enables: str, trial: Trial, lacking: str = "", *,
    negotiated: Negotiation = _CALLED, level: Level = _O,
) -> Subject:  # fmt: skip
    return Subject(name, Group.CALL, since, level, negotiated, enables, trial, lacking=lacking)


def _calls() -> tuple[Subject, ...]:
    return (
        _call(
            "process_madvise on self", "6.13", "advice for many ranges in one call",
            Trial(call_trials.batched_advice, bare=True), _NEEDS_ADVISE, level=_U,
        ),
        _call(
            "MADV_GUARD_INSTALL", "6.13", "pages that refuse access",
            Trial(call_trials.guard, bare=True),
        ),
        _call(
            "MADV_POPULATE_WRITE", "5.14", "pages mapped before they are touched",
            Trial(call_trials.populate, bare=True),
        ),
        _call("UFFDIO_WAKE", "4.3", "waking who waits for a page", Trial(message_trials.wake)),
        _call(
            "UFFDIO_SET_MODE", "7.3", "switching RWP_ASYNC on and off", Trial(trials.set_mode), _NEEDS_RWP,
            negotiated=_REQUESTED,
        ),
        _call(
            "RWF_NOWAIT on files", "4.14", "reading what is cached, no waiting",
            Trial(call_trials.nowait_reads, bare=True), _FILE_SYSTEM, level=_U,
        ),
        _call(
            "RWF_NOWAIT on userfaultfd", "6.10", "messages, no waiting, no O_NONBLOCK",
            Trial(call_trials.nowait_events),
        ),
    )  # fmt: skip


SUBJECTS: Final[tuple[Subject, ...]] = (*_abilities(), *_features(), *_operations(), *_pagemap(), *_calls())
