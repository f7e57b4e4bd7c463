"""The frames of a trace file: how they stand in the file, and what damage to them means. See docs/trace-format.md."""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import TYPE_CHECKING

from userfault.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HEADER_BYTES", "MAGIC", "MAJOR", "MINOR", "FrameKind", "file_header", "frame", "frames_of"]

# The PNG trick: a byte above 127, both kinds of line end and Ctrl-Z show what a transfer as text has done to the file.
MAGIC = b"\x89UFT\r\n\x1a\n"
MAJOR, MINOR = 1, 0
_FILE = struct.Struct("<8sHHI")  # magic, major, minor, 0
_FRAME = struct.Struct("<BBHIII")  # kind, flags, 0, length, CRC of the payload, CRC of these first 12 bytes
HEADER_BYTES = _FILE.size
_ZLIB = 1
# Little is gained by more work: the columns are narrow before.
_LEVEL = 4


class FrameKind(IntEnum):
    """What a frame holds. Readers skip kinds that they do not know."""

    ABOUT = 1
    OBJECT = 2
    OBJECT_END = 3
    SAMPLES = 4
    EVENTS = 5
    STATE = 6
    END = 7


def file_header() -> bytes:
    """Return what a file begins with."""
    return _FILE.pack(MAGIC, MAJOR, MINOR, 0)


def frame(kind: FrameKind, payload: bytes | bytearray) -> bytes:
    """Return a frame, compressed if that makes it smaller."""
    flags, stored = 0, bytes(payload)
    if len(stored) > 64:
        packed = zlib.compress(stored, _LEVEL)
        if len(packed) < len(stored):
            flags, stored = _ZLIB, packed
    head = struct.pack("<BBHII", kind, flags, 0, len(stored), zlib.crc32(stored))
    return head + struct.pack("<I", zlib.crc32(head)) + stored


def frames_of(data: memoryview, name: str) -> Iterator[tuple[int, int, memoryview]]:
    """Yield offset, kind and payload of each frame that is there as a whole.

    Raises:
        TraceError: It is no trace, of a newer version, or damaged: the message has the offset.
    """
    _check_header(data, name)
    at = HEADER_BYTES
    while at + _FRAME.size <= len(data):
        kind, flags, _, length, crc, head_crc = _FRAME.unpack_from(data, at)
        if zlib.crc32(data[at : at + _FRAME.size - 4]) != head_crc:
            if not any(data[at:]):  # the file was made longer, and the power went before it was written
                return
            raise damaged(name, at, "a frame's header does not fit its checksum")
        begin = at + _FRAME.size
        if begin + length > len(data):
            return
        stored = data[begin : begin + length]
        if zlib.crc32(stored) != crc:
            raise damaged(name, at, "a frame does not fit its checksum")
        try:
            payload = memoryview(zlib.decompress(stored)) if flags & _ZLIB else stored
        except zlib.error as error:
            raise damaged(name, at, f"a frame cannot be decompressed ({error})") from None
        yield at, kind, payload
        at = begin + length


def damaged(name: str, offset: int, what: str) -> TraceError:
    """Return the error for damage at an offset."""
    return TraceError(
        f"{name} is damaged at byte {offset}: {what}; record again, or keep what stands before with "
        f"read_trace(..., salvage=True)"
    )


def _check_header(data: memoryview, name: str) -> None:
    if len(data) < HEADER_BYTES or data[:8] != MAGIC:
        if len(data) < HEADER_BYTES and bytes(data) == file_header()[: len(data)]:
            raise TraceError(f"{name} ends after {len(data)} bytes, before its header does: record again")
        raise TraceError(f"{name} is no trace: it does not begin as one (docs: the format of traces)")
    _, major, minor, _ = _FILE.unpack_from(data)
    if major > MAJOR:
        raise TraceError(
            f"{name} is a trace of format {major}.{minor}; this version reads up to {MAJOR}.x: upgrade userfault"
        )
