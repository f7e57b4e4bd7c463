"""What this process may do with userfaultfd, found by trying it (docs/privileges.md says how to get more)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
from functools import cache

USERFAULTFD_IOC_NEW = 0xAA00
SYSCALL_NUMBERS = {"x86_64": 323, "aarch64": 282, "riscv64": 282}


@cache
def kernel_faults_missing() -> str | None:
    """Return why this process may not trap the kernel's own accesses to missing pages, or None if it may."""
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        by_device = f"/dev/userfaultfd: {error.strerror}"
    else:
        try:
            os.close(fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
        except OSError as error:
            by_device = f"/dev/userfaultfd: {error.strerror}"
        else:
            return None
        finally:
            os.close(device)
    number = SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        return by_device
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(number, os.O_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)
        return None
    return f"{by_device}; userfaultfd(2): {os.strerror(ctypes.get_errno())}"


def root_missing() -> str | None:
    """Return why this process is not root, or None if it is."""
    return None if os.geteuid() == 0 else f"user id {os.geteuid()} is not root"
