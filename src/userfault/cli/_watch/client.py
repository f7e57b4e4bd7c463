"""Asking a process for its counters."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from pathlib import Path
from typing import Any, Self

from userfault import options
from userfault.errors import PrivilegeError, UserfaultError
from userfault.observe._snapshot import VERSION
from userfault.observe._sockets import connect, peer_of, remove_stale, waiting_pids

__all__ = ["BusyError", "Client", "EndedError", "command_of", "watchable_pids"]

_CONNECT_TIMEOUT_S = 1.0
_END_TIMEOUT_MS = 500
_SWITCH_ON = (
    "start it with USERFAULT_WATCH=1 in its environment, or have it call `userfault.observe.serve()`; its memories can "
    "be seen from then on"
)


class BusyError(UserfaultError):
    """No answer yet: a thread of the process waits for a page and holds the GIL, or it was stopped."""


class EndedError(UserfaultError):
    """The process ended, or closed its socket."""


class Client:
    """A connection to one process, which must be closed."""

    def __init__(self, pid: int) -> None:
        """Connect.

        Raises:
            UserfaultError: There is no such process, or it opened no socket; the message says what to do.
            PrivilegeError: It is another user's.
            BusyError: Too many wait for it already.
        """
        self.pid = pid
        self._connection = _connection_to(pid)
        self._process = _opened(pid)
        self._received = bytearray()
        self._asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()
        if self._process is not None:
            os.close(self._process)
            self._process = None

    def ask(self, timeout_s: float) -> dict[str, Any]:
        """Return the counters of the process. After `BusyError` the next call waits for the same answer.

        Raises:
            BusyError: None within `timeout_s` seconds.
            EndedError: There will be none.
            UserfaultError: The answer makes no sense.
        """
        end = time.monotonic() + timeout_s
        try:
            if not self._asked:
                self._connection.settimeout(timeout_s)
                self._connection.sendall(b"stats\n")
                self._asked = True
            while b"\n" not in self._received:
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._connection.settimeout(left)
                part = self._connection.recv(1 << 16)
                if not part:
                    raise EndedError(self._end())
                self._received += part
        except TimeoutError:
            raise BusyError(
                f"process {self.pid} has not answered for {timeout_s:g} s: it is stopped, or one of its threads "
                "waits for a page and holds the GIL"
            ) from None
        except OSError as error:
            raise EndedError(self._end()) from error
        self._asked = False
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received[:] = rest
        return self._checked(line)

    def _end(self) -> str:
        if _ends(self._process):
            return f"process {self.pid} ended"
        return (
            f"process {self.pid} closed the connection: it stopped serving, or is watched by too many already"
        )

    def _checked(self, line: bytes) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise UserfaultError(
                f"process {self.pid} sent something else than JSON: {line[:40]!r}"
            ) from error
        if "error" in document:
            raise UserfaultError(f"process {self.pid}: {document['error']}")
        if document.get("version") != VERSION:
            raise UserfaultError(
                f"process {self.pid} speaks version {document.get('version')} of the protocol, this `userfault watch` "
                f"version {VERSION}: use the one of that process's installation"
            )
        return document


def _connection_to(pid: int) -> socket.socket:
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        raise UserfaultError(
            f"there is no process {pid}; `userfault watch` lists those that can be watched"
        ) from None
    for folder in _folders(uid):
        try:
            connection = connect(folder, pid, _CONNECT_TIMEOUT_S)
        except BlockingIOError:
            raise BusyError(
                f"process {pid} does not take connections now: too many wait for it already"
            ) from None
        except OSError:
            continue
        # Another process may have left its socket where it could not be removed, before this one got its number.
        if peer_of(connection).pid == pid:
            return connection
        connection.close()
    if uid != os.geteuid() != 0:
        raise PrivilegeError(f"process {pid} belongs to user {uid}: only that user and root may watch it")
    raise UserfaultError(
        f"process {pid} cannot be watched: it opened no socket. To switch that on, {_SWITCH_ON}"
    )


def _folders(uid: int) -> list[Path]:
    # The effective user of a process owns its files in /proc, unless it is not dumpable: then root does.
    own = options.socket_dirs()
    return own if uid == os.geteuid() else [*options.socket_dirs(uid), *own]


def _opened(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # it ended
        return None


def _ends(process: int | None) -> bool:
    # Sockets are closed early in a process's end: give it the time to come to it.
    if process is None:
        return True
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(_END_TIMEOUT_MS))


def _is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def watchable_pids() -> list[int]:
    """Return this user's processes that can be watched; sockets of dead ones are removed."""
    found: set[int] = set()
    for folder in options.socket_dirs():
        remove_stale(folder)
        found.update(pid for pid in waiting_pids(folder) if _is_there(pid))
    return sorted(found)


def command_of(pid: int) -> str:
    """Return the command line of a process, "" if it cannot be seen."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join(argument for argument in arguments if argument)
