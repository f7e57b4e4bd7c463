"""The ways to a userfaultfd, and which to take."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from userfault.kernel._syscalls import open_by_device, open_by_syscall
from userfault.kernel.abi import UFFD_DEVICE, OpenFlag
from userfault.kernel.errors import UffdError, UffdPermissionError, error_from_errno

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OpenWay", "Opened", "open_userfaultfd"]


class OpenWay(StrEnum):
    """How to get a userfaultfd."""

    ANY = "any"  # the three below in this order, on any error of the one before
    DEVICE = "device"  # /dev/userfaultfd, Linux 6.1: only the file's permissions count
    SYSCALL = "system call"  # CAP_SYS_PTRACE in the initial user namespace, or vm.unprivileged_userfaultfd=1
    USER_MODE_ONLY = "user mode only"  # Linux 5.11: anybody; a system call on a missing page gets EFAULT


@dataclass(frozen=True, slots=True)
class Opened:
    """A new descriptor and how it was had.

    Attributes:
        fd: The descriptor.
        way: DEVICE, SYSCALL or USER_MODE_ONLY.
    """

    fd: int
    way: OpenWay


_OPENERS: Final[dict[OpenWay, tuple[Callable[[int], int], int, str | None]]] = {
    OpenWay.DEVICE: (open_by_device, 0, UFFD_DEVICE),
    OpenWay.SYSCALL: (open_by_syscall, 0, None),
    OpenWay.USER_MODE_ONLY: (open_by_syscall, int(OpenFlag.USER_MODE_ONLY), None),
}


def _open(way: OpenWay, flags: int) -> Opened:
    opener, extra, path = _OPENERS[way]
    try:
        return Opened(opener(flags | extra), way)
    except OSError as failure:
        number = failure.errno if failure.errno is not None else errno.EIO
        raise error_from_errno(number, call="userfaultfd", path=path) from None


def open_userfaultfd(way: OpenWay, *, nonblocking: bool, cloexec: bool) -> Opened:
    """Open a userfaultfd that has not made its handshake yet.

    Falling back on *any* error, not on ENOENT alone, matters: in containers the device is often there and
    forbidden (EACCES, EPERM), and the system call allowed, or the other way round.

    Raises:
        UffdPermissionError: No way is open to this process; the message tells what each way said.
        UffdError: The chosen way failed with another error.
    """
    flags = (os.O_NONBLOCK if nonblocking else 0) | (os.O_CLOEXEC if cloexec else 0)
    if way is not OpenWay.ANY:
        return _open(way, flags)
    failures: list[UffdError] = []
    try:
        for one in (OpenWay.DEVICE, OpenWay.SYSCALL, OpenWay.USER_MODE_ONLY):
            try:
                return _open(one, flags)
            except UffdError as failure:
                failures.append(failure)
        last = failures[-1]
        message = "no way to a userfaultfd: " + "; ".join(str(failure) for failure in failures)
        kind = UffdPermissionError if isinstance(last, UffdPermissionError) else type(last)
        raise kind(message, errno=last.errno, call="userfaultfd", remedy=last.remedy)
    finally:
        # A failure holds this frame, and by it the caller's: in a cycle with this list, that would keep the object
        # that is being made, and so its descriptor, until the garbage collector comes.
        failures.clear()
