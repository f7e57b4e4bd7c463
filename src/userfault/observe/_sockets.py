"""Where the sockets of watched processes are, and who may use them.

A process listens at `PID.sock` in a folder of the user's own (`options.socket_dirs`). The folder is closed to others
(0700), so is the socket (0600), and who connects is asked of the kernel (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from userfault.errors import KernelError, PrivilegeError

__all__ = ["Peer", "connect", "leave", "listen", "peer_of", "remove_stale", "waiting_pids"]

_SUFFIX = ".sock"
_BACKLOG = 16
_TRIES = 5


class Peer(NamedTuple):
    """The process at the other end, as it was when it connected or listened."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """Return who is at the other end of a connected socket."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return Peer(pid, uid)


def listen(folder: Path, pid: int) -> tuple[socket.socket, Path]:
    """Make the folder if need be, and in it the socket of process `pid`.

    Raises:
        PrivilegeError: The folder belongs to somebody else, or is open to others.
        KernelError: No socket can be made there.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return _listen(folder, pid)
        except KernelError as error:
            # Another process that stopped serving took the folder with it, just after we had found it.
            if error.errno != errno.ENOENT or tries == _TRIES:
                raise


def _listen(folder: Path, pid: int) -> tuple[socket.socket, Path]:
    _make(folder)
    remove_stale(folder)
    path = folder / f"{pid}{_SUFFIX}"
    fresh = f"{pid}.new"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _inside(folder) as short:
            unlink(folder / fresh)  # of a process that had our number
            listener.bind(f"{short}/{fresh}")
            os.chmod(folder / fresh, 0o600)
            listener.listen(_BACKLOG)
            # Only now: whoever finds a socket under its name on which nobody listens takes it for a stale one.
            os.rename(folder / fresh, path)
    except OSError as error:
        listener.close()
        unlink(folder / fresh)
        raise KernelError(f"{path}: {error.strerror}", call="bind", errno=error.errno) from error
    listener.setblocking(False)
    return listener, path


def _make(folder: Path) -> None:
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError as error:
        raise KernelError(
            f"{folder}: {error.strerror}; it is to hold the socket of `userfault watch`. Set XDG_RUNTIME_DIR "
            "or TMPDIR to a folder that can be written",
            call="mkdir",
            errno=error.errno,
        ) from error
    # In a temporary folder that everybody may write, anybody can have made it before us, or a link in its place.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PrivilegeError(
            f"{folder} is not a folder of this user, so no socket is made in it; set XDG_RUNTIME_DIR to one that is",
            call="mkdir",
            errno=errno.EPERM,
        )
    if found.st_mode & 0o077:
        raise PrivilegeError(
            f"{folder} is open to others (mode {stat.S_IMODE(found.st_mode):o}): chmod 700 {folder}",
            call="mkdir",
            errno=errno.EPERM,
        )


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[str]:
    # An address of a Unix socket has at most 107 bytes, a folder's name may have more: go through a descriptor of it.
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def connect(folder: Path, pid: int, timeout_s: float) -> socket.socket:
    """Connect to the socket of process `pid` in `folder`.

    Raises:
        FileNotFoundError: There is none.
        ConnectionRefusedError: Nobody listens there any more.
        PermissionError: This user may not.
        BlockingIOError: Too many wait for an answer already.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        with _inside(folder) as short:
            connection.connect(f"{short}/{pid}{_SUFFIX}")
    except BaseException:
        connection.close()
        raise
    return connection


def waiting_pids(folder: Path) -> list[int]:
    """Return the processes that have a socket in `folder`, dead ones included."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    stems = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def remove_stale(folder: Path) -> None:
    """Remove the sockets of processes that ended without doing so."""
    for pid in waiting_pids(folder):
        try:
            connect(folder, pid, timeout_s=0.1).close()
        except ConnectionRefusedError:
            # Asked of the socket, not of the process table: its process may live where we do not see it.
            unlink(folder / f"{pid}{_SUFFIX}")
        except OSError:
            continue


def leave(path: Path) -> None:
    """Remove a socket, and its folder if no other process has one there."""
    unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(path.parent)


def unlink(path: Path) -> None:
    """Remove a file that may be gone already."""
    with contextlib.suppress(OSError):
        os.unlink(path)
