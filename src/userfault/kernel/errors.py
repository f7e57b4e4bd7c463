"""The kernel's errors as exceptions: one class per errno, with the cause and the remedy in the message.

```
UserfaultError
├── UffdError            OSError             the kernel refused; any errno without a class of its own
│   ├── UffdPermissionError  PermissionError     EPERM, EACCES   not allowed: which permission, how to get it
│   ├── NotRegisteredError   LookupError         ENOENT          range not registered, unmapped, or crosses a mapping
│   ├── RangeBusyError                           EBUSY           another userfaultfd has it; a page cannot move
│   ├── PageExistsError      FileExistsError     EEXIST          there is a page already
│   ├── AgainError           BlockingIOError     EAGAIN          the address space is changing, or no message waits
│   ├── InvalidRequestError  ValueError          EINVAL          the kernel does not know or allow this combination
│   ├── BadAddressError                          EFAULT          the source cannot be read, the file ends before
│   ├── NoMemoryError        MemoryError         ENOMEM          out of memory, or the owner's memory is gone
│   ├── TargetExitedError    ProcessLookupError  ESRCH           the process that owned the memory has exited
│   ├── NotSupportedError    NotImplementedError ENOSYS, ENOTTY  this kernel cannot do it
│   │   └── FeatureError                         (handshake)     a required feature is missing
│   ├── HardwareError                            EIO, EHWPOISON  a broken or poisoned page
│   ├── TooManyFilesError                        EMFILE, ENFILE  no descriptor is free
│   ├── NoSpaceError                             ENOSPC          the file system or pool is full
│   └── InterruptedCallError InterruptedError    EINTR           a signal ended the call in the middle
└── UsageError           ValueError          refused before the kernel was asked; names the value
    └── NotInitialisedError                      before the handshake, or a second handshake
```

`EAGAIN`, `EEXIST`, `ENOENT` and `ESRCH` of the fill requests are normal events in a handler's life
(`serving` deals with them); the `try_…` methods return them as values.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING, Final

from userfault.errors import UserfaultError

if TYPE_CHECKING:
    from userfault.kernel.abi import Feature

__all__ = [
    "AgainError",
    "BadAddressError",
    "FeatureError",
    "HardwareError",
    "InterruptedCallError",
    "InvalidRequestError",
    "NoMemoryError",
    "NoSpaceError",
    "NotInitialisedError",
    "NotRegisteredError",
    "NotSupportedError",
    "PageExistsError",
    "RangeBusyError",
    "TargetExitedError",
    "TooManyFilesError",
    "UffdError",
    "UffdPermissionError",
    "UsageError",
    "error_from_errno",
]

_EHWPOISON: Final = 133  # not in Python's errno module before 3.14


class UffdError(UserfaultError, OSError):
    """The kernel refused a request.

    Attributes:
        errno: The kernel's error number.
        call: The request, by the header's name ("UFFDIO_COPY"), or the system call.
        address: First byte of the range that it was about, None if there was none.
        length: Length of that range in bytes, None if there was none.
        done: Bytes that were done before the error. They stay done, and their waiters were woken.
        remedy: What to do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        call: str = "",
        address: int | None = None,
        length: int | None = None,
        done: int = 0,
        remedy: str = "",
    ) -> None:
        super().__init__(message)
        self.errno = errno
        self.call = call
        self.address = address
        self.length = length
        self.done = done
        self.remedy = remedy


class UffdPermissionError(UffdError, PermissionError):
    """EPERM or EACCES: this process may not do it."""


class NotRegisteredError(UffdError, LookupError):
    """ENOENT: the range is not registered, not mapped, or not inside one mapping."""


class RangeBusyError(UffdError):
    """EBUSY: registered by another userfaultfd, or a page that is pinned or shared and cannot move."""


class PageExistsError(UffdError, FileExistsError):
    """EEXIST: a page is there already. Whoever waits for it must be woken."""


class AgainError(UffdError, BlockingIOError):
    """EAGAIN: the address space is changing and events wait to be read, or there is no message."""


class InvalidRequestError(UffdError, ValueError):
    """EINVAL: this kernel does not know, or this memory does not allow, what was asked."""


class BadAddressError(UffdError):
    """EFAULT: the source cannot be read, or there is no page of the file to map."""


class NoMemoryError(UffdError, MemoryError):
    """ENOMEM: out of memory or over a limit, or (REGISTER, UNREGISTER) the owner's memory is gone."""


class TargetExitedError(UffdError, ProcessLookupError):
    """ESRCH: the process whose memory it was has exited."""


class NotSupportedError(UffdError, NotImplementedError):
    """ENOSYS, ENOTTY and their like: this kernel, or this descriptor, does not have the call."""


class FeatureError(NotSupportedError):
    """A required feature is not offered by this kernel.

    Attributes:
        missing: What was required and is not there.
        available: Everything that the kernel offers.
    """

    def __init__(self, message: str, *, missing: Feature, available: Feature, remedy: str = "") -> None:
        super().__init__(message, errno=_errno.EINVAL, call="UFFDIO_API", remedy=remedy)
        self.missing = missing
        self.available = available

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_feature_error, (str(self), self.missing, self.available, self.remedy)


def _rebuild_feature_error(message: str, missing: Feature, available: Feature, remedy: str) -> FeatureError:
    return FeatureError(message, missing=missing, available=available, remedy=remedy)


class HardwareError(UffdError):
    """EIO or EHWPOISON: the page is broken, or poisoned by UFFDIO_POISON."""


class TooManyFilesError(UffdError):
    """EMFILE or ENFILE: no file descriptor is free."""


class NoSpaceError(UffdError):
    """ENOSPC: the file system or the pool of huge pages is full."""


class InterruptedCallError(UffdError, InterruptedError):
    """EINTR: a signal ended the call in the middle; what was done stays done."""


class UsageError(UserfaultError, ValueError):
    """Refused before the kernel was asked; the message names the value and the remedy."""


class NotInitialisedError(UsageError):
    """A request before the handshake (UFFDIO_API), or a second handshake."""


_CLASSES: Final[dict[int, type[UffdError]]] = {
    _errno.EPERM: UffdPermissionError,
    _errno.EACCES: UffdPermissionError,
    _errno.ENOENT: NotRegisteredError,
    _errno.EBUSY: RangeBusyError,
    _errno.EEXIST: PageExistsError,
    _errno.EAGAIN: AgainError,
    _errno.EINVAL: InvalidRequestError,
    _errno.EFAULT: BadAddressError,
    _errno.ENOMEM: NoMemoryError,
    _errno.ESRCH: TargetExitedError,
    _errno.ENOSYS: NotSupportedError,
    _errno.ENOTTY: NotSupportedError,
    _errno.ENODEV: NotSupportedError,
    _errno.ENXIO: NotSupportedError,
    _errno.EOPNOTSUPP: NotSupportedError,
    _errno.EIO: HardwareError,
    _EHWPOISON: HardwareError,
    _errno.EMFILE: TooManyFilesError,
    _errno.ENFILE: TooManyFilesError,
    _errno.ENOSPC: NoSpaceError,
    _errno.EINTR: InterruptedCallError,
}

_FILLS: Final = ("UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_CONTINUE", "UFFDIO_POISON", "UFFDIO_MOVE")
_EXITED: Final = (
    "the process that owned this memory has exited or replaced its program: drop everything of it"
)
_EVENTS_WAIT: Final = (
    "an mremap, munmap, madvise or fork of the memory's owner is under way: read the waiting events, of"
    " every userfaultfd of that process, then try again"
)
_NOT_REGISTERED: Final = (
    "the range is not registered, not mapped, or crosses from one mapping into another (mprotect, madvise and"
    " mlock split mappings too): read the waiting events, then go page by page"
)
_NO_PRIVILEGE: Final = (
    "to trap the faults of system calls as well, make /dev/userfaultfd readable and writable for this user, or"
    " run with CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1; or ask for OpenWay.USER_MODE_ONLY;"
    " in a container also allow userfaultfd in the seccomp profile"
)

# Cause and remedy where they depend on the request; the numbers are those of docs/kernel-api.md.
_REMEDIES: Final[dict[tuple[str, int], str]] = {
    ("userfaultfd", _errno.EPERM): _NO_PRIVILEGE,
    ("userfaultfd", _errno.EACCES): _NO_PRIVILEGE,
    ("userfaultfd", _errno.ENOSYS): (
        "this kernel is built without CONFIG_USERFAULTFD, or a seccomp filter pretends so"
    ),
    ("userfaultfd", _errno.ENOENT): "there is no /dev/userfaultfd before Linux 6.1: use OpenWay.SYSCALL",
    ("userfaultfd", _errno.EINVAL): (
        "this kernel does not know a flag (UFFD_USER_MODE_ONLY came with Linux 5.11)"
    ),
    ("UFFDIO_API", _errno.EPERM): (
        "EVENT_FORK needs CAP_SYS_PTRACE in the initial user namespace, however the descriptor was opened: run"
        " as root or with that capability, or leave the feature out"
    ),
    ("UFFDIO_API", _errno.EINVAL): (
        "a feature that this kernel does not have, RWP_ASYNC without RWP, or a second handshake"
    ),
    ("UFFDIO_REGISTER", _errno.EBUSY): (
        "already registered by another userfaultfd (one mapping has one), or, since Linux 7.3, by this one with"
        " a WP or RWP mode that the new mode would drop: unregister it first"
    ),
    ("UFFDIO_REGISTER", _errno.EPERM): (
        "the mapping may never become writable (shared, of a file that was opened for reading only): open the"
        " file for writing too"
    ),
    ("UFFDIO_REGISTER", _errno.EINVAL): (
        "nothing is mapped there, or this kind of memory cannot have this mode (MINOR wants shared memory or"
        " huge pages, WP on a file wants WP_ASYNC alone, RWP wants its feature and no WP), or a huge page is cut"
    ),
    ("UFFDIO_REGISTER", _errno.ENOMEM): "the owner of the memory has exited, or there are too many mappings",
    ("UFFDIO_UNREGISTER", _errno.EINVAL): (
        "nothing is mapped there, another userfaultfd has it, or a huge page is cut"
    ),
    ("UFFDIO_UNREGISTER", _errno.ENOMEM): "the owner of the memory has exited",
    ("UFFDIO_COPY", _errno.EFAULT): (
        "the source cannot be read, or the page lies beyond the end of the mapped file"
    ),
    ("UFFDIO_COPY", _errno.EINVAL): (
        "write_protect=True on a range that is not registered for WP, memory of a kind that cannot be filled, or"
        " a huge page is cut"
    ),
    ("UFFDIO_ZEROPAGE", _errno.EINVAL): "huge pages have no zero page: copy a page of zeros",
    ("UFFDIO_CONTINUE", _errno.EFAULT): "the file has no page there (a hole): copy one in",
    ("UFFDIO_CONTINUE", _errno.EINVAL): (
        "anonymous memory has no page cache; or the page lies beyond the end of the file; or write_protect=True"
        " on a range that is not registered for WP"
    ),
    ("UFFDIO_MOVE", _errno.EBUSY): (
        "the page is pinned, or shared with a forked child or by KSM: copy it, then drop the source with"
        " MADV_DONTNEED"
    ),
    ("UFFDIO_MOVE", _errno.ENOENT): (
        "the source has a hole (allow_holes=True lets it pass), or a range is not registered or crosses a mapping"
    ),
    ("UFFDIO_MOVE", _errno.EINVAL): (
        "both ranges must be private anonymous memory of the calling process with the same protection, the"
        " target registered with this userfaultfd"
    ),
    ("UFFDIO_WRITEPROTECT", _errno.ENOENT): (
        "a mapping in the range is not registered for WP; those before it are already changed"
    ),
    (
        "UFFDIO_RWPROTECT",
        _errno.ENOENT,
    ): "a mapping in the range is not registered for RWP; nothing was changed",
    ("UFFDIO_SET_MODE", _errno.EINVAL): "only RWP_ASYNC can be switched, and only where RWP was negotiated",
    ("PAGEMAP_SCAN", _errno.EPERM): (
        "check_wpasync=True, and a mapping in the range is not registered for WP with WP_ASYNC"
    ),
    ("PAGEMAP_SCAN", _errno.EINVAL): "a category or flag that this kernel does not know",
    ("PAGEMAP_SCAN", _errno.ENOTTY): "PAGEMAP_SCAN came with Linux 6.7",
    ("read", _errno.EINVAL): "the handshake was not made yet, or the buffer is too small",
    ("read", _errno.EOPNOTSUPP): (
        "before Linux 6.10 a blocking userfaultfd cannot be read without waiting: open it with nonblocking=True"
    ),
    ("read", _errno.EMFILE): "a fork event brings a descriptor: close some; the event waits",
}

_UNKNOWN_REQUEST: Final = {
    "UFFDIO_MOVE": "6.8",
    "UFFDIO_POISON": "6.6",
    "UFFDIO_CONTINUE": "5.13",
    "UFFDIO_WRITEPROTECT": "5.7",
    "UFFDIO_RWPROTECT": "7.3",
    "UFFDIO_SET_MODE": "7.3",
}


def _remedy(call: str, errno: int) -> str:
    found = _REMEDIES.get((call, errno))
    if found is None:
        if errno == _errno.EAGAIN:
            found = "there is no message" if call == "read" else _EVENTS_WAIT
        elif errno == _errno.ESRCH:
            found = _EXITED
        elif errno == _errno.ENOENT:
            found = _NOT_REGISTERED
        elif errno == _errno.EEXIST and call in _FILLS:
            found = (
                "a page is there already: wake its waiters (on huge pages, first look whether it really is)"
            )
        elif errno == _errno.ENOMEM:
            found = "out of memory, or over a control group's limit: make room and try again"
        elif errno == _errno.EFAULT:
            found = "an address of the request cannot be accessed"
        elif errno in (_errno.EIO, _EHWPOISON):
            found = "the page's memory is broken or poisoned: it cannot be had back"
        elif errno in (_errno.EMFILE, _errno.ENFILE):
            found = "close descriptors, or raise RLIMIT_NOFILE (ulimit -n)"
        elif errno == _errno.EINVAL and call in _UNKNOWN_REQUEST:
            found = "a mode bit or a kind of memory that does not go with it"
        else:
            found = ""
    if errno == _errno.EINVAL and call in _UNKNOWN_REQUEST:
        found += f"; or the kernel is older than Linux {_UNKNOWN_REQUEST[call]}"
    return found


def error_from_errno(
    errno: int,
    *,
    call: str,
    address: int | None = None,
    length: int | None = None,
    done: int = 0,
    remedy: str | None = None,
    path: str | None = None,
) -> UffdError:
    """Make the exception for an error number of the kernel.

    Args:
        errno: The positive error number.
        call: The request by the header's name, or the system call.
        address: First byte of the range in question.
        length: Its length in bytes.
        done: Bytes that were done before the error.
        remedy: What to do, in place of what is known for this request and number.
        path: The file that it was about.

    Returns:
        An exception of the class that fits, to be raised by the caller.

    Example:
        >>> import errno
        >>> from userfault.kernel.errors import error_from_errno
        >>> error = error_from_errno(errno.EEXIST, call="UFFDIO_COPY", address=0x7000, length=4096)
        >>> isinstance(error, FileExistsError), error.done
        (True, 0)
    """
    where = f" {path}" if path else ""
    if address is not None:
        where += f" [{address:#x}, +{length:#x})" if length is not None else f" {address:#x}"
    text = _remedy(call, errno) if remedy is None else remedy
    name = _errno.errorcode.get(errno, "EHWPOISON" if errno == _EHWPOISON else f"errno {errno}")
    progress = f" after {done} bytes" if done else ""
    message = f"{call}{where}: {name}, {os.strerror(errno)}{progress}" + (f" ({text})" if text else "")
    kind = _CLASSES.get(errno, UffdError)
    return kind(message, errno=errno, call=call, address=address, length=length, done=done, remedy=text)
