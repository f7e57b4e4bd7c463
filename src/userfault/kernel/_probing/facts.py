"""What the system's files say about it: one function per thing, None if the file is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from userfault._cgroups import memory_limit

__all__ = [
    "has_ptrace_capability",
    "huge_page_setting",
    "huge_page_size",
    "in_container",
    "memory_limit",
    "misc_minor",
    "physical_memory",
    "seccomp_filtered",
    "unprivileged_sysctl",
]

_CAP_SYS_PTRACE: Final = 19


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _status_field(name: str) -> str | None:
    for line in (_read("/proc/self/status") or "").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    return None


def has_ptrace_capability() -> bool:
    """Tell whether CAP_SYS_PTRACE counts: the kernel asks for it in the initial user namespace."""
    effective = _status_field("CapEff")
    if effective is None or not int(effective, 16) >> _CAP_SYS_PTRACE & 1:
        return False
    mapping = (_read("/proc/self/uid_map") or "").split()
    return mapping == ["0", "0", str(2**32 - 1)]


def seccomp_filtered() -> bool:
    """Tell whether a seccomp filter is on this process, as container engines put it."""
    return _status_field("Seccomp") == "2"


def in_container() -> bool:
    """Guess whether this process runs in a container; used only to choose the wording of a remedy."""
    marks = (
        "/.dockerenv",
        "/run/.containerenv",  # Podman
        "/run/systemd/container",  # LXC, systemd-nspawn
        "/var/run/secrets/kubernetes.io",
    )
    return any(Path(mark).exists() for mark in marks)


def misc_minor(path: str = "/proc/misc") -> int | None:
    """Return the minor number of the userfaultfd device, which is another one after each boot."""
    for line in (_read(path) or "").splitlines():
        minor, _, name = line.strip().partition(" ")
        if name == "userfaultfd":
            return int(minor)
    return None


def unprivileged_sysctl() -> int | None:
    """Read `vm.unprivileged_userfaultfd` (Linux 5.2)."""
    value = _read("/proc/sys/vm/unprivileged_userfaultfd")
    return int(value) if value is not None else None


def huge_page_setting() -> str | None:
    """Name the transparent huge page mode that is set: "always", "madvise" or "never"."""
    for word in (_read("/sys/kernel/mm/transparent_hugepage/enabled") or "").split():
        if word.startswith("["):
            return word.strip("[]")
    return None


def huge_page_size() -> int | None:
    """Return the size of a transparent huge page in bytes."""
    value = _read("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    return int(value) if value is not None else None


def physical_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
