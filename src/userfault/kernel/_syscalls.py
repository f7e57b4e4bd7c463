"""The system calls that Python's standard library has no function for, through ctypes; errors are `OSError`.

ctypes releases the GIL around each call (`CDLL`), so a call that waits for a page fault blocks only its own
thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
from typing import TYPE_CHECKING, Final

from userfault.kernel._architecture import later_syscall_number, syscall_number
from userfault.kernel.abi import UFFD_DEVICE, Request

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ioctl", "madvise_process", "madvise_self", "open_by_device", "open_by_syscall", "process_madvise"]

_PROCESS_MADVISE: Final = later_syscall_number(440)
_DEFAULT_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK


@functools.cache
def _syscall() -> Callable[..., int]:
    # Loaded at the first use: `import userfault.kernel` shall cost nothing.
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def open_by_syscall(flags: int = _DEFAULT_FLAGS) -> int:
    """Open a userfaultfd with the system call.

    Raises:
        OSError: EPERM without privilege, ENOSYS without CONFIG_USERFAULTFD or behind a seccomp filter that
            pretends so, EINVAL for an unknown flag (`USER_MODE_ONLY` before Linux 5.11).
    """
    return _checked("userfaultfd", _syscall()(ctypes.c_long(syscall_number()), ctypes.c_int(flags)))


def open_by_device(flags: int = _DEFAULT_FLAGS, path: str = UFFD_DEVICE) -> int:
    """Open a userfaultfd through the device (Linux 6.1), for which only the file's permissions count.

    Raises:
        OSError: ENOENT without the device, EACCES or EPERM without permission.
    """
    device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # reading permission is enough
    try:
        return fcntl.ioctl(device, Request.NEW, flags)
    finally:
        os.close(device)


def ioctl(fd: int, request: Request, argument: bytes) -> bytes:
    """Issue one request with a packed structure and return the structure as the kernel left it.

    Raises:
        OSError: The kernel refused; the structure is lost, so this is not for requests with partial results.
    """
    return fcntl.ioctl(fd, request, argument)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def madvise_self(ranges: list[tuple[int, int]], advice: int) -> int:
    """Advise many `(address, length)` ranges of this process in one call, and return how many bytes were.

    Raises:
        OSError: EINVAL where process_madvise(2) does not know this advice, ENOSYS before Linux 5.10.
    """
    return madvise_process(os.getpid(), ranges, advice)


def madvise_process(pid: int, ranges: list[tuple[int, int]], advice: int) -> int:
    """Advise at most 1024 `(address, length)` ranges of a process, and return how many bytes were.

    The kernel stops at the first range that it refuses; the error is told only if it is the first of all.

    Raises:
        OSError: EPERM without CAP_SYS_NICE or the right to look at the process, ESRCH if there is none, ENOMEM where
            nothing is mapped, EINVAL for an advice that does not go with the memory, or that is for its owner only.
    """
    vector = (_Iovec * len(ranges))(*(_Iovec(address, length) for address, length in ranges))
    pidfd = os.pidfd_open(pid)
    try:
        return process_madvise(pidfd, ctypes.addressof(vector), len(ranges), advice)
    finally:
        os.close(pidfd)


def process_madvise(pidfd: int, vector: int, count: int, advice: int) -> int:
    """Advise `count` ranges, of which `vector` is the address of an array of `struct iovec`; return the bytes done.

    Raises:
        OSError: As `madvise_self`; ranges before the one that failed are done, and then their bytes are returned.
    """
    return _checked(
        "process_madvise",
        _syscall()(
            ctypes.c_long(_PROCESS_MADVISE),
            ctypes.c_int(pidfd),
            ctypes.c_void_p(vector),
            ctypes.c_size_t(count),
            ctypes.c_int(advice),
            ctypes.c_uint(0),
        ),
    )
