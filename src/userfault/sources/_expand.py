"""Files that cannot be read in ranges, made into files that can.

A compressed stream has no random access, and some servers send whole files only. Such a file is expanded
once, in bounded memory, into a scratch file that has no name, so that nothing is left behind whatever
happens.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from userfault import options
from userfault.errors import FormatError, SourceError
from userfault.sources._compression import Compression, by_encoding, by_magic, by_suffix, decompress
from userfault.sources._location import Location
from userfault.sources._ranges import RangeReader

__all__ = ["MustExpandError", "expand", "open_scratch"]


class MustExpandError(SourceError):
    """The file cannot be read in ranges: its content must be expanded first. `open()` does so by itself."""


def open_scratch() -> int:
    """Return a descriptor of a new file without a name in the scratch folder.

    Raises:
        SourceError: None can be made there.
    """
    import tempfile

    folder = options.scratch_dir()
    try:
        with tempfile.TemporaryFile(prefix="userfault-", dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise SourceError(
            f"no scratch file can be made in {folder}: {error.strerror}; "
            "USERFAULT_SCRATCH names another folder",
            errno=error.errno,
        ) from error


def expand(reader: RangeReader, fd: int, *, look: bool) -> int:
    """Write the content of a file, decompressed, to `fd`; return how many bytes that are.

    Args:
        reader: The file.
        fd: The scratch file.
        look: Whether a file that begins like a compressed one is one, whatever its name. Raw data may begin
            like anything.

    Raises:
        FormatError: The compressed data is damaged, or the name or server says a compression that it does not
            have.
        TruncatedError: It ends too early.
        SourceError: The file cannot be read, or the scratch file cannot be written.
        MissingExtraError: The package for this compression is not installed.
    """
    pieces = reader.stream()
    first = next(pieces, b"")
    kind = _compression_of(reader, first, look)
    content = _chain(first, pieces)
    if kind is not None:
        content = decompress(content, kind, reader.location)
    written = 0
    for piece in content:
        _write(fd, piece, written, reader.location)
        written += len(piece)
    if kind is None and reader.nbytes is not None and written != reader.nbytes:
        raise SourceError(f"{reader.location} gave {written} bytes instead of {reader.nbytes}")
    return written


def _compression_of(reader: RangeReader, first: bytes, look: bool) -> Compression | None:
    if reader.encoding:
        return by_encoding(reader.encoding)
    named, begins = by_suffix(Location(reader.location).name), by_magic(first)
    if named is not None and begins is None:
        raise FormatError(
            f"{reader.location} is named like a {named} file but begins with {first[:6]!r}; "
            "format='raw' reads it as it is"
        )
    return begins if named is not None or look else None


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _write(fd: int, piece: bytes, offset: int, name: str) -> None:
    view = memoryview(piece)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            offset += count
            view = view[count:]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SourceError(
                f"{name} does not fit into the scratch folder {options.scratch_dir()} when expanded: "
                f"{error.strerror} after {offset} bytes; USERFAULT_SCRATCH names another folder",
                errno=error.errno,
            ) from error
        raise SourceError(
            f"the scratch file for {name} cannot be written: {error.strerror}", errno=error.errno
        ) from error
