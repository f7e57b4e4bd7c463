"""The binding to the C engine. Everything here releases the GIL while the engine works; nothing here decides anything.

`userfault.memory`, `userfault.pager` and `userfault.workers` are its only users. Errors are `EngineError` with a
positive errno; those modules map them to `userfault.errors`.
"""

import sys
from typing import Any, Final, final

from typing_extensions import Buffer, disjoint_base

EXTENT: Final[int]
"""Bytes of an extent (2 MiB): what prefetch fills at once, and the largest block."""
MAX_WORKERS: Final[int]
TRACE_RECORD_SIZE: Final[int]
READ: Final[int]
LOAD: Final[int]
DROP: Final[int]
STOP: Final[int]
WRITE: Final[int]
FLUSH: Final[int]
STORE_NONE: Final[int]
STORE_SOURCE: Final[int]
STORE_SCRATCH: Final[int]
STORE_STAGED: Final[int]
DELIVERY_THREAD: Final[int]
DELIVERY_DIRECT: Final[int]
MAX_FAILURES: Final[int]
"""Failed blocks that one flush describes; there may be more."""

class EngineError(Exception):
    """An engine call failed.

    Attributes:
        errno: Positive error number.
        message: What a source or the engine said of it, "" if nothing.
        block: The block that it is about, 0 if none.
    """

    errno: int
    message: str
    block: int
    def __init__(self, errno: int, message: str = "", block: int = 0) -> None: ...

def host() -> dict[str, Any]:
    """Return what this kernel and user can do (`struct uf_host` in `engine/uf.h`); probed once."""

def direct_armed() -> bool:
    """Return whether the engine's handler of SIGBUS, which direct delivery needs, is the one that stands there."""

def direct_arm() -> None:
    """Put it there, in front of the one that does."""

@final
class Pager:
    """A fault thread, its budget and its workers (`uf_pager_*` and `uf_source_*` in `engine/uf.h`)."""

    def __new__(
        cls,
        *,
        limit: int,
        workers: int,
        argv: list[bytes],
        env: list[bytes],
        linger_ns: int,
        deadline_ns: int,
        attempts: int,
        backoff_ns: int,
        user_mode_only: bool = False,
        no_extents: bool = False,
        scratch_dir: bytes | None = None,
        no_move: bool = False,
    ) -> Pager: ...
    def shutdown(self) -> None: ...
    def set_limit(self, limit: int) -> None: ...
    def tune(self, cpu: int, spin_ns: int) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def add_source(self, blob: Buffer) -> int: ...
    def load_source(self, source: int, timeout_ns: int) -> tuple[bytes, bool, str]: ...
    def configure_source(self, source: int, affinity: bool, cache: int) -> None: ...
    def drop_source(self, source: int) -> None: ...

@disjoint_base
class Memory:
    """An address range that a pager serves; exports it as a buffer (`uf_memory_*` in `engine/uf.h`).

    The buffer is writable if there is a store. `_flush` returns what failed as (block, errno, message); that is empty
    if everything is durable, and whatever cannot be said of blocks is an `EngineError`.
    """

    @property
    def pager(self) -> Pager: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def nblocks(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def writable(self) -> bool: ...
    @property
    def extents(self) -> bool: ...
    @property
    def _exports(self) -> int: ...
    def __init__(
        self,
        pager: Pager,
        *,
        name: bytes,
        nbytes: int,
        block: int,
        kind: int,
        origin: object = None,
        fd: int = -1,
        offset: int = 0,
        source_id: int = -1,
        budget: int = 0,
        reserved: int = 0,
        readahead: bool = True,
        store: int = 0,
        write_unit: int = 0,
        delivery: int = 0,
    ) -> None: ...
    # Before 3.12 the buffer protocol has no names in Python.
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...
    def _close(self, quiet: bool = False) -> None: ...
    def _advise(self, advice: int) -> None: ...
    def _prefetch(self, first: int, count: int, wait: bool) -> None: ...
    def _evict(self, first: int, count: int) -> int: ...
    # Pairs of first block and count, uint64, of shape (n, 2).
    def _replay(self, extents: Buffer) -> None: ...
    def _watch(self, accesses: bool) -> None: ...
    def _unwatch(self, accesses: bool) -> None: ...
    # Three rows of uint64 with a bit for each block: accessed, written, blind.
    def _watched(self, out: Buffer, rearm: bool) -> None: ...
    def _flush(self, first: int, count: int) -> list[tuple[int, int, str]]: ...
    def _pin(self, first: int, count: int) -> None: ...
    def _unpin(self, first: int, count: int) -> None: ...
    @property
    def _forked(self) -> bool: ...
    def _states(self, first: int, out: Buffer) -> None: ...
    def _stats(self) -> dict[str, Any]: ...
    def _trace(self, capacity: int) -> None: ...
    def _trace_read(self, out: Buffer) -> tuple[int, int]: ...

@final
class Request:
    """What a worker took from the ring.

    `buffer` is the slot: to fill (READ), to write a reply to (LOAD), or read-only, with the bytes to store (WRITE).
    """

    @property
    def kind(self) -> int: ...
    @property
    def source(self) -> tuple[int, int]: ...
    @property
    def offset(self) -> int: ...
    @property
    def buffer(self) -> memoryview: ...
    def done(self, reply_length: int = 0) -> bool: ...
    def fail(self, message: bytes, reply_length: int = 0) -> bool: ...

@final
class Client:
    """A worker's side of the ring (`uf_client_*` in `engine/uf.h`)."""

    def __new__(cls, ring_fd: int, blob_fd: int, bell_fd: int, worker: int) -> Client: ...
    def take(self) -> Request: ...
    def blob(self, source: int) -> bytes: ...
    def cache(self, source: int) -> int: ...
    def generation(self, source: int) -> int: ...
