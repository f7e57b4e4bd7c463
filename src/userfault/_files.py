"""Opening the files that the engine reads and writes itself."""

from __future__ import annotations

import errno
import os

from userfault import options
from userfault.errors import ModeError, SourceError, SourceNotFoundError, TruncatedError
from userfault.sources._native import FileData

__all__ = ["check_scratch", "open_file"]

# Why open(2) may refuse to open a file for writing that can be read.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)


def open_file(source: FileData, name: str, *, write: bool) -> int:
    """Return a descriptor of the file, which the caller closes.

    Raises:
        ModeError: It can be read, but not written.
        SourceNotFoundError: It does not exist.
        TruncatedError: It is too short.
        SourceError: It cannot be read.
    """
    try:
        fd = os.open(source.path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SourceNotFoundError(
            f"{source.path} does not exist", source_name=name, errno=errno.ENOENT
        ) from None
    except OSError as error:
        if write and error.errno in _UNWRITABLE and os.access(source.path, os.R_OK):
            raise ModeError(
                f"{source.path} cannot be written: {error.strerror}. Mode 'r' reads it, mode 'c' keeps changes private "
                "to this process"
            ) from None
        raise SourceError(f"{source.path}: {error.strerror}", source_name=name, errno=error.errno) from error
    size = os.fstat(fd).st_size
    if size < source.offset + source.nbytes:
        os.close(fd)
        raise TruncatedError(
            f"{source.path} has {size} bytes, but {name} needs bytes up to {source.offset + source.nbytes}"
        )
    return fd


def check_scratch(name: str) -> None:
    """Check that there can be scratch files.

    Raises:
        SourceError: There cannot.
    """
    folder = options.scratch_dir()
    if not os.access(folder, os.W_OK | os.X_OK) or not os.path.isdir(folder):
        raise SourceError(
            f"{name}: no scratch file can be made in {folder}, which is no folder that may be written; "
            "USERFAULT_SCRATCH names another one",
            source_name=name,
        )
