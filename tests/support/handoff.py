"""Messages as a sender of userfaultfds makes them, and as one that is wrong does."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
DEADLINE_S = 60.0


def header(
    body: bytes, *, magic: bytes = b"uffd", version: int = 1, kind: int = 1, length: int = -1
) -> bytes:
    return struct.pack("<4sHHI", magic, version, kind, len(body) if length < 0 else length)


def body(descriptors: int = 1, regions: Any = (), **more: Any) -> bytes:
    return json.dumps({"descriptors": descriptors, "regions": regions, **more}).encode()


def speak(sock: socket.socket, data: bytes, fds: list[int] | None = None) -> None:
    """Say something wrong."""
    socket.send_fds(sock, [data], fds or [])


def refusal(sock: socket.socket) -> str:
    """What the receiver answered."""
    sock.settimeout(DEADLINE_S)
    head = sock.recv(12)
    assert head[:8] == header(b"", kind=3)[:8]
    return sock.recv(65536).decode()


GOOD = {"start": 16 * PAGE, "length": PAGE, "page_size": PAGE, "offset": 0}
