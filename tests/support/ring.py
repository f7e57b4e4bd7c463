"""An io_uring in plain Python, just enough to have the kernel access memory in its ways."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import TracebackType
from typing import Any, Final, Self

import pytest

__all__ = ["ASYNC", "READ", "READ_FIXED", "RECEIVE", "Ring", "needs_io_uring"]

# The same on all architectures but alpha.
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_GETEVENTS = 1
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 0, 1
_SQES_AT = 0x10000000
_SQE, _CQE = 64, 16

READ_FIXED, READ, RECEIVE = 4, 22, 27  # opcodes
ASYNC: Final = 1 << 4  # IOSQE_ASYNC: by a worker thread from the beginning

_libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL


def _syscall(number: int, *arguments: Any) -> int:
    words = (ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"io_uring: {os.strerror(code)}")
    return result


def needs_io_uring() -> None:
    """Skip where there is none. Not in a child: a skip does not come through."""
    try:
        os.close(_syscall(_SETUP, 1, ctypes.create_string_buffer(120)))
    except OSError:
        pytest.skip("needs io_uring")


class Ring:
    """A ring with room for one request at a time. A context manager.

    Its worker threads stay until the process ends: only in a child.
    """

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)
        self.fd = _syscall(_SETUP, 1, parameters)
        entries, completions = struct.unpack_from("=II", parameters, 0)
        self._sq = struct.unpack_from(
            "=7I", parameters, 40
        )  # head, tail, mask, entries, flags, dropped, array
        self._cq = struct.unpack_from("=6I", parameters, 80)  # head, tail, mask, entries, overflow, cqes
        length = max(self._sq[6] + 4 * entries, self._cq[5] + _CQE * completions)
        self._rings = mmap.mmap(self.fd, length)  # both, since Linux 5.4
        self._sqes = mmap.mmap(self.fd, entries * _SQE, offset=_SQES_AT)

    def register(self, address: int, length: int) -> None:
        """Register a buffer: all of its pages are faulted in, and pinned."""
        _syscall(_REGISTER, self.fd, _REGISTER_BUFFERS, struct.pack("@PN", address, length), 1)

    def unregister(self) -> None:
        """Let go of the buffer."""
        _syscall(_REGISTER, self.fd, _UNREGISTER_BUFFERS, None, 0)

    def submit(
        self, opcode: int, fd: int, address: int, length: int, *, offset: int = 0, flags: int = 0
    ) -> int:
        """Make a request and wait for it; return its result, negative for an error. The GIL is free meanwhile."""
        sqe = struct.pack("=BBHiQQIIQH22x", opcode, flags, 0, fd, offset, address, length, 0, 1, 0)
        self._sqes[:_SQE] = sqe
        (tail,) = struct.unpack_from("=I", self._rings, self._sq[1])
        (mask,) = struct.unpack_from("=I", self._rings, self._sq[2])
        struct.pack_into("=I", self._rings, self._sq[6] + 4 * (tail & mask), 0)
        struct.pack_into("=I", self._rings, self._sq[1], tail + 1)
        _syscall(_ENTER, self.fd, 1, 1, _GETEVENTS, None, 0)
        (head,) = struct.unpack_from("=I", self._rings, self._cq[0])
        (mask,) = struct.unpack_from("=I", self._rings, self._cq[2])
        _, result = struct.unpack_from("=Qi", self._rings, self._cq[5] + _CQE * (head & mask))
        struct.pack_into("=I", self._rings, self._cq[0], head + 1)
        return int(result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rings.close()
        self._sqes.close()
        os.close(self.fd)
