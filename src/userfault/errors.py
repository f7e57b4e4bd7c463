"""The exceptions of userfault, one tree.

```
UserfaultError                       everything below; catch this to catch all of it
├── ClosedError        ValueError      a memory or source was used after close()
├── ExportedError      BufferError     a memory was to be closed while arrays of it are alive
├── RangeError         IndexError      a byte range or index that is not inside the memory
│                      ValueError
├── ModeError          ValueError      a mode that open() does not know, or that the source does not allow
├── OptionError        ValueError      an option of the process that is out of range here
├── BudgetError        ValueError      a malformed size, or a budget too small
├── FormatError        ValueError      data that is not what it is said to be
│   └── TruncatedError                 ... because it ends too early
├── UnsupportedDtypeError TypeError    elements that are not plain bytes (objects, strings of any length)
├── SourcePickleError  TypeError       a source that cannot be sent to a worker process
├── MissingExtraError  ImportError     an optional package is not installed
├── SourceError        OSError         a source failed while it was opened or read
│   ├── SourceNotFoundError FileNotFoundError   ... because it is not there
│   └── FlushError                     what was written could not all be stored
├── ForkedError        RuntimeError    flush() of a memory that a forked child inherited
├── TrackError         RuntimeError    a tracker was used after its end, or two trackers are in each other's way
│   └── UntrackableError               ... or nothing here can track this memory, or tell what was asked
├── TraceError         ValueError      a file is no trace, or a damaged one, or of a newer version
├── PrivilegeError     PermissionError this user may not use userfaultfd
├── KernelError        OSError         the kernel lacks something, or refused it
├── WorkerError        RuntimeError    a worker process did not start, or died
└── InternalError      RuntimeError    a bug in userfault; please report it
```

Each is also the built-in exception that fits, so that code which knows nothing of userfault still catches
it. All of them can be pickled with their attributes, because workers send theirs to the program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "BudgetError",
    "ClosedError",
    "ExportedError",
    "FlushError",
    "ForkedError",
    "FormatError",
    "InternalError",
    "KernelError",
    "MissingExtraError",
    "ModeError",
    "OptionError",
    "PrivilegeError",
    "RangeError",
    "SourceError",
    "SourceNotFoundError",
    "SourcePickleError",
    "TraceError",
    "TrackError",
    "TruncatedError",
    "UnsupportedDtypeError",
    "UntrackableError",
    "UserfaultError",
    "WorkerError",
    "WriteFailure",
]


def _rebuild(cls: type[UserfaultError], args: tuple[Any, ...], state: dict[str, Any]) -> UserfaultError:
    error = cls(*args)
    for name, value in state.items():
        setattr(error, name, value)
    return error


class UserfaultError(Exception):
    """Base of every exception that userfault raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError keeps errno outside of __dict__, and so does ImportError with its name: carry both by hand.
        state = dict(self.__dict__)
        if isinstance(self, OSError) and self.errno is not None:
            state["errno"] = self.errno
        if isinstance(self, ImportError) and self.name is not None:
            state["name"] = self.name
        return _rebuild, (type(self), self.args, state)


class ClosedError(UserfaultError, ValueError):
    """A memory, source or pager was used after `close()`."""


class ExportedError(UserfaultError, BufferError):
    """A memory cannot be closed while arrays or other buffers of it are alive."""


class RangeError(UserfaultError, IndexError, ValueError):
    """A byte range or index is not inside the memory or source."""


class ModeError(UserfaultError, ValueError):
    """`open()` does not know this mode, or the source does not allow it: it cannot be written, or not created."""


class OptionError(UserfaultError, ValueError):
    """An option of the process has a value that is out of range, or that this machine does not offer."""


class BudgetError(UserfaultError, ValueError):
    """A size is malformed, or a budget too small to hold even the blocks in flight."""


class FormatError(UserfaultError, ValueError):
    """Data is not what it is said to be: a bad header, a group instead of an array, corrupt compression."""


class TruncatedError(FormatError):
    """Data ends before its own header says that it ends."""


class UnsupportedDtypeError(UserfaultError, TypeError):
    """The elements are not plain fixed-size bytes, or need a package that defines their type."""


class SourcePickleError(UserfaultError, TypeError):
    """A source cannot be sent to the worker process that would have to read it."""


class MissingExtraError(UserfaultError, ImportError):
    """An optional package is missing; the message is the `pip install` line that brings it.

    Attributes:
        name: The module that could not be imported.
        extra: The extra of userfault that installs it.
    """

    extra: str = ""

    @classmethod
    def for_module(cls, module: str, extra: str, what: str) -> MissingExtraError:
        """Make the error for a `module` that is part of `extra` and is needed for `what`.

        Example:
            >>> from userfault.errors import MissingExtraError
            >>> print(MissingExtraError.for_module("h5py", "hdf5", "reading HDF5 datasets"))
            reading HDF5 datasets needs h5py: pip install 'userfault[hdf5]'
        """
        error = cls(f"{what} needs {module}: pip install 'userfault[{extra}]'")
        error.name = module
        error.extra = extra
        return error


class SourceError(UserfaultError, OSError):
    """A source failed while it was opened or read.

    Attributes:
        source_name: Name of the array or source, "" if it has none.
        offset: First byte of the read that failed, None if it was no read.
        length: Length of that read in bytes, None if it was no read.
        detail: The cause, as the source said it.
        errno: Error number of the system, None if there was none.
    """

    def __init__(
        self,
        message: str,
        *,
        source_name: str = "",
        offset: int | None = None,
        length: int | None = None,
        detail: str = "",
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.source_name = source_name
        self.offset = offset
        self.length = length
        self.detail = detail
        self.errno = errno


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The file, URL or array inside it does not exist."""


@dataclass(frozen=True)
class WriteFailure:
    """Bytes that could not be written to where they belong. They are still in memory, and still dirty.

    Attributes:
        offset: The first of them.
        length: How many there are.
        detail: What the store said.
        errno: Error number of the system, None if there was none.
    """

    offset: int
    length: int
    detail: str
    errno: int | None = None


class FlushError(SourceError):
    """What was written could not all be stored. The ranges that failed stay in memory; the next flush tries again.

    `offset`, `length`, `detail` and `errno` are those of the first failure.

    Attributes:
        failures: The ranges that failed, in ascending order, adjacent blocks with one cause taken together. Empty if
            all were written, but could not be made durable (a sync or a commit failed).
    """

    def __init__(
        self,
        message: str,
        *,
        source_name: str = "",
        failures: tuple[WriteFailure, ...] = (),
        detail: str = "",
        errno: int | None = None,
    ) -> None:
        first = failures[0] if failures else None
        super().__init__(
            message,
            source_name=source_name,
            offset=first.offset if first else None,
            length=first.length if first else None,
            detail=first.detail if first else detail,
            errno=first.errno if first else errno,
        )
        self.failures = failures


class ForkedError(UserfaultError, RuntimeError):
    """A forked child cannot write back a memory that it inherited: its changes are its own, the parent has the rest."""


class TrackError(UserfaultError, RuntimeError):
    """A tracker was used after its end, or two trackers of one memory are in each other's way."""


class UntrackableError(TrackError):
    """No method of this kernel can track this memory, or tell what was asked of it; the message says what would."""


class TraceError(UserfaultError, ValueError):
    """A file is no trace, or a damaged one, or was written by a newer version."""


class KernelError(UserfaultError, OSError):
    """The kernel lacks something that is needed, or refused a call.

    Attributes:
        call: The system call or ioctl that failed, "" if none was made.
        address: The address it was about, None if there was none.
        errno: Error number of the system, None if there was none.
    """

    def __init__(
        self, message: str, *, call: str = "", address: int | None = None, errno: int | None = None
    ) -> None:
        super().__init__(message)
        self.call = call
        self.address = address
        self.errno = errno


class PrivilegeError(UserfaultError, PermissionError):
    """This user, container or sandbox may not use userfaultfd.

    Attributes:
        call: The system call or file that was refused.
        errno: Error number of the system, None if there was none.
    """

    def __init__(self, message: str, *, call: str = "", errno: int | None = None) -> None:
        super().__init__(message)
        self.call = call
        self.errno = errno


class WorkerError(UserfaultError, RuntimeError):
    """A worker process did not start, broke its protocol, or died too often."""


class InternalError(UserfaultError, RuntimeError):
    """A bug in userfault itself. This should never happen; please report it with the message."""
