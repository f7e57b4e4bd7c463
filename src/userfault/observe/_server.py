"""The socket that answers `userfault watch`.

One thread, which sleeps until somebody asks. Each line that comes in is answered with one line: the document of
`snapshot()` in JSON.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import selectors
import socket
import threading
from pathlib import Path

from userfault import options
from userfault._log import logger
from userfault.errors import UserfaultError
from userfault.observe import _open_memories
from userfault.observe._snapshot import snapshot
from userfault.observe._sockets import leave, listen, peer_of

__all__ = ["serve", "serve_where_asked", "stop"]

_LONGEST_REQUEST = 4096
_MOST_CLIENTS = 16
# For a reader that does not read: the others wait meanwhile.
_SEND_TIMEOUT_S = 2.0
_RETRY_MS = 500


class _Server:
    def __init__(self, folder: Path) -> None:
        self.listener, self.path = listen(folder, os.getpid())
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._clients: dict[socket.socket, bytearray] = {}
        # A daemon: an open socket must not keep a program from ending. `stop` runs at exit.
        self._thread = threading.Thread(target=self._run, name="userfault-watch", daemon=True)

    def start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:
            self._close()
            leave(self.path)
            raise UserfaultError(f"{self.path}: no thread can be started for it ({error})") from error

    def stop(self) -> None:
        """End the thread and remove the socket."""
        leave(self.path)
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._close()

    def forget(self) -> None:
        """Close the descriptors in a forked child, which has no such thread: the socket is the parent's."""
        self._close()

    def _close(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
        self.listener.close()
        os.close(self._wake)

    def _run(self) -> None:
        # poll rather than epoll: a forked child shares an epoll set with its parent.
        with selectors.PollSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == self._wake:
                        return
                    if key.fileobj is self.listener:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket) and not self._serve(key.fileobj):
                        selector.unregister(key.fileobj)
                        del self._clients[key.fileobj]
                        key.fileobj.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            client, _ = self.listener.accept()
        except BlockingIOError:  # it went away meanwhile
            return
        except OSError as error:
            # Out of descriptors: the caller stays in the queue, and asking again at once would only burn a CPU.
            logger.warning("userfault watch: %s", error)
            asleep = select.poll()
            asleep.register(self._wake, select.POLLIN)
            asleep.poll(_RETRY_MS)
            return
        peer = peer_of(client)
        if peer.uid not in (os.geteuid(), 0):
            logger.warning("process %d of user %d may not watch this process", peer.pid, peer.uid)
            client.close()
        elif len(self._clients) >= _MOST_CLIENTS:
            logger.warning("process %d is watched by %d already", os.getpid(), _MOST_CLIENTS)
            client.close()
        else:
            client.settimeout(_SEND_TIMEOUT_S)
            self._clients[client] = bytearray()
            selector.register(client, selectors.EVENT_READ)

    def _serve(self, client: socket.socket) -> bool:
        """Take what has come, answer each whole line; return whether the client is to be kept."""
        pending = self._clients[client]
        try:
            part = client.recv(_LONGEST_REQUEST)
            pending += part
            *lines, rest = pending.split(b"\n")
            pending[:] = rest
            for line in lines:
                client.sendall(_answer(bytes(line).strip()))
        except OSError:
            return False
        return bool(part) and len(pending) < _LONGEST_REQUEST


def _answer(request: bytes) -> bytes:
    if request == b"stats":
        try:
            answer = snapshot()
        except Exception as error:
            # A bug of ours, whatever it is: it must not end the thread, and who asked is to hear of it.
            logger.exception("userfault watch: the counters cannot be read")
            answer = {"error": f"the counters cannot be read: {type(error).__name__}: {error}"}
    else:
        answer = {"error": f"{request.decode(errors='replace')!r} is not a request; send 'stats'"}
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


_lock = threading.Lock()
_server: _Server | None = None
_asked = False


def serve() -> Path:
    """Open the socket through which `userfault watch` looks at this process; it may be open already.

    Only this user and root may connect. A forked child is not watched through its parent's socket; it may call this
    itself. `USERFAULT_WATCH=1` has the first `userfault.open` do it.

    Returns:
        Where the socket is.

    Raises:
        PrivilegeError: The folder for it belongs to somebody else, or is open to others.
        KernelError: No socket can be made.

    Example:
        >>> from userfault import observe
        >>> observe.serve().name == f"{os.getpid()}.sock"
        True
        >>> observe.stop()
    """
    global _server
    with _lock:
        if _server is None:
            server = _Server(options.socket_dirs()[0])
            server.start()
            _server = server
            logger.info("userfault watch %d: listening at %s", os.getpid(), server.path)
        return _server.path


def stop() -> None:
    """Close the socket and end its thread; nothing if it is not open."""
    global _server
    with _lock:
        server, _server = _server, None
    if server is not None:
        server.stop()


def serve_where_asked() -> None:
    """Do `serve` if `USERFAULT_WATCH` asks for it, once in a process; a failure is logged."""
    global _asked
    if _asked or not options.watch():
        return
    _asked = True
    try:
        serve()
    except UserfaultError as error:
        logger.warning("USERFAULT_WATCH: this process cannot be watched: %s", error)


def _after_fork_in_child() -> None:
    global _lock, _server, _asked
    # Another thread may have held it.
    _lock = threading.Lock()
    _open_memories.after_fork()
    _asked = False
    server, _server = _server, None
    if server is not None:
        server.forget()


atexit.register(stop)
os.register_at_fork(after_in_child=_after_fork_in_child)
