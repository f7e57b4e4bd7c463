"""The exact step that makes a missing thing work, as text for people.

Version numbers are compared here and nowhere else: they choose words, never behaviour.
"""

from __future__ import annotations

import errno
import re

__all__ = ["for_device", "for_feature", "for_full_access", "for_huge_pages", "for_no_access"]

_CONTAINER = "start the container with --device /dev/userfaultfd (or with --security-opt seccomp=unconfined)"
_SYSCTL = "sudo sysctl -w vm.unprivileged_userfaultfd=1"
_CHMOD = "sudo chmod a+rw /dev/userfaultfd"
_UDEV = 'echo \'KERNEL=="userfaultfd", MODE="0666"\' | sudo tee /etc/udev/rules.d/99-userfaultfd.rules'
_CAPABILITY = "run with CAP_SYS_PTRACE, for example as root or with docker run --cap-add SYS_PTRACE"

# What a kernel of sufficient age can still lack, by finding.
_BUILD_OPTIONS = {
    "poison": "a kernel built with pte markers (CONFIG_PTE_MARKER_UFFD_WP)",
    "write protection": "an architecture with CONFIG_HAVE_ARCH_USERFAULTFD_WP",
    "write protection of empty pages": "a kernel built with CONFIG_PTE_MARKER_UFFD_WP",
    "write tracking": "a kernel built with CONFIG_PTE_MARKER_UFFD_WP and CONFIG_PROC_PAGE_MONITOR",
    "access tracking": "a 64-bit kernel built with CONFIG_USERFAULTFD_RWP",
    "access traps": "a 64-bit kernel built with CONFIG_USERFAULTFD_RWP",
    "shared memory, missing": "a kernel built with CONFIG_SHMEM",
    "shared memory, minor": "an architecture with CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
}


def _version(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)?", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def for_feature(name: str, since: str, release: str, error: int | None) -> str:
    """Say how to get a feature that did not work in its trial."""
    if name == "fork events" and error == errno.EPERM:
        return _CAPABILITY
    if _version(release) < _version(since):
        return f"Linux {since} or newer (this is {release})"
    if name == "batched eviction":
        return "Linux 6.13 or newer and no seccomp filter on process_madvise and pidfd_open"
    return _BUILD_OPTIONS.get(name, "a kernel that does what its release should (report this one)")


def for_no_access(error: int | None, *, filtered: bool, container: bool) -> str:
    """Say how to get any userfaultfd at all."""
    if filtered or container:
        return _CONTAINER
    if error == errno.ENOSYS:
        return "a kernel built with CONFIG_USERFAULTFD=y"
    return _SYSCTL


def for_full_access(*, device_error: int | None, filtered: bool, container: bool) -> str:
    """Say how to trap faults of system calls too."""
    if (container or filtered) and device_error == errno.ENOENT:
        return _CONTAINER
    if container or filtered:
        return f"{_CHMOD} (on the host, if this is a container)"
    return _SYSCTL


def for_device(error: int | None, release: str, *, container: bool) -> str:
    """Say how to get the device."""
    if error == errno.ENOENT:
        if container:
            return "start the container with --device /dev/userfaultfd"
        if _version(release) < (6, 1):
            return f"Linux 6.1 or newer (this is {release})"
        return "a kernel built with CONFIG_USERFAULTFD=y, and devtmpfs on /dev"
    return _CHMOD if container else f"{_CHMOD}; to keep it: {_UDEV}"


def for_huge_pages(setting: str | None) -> str:
    """Say how to allow transparent huge pages to programs that ask for them."""
    if setting is None:
        return "a kernel built with CONFIG_TRANSPARENT_HUGEPAGE=y"
    return "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
