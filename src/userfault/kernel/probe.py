"""What this kernel, this user and this container can do with userfaultfd, found out by trying.

    >>> from userfault.kernel import probe
    >>> report = probe()
    >>> for finding in report.findings:
    ...     print(finding.title, finding.status, finding.fix)  # doctest: +SKIP

Probing takes some milliseconds, leaves nothing behind, needs no privilege and cannot hang (see `_probing`).
"""

from __future__ import annotations

from userfault.kernel import _syscalls
from userfault.kernel._probing.findings import (
    Access,
    Finding,
    Group,
    KernelReport,
    Level,
    Negotiation,
    Status,
)

__all__ = ["Access", "Finding", "Group", "KernelReport", "Level", "Negotiation", "Status", "probe"]


def probe() -> KernelReport:
    """Try everything and report it.

    The order of the ways to a userfaultfd is the engine's: the device, the system call, the system call for user
    mode only.

    Example:
        >>> from userfault.kernel import probe
        >>> report = probe()
        >>> report.find("COPY (MISSING)", "shmem").since
        '4.11'
        >>> report.usable or report.find("userfaultfd").fix != ""
        True
    """
    from userfault.kernel._probing.examination import examine

    return examine(_syscalls.open_by_device, _syscalls.open_by_syscall)
