"""A worker process: takes requests from the engine's ring, has sources answer them.

Workers are generic and shared by all memories of a process. Each runs as many threads as its most concurrent source
asks for; a source that is not thread-safe is used by one of them at a time. The engine starts, watches and replaces
workers; a worker that is killed at any point costs a repeated read or write.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from userfault import _engine
from userfault.errors import WorkerError
from userfault.sources._abc import Description, PageSource, describe, flush_all, read_all, write_all

__all__ = ["main"]

_MOST_THREADS = 64
# The engine passes its descriptors under these numbers (engine/supervisor.c).
_RING_FD, _BLOB_FD, _BELL_FD = 3, 4, 5


class _Writes:
    """The writes of one source that are under way: a flush waits for those that came before it.

    Later ones do not wait for the flush. A commit may be slow, and a write that waited for it would look like one that
    hangs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[object] = set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count as under way."""
        ticket = object()
        with self._changed:
            self._running.add(ticket)
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(ticket)
                self._changed.notify_all()

    def wait(self) -> None:
        """Return when those that are under way now are done."""
        with self._changed:
            earlier = set(self._running)
            self._changed.wait_for(lambda: earlier.isdisjoint(self._running))


class _Loaded:
    """A source in this process, and who may use it."""

    def __init__(self, source: PageSource) -> None:
        self.source = source
        self.description: Description = describe(source)
        self.cache = -1
        self.free = threading.Semaphore(max(1, self.description.concurrency))
        self.writes = _Writes()
        self.users = 0
        self.dropped = False


class _Worker:
    def __init__(self, client: _engine.Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._sources: dict[tuple[int, int], _Loaded] = {}
        self._loading: dict[tuple[int, int], threading.Lock] = {}
        self._threads = 1

    def serve(self) -> NoReturn:
        while True:
            request = self._client.take()
            kind = request.kind
            if kind == _engine.READ:
                self._answer(request, _read)
            elif kind == _engine.WRITE:
                self._answer(request, _write)
            elif kind == _engine.FLUSH:
                self._answer(request, _flush)
            elif kind == _engine.LOAD:
                self._load(request)
            elif kind == _engine.DROP:
                self._drop()
            else:
                # The owner wants no answer, and may be gone: no clean-up that could wait for anything.
                os._exit(0)

    def _answer(self, request: _engine.Request, work: Callable[[_Loaded, _engine.Request], None]) -> None:
        loaded: _Loaded | None = None
        try:
            loaded = self._get(request.source)
            work(loaded, request)
        except BaseException as error:
            request.fail(_text(error).encode())
        else:
            request.done()
        if loaded is not None:
            self._release(loaded)

    def _load(self, request: _engine.Request) -> None:
        failed = False
        try:
            loaded = self._get(request.source)
            reply = pickle.dumps(loaded.description)
            self._release(loaded)
        except BaseException as error:
            failed, reply = True, _pickled(error)
        buffer = request.buffer
        if len(reply) > len(buffer):
            failed, reply = True, _pickled(WorkerError(f"the source's description has {len(reply)} bytes"))
        buffer[: len(reply)] = reply
        if failed:
            request.fail(b"loading failed", len(reply))
        else:
            request.done(len(reply))

    def _get(self, key: tuple[int, int]) -> _Loaded:
        """Return the source, loading it if need be; the caller gives it back with `_release`."""
        with self._lock:
            loaded = self._sources.get(key)
            if loaded is None:
                loading = self._loading.setdefault(key, threading.Lock())
        if loaded is None:
            with loading:
                loaded = self._sources.get(key)
                if loaded is None:
                    loaded = _Loaded(_open(self._client.blob(key[0])))
                    with self._lock:
                        self._sources[key] = loaded
                        self._loading.pop(key, None)
                    self._grow(loaded.description.concurrency)
        cache = self._client.cache(key[0])
        with self._lock:
            loaded.users += 1
            changed, loaded.cache = cache != loaded.cache, cache
        if changed:
            loaded.source.set_cache(cache)
        return loaded

    def _release(self, loaded: _Loaded) -> None:
        with self._lock:
            loaded.users -= 1
            last = loaded.dropped and loaded.users == 0
        if last:
            _close(loaded.source)

    def _drop(self) -> None:
        with self._lock:
            gone = [key for key in self._sources if self._client.generation(key[0]) != key[1]]
            idle = []
            for key in gone:
                loaded = self._sources.pop(key)
                loaded.dropped = True
                if loaded.users == 0:
                    idle.append(loaded)
        for loaded in idle:
            _close(loaded.source)

    def _grow(self, concurrency: int) -> None:
        with self._lock:
            wanted = min(concurrency, _MOST_THREADS) - self._threads
            self._threads += max(0, wanted)
        for _ in range(wanted):
            threading.Thread(target=self.serve, daemon=True).start()


def _read(loaded: _Loaded, request: _engine.Request) -> None:
    with loaded.free:
        read_all(loaded.source, request.offset, request.buffer)


def _write(loaded: _Loaded, request: _engine.Request) -> None:
    with loaded.writes.one(), loaded.free:
        write_all(loaded.source, request.offset, request.buffer)


def _flush(loaded: _Loaded, request: _engine.Request) -> None:
    loaded.writes.wait()
    with loaded.free:
        flush_all(loaded.source)


def _open(blob: bytes) -> PageSource:
    paths_length = int.from_bytes(blob[:8], "little")
    # The program may have changed sys.path since this process was started.
    for path in pickle.loads(blob[8 : 8 + paths_length]):
        if path not in sys.path:
            sys.path.append(path)
    recipe = pickle.loads(memoryview(blob)[8 + paths_length :])
    source: PageSource = recipe.load()
    return source


def _close(source: PageSource) -> None:
    try:
        source.close()
    except Exception:
        traceback.print_exc()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _pickled(error: BaseException) -> bytes:
    try:
        blob = pickle.dumps(error)
        pickle.loads(blob)  # an exception with a constructor of its own often pickles and does not unpickle
    except Exception:
        blob = pickle.dumps(WorkerError(_text(error)))
    return blob


def main() -> NoReturn:
    """Serve until the engine says stop. Runs in a process that the engine spawned."""
    _Worker(_engine.Client(_RING_FD, _BLOB_FD, _BELL_FD, int(sys.argv[-1]))).serve()
