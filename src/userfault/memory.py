"""PagedMemory: an address range, its source, its budget."""

from __future__ import annotations

import bisect
import errno
import os
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex

from userfault import _engine, pager
from userfault._ranges import block_runs
from userfault.errors import (
    BudgetError,
    ClosedError,
    ExportedError,
    RangeError,
    SourceError,
    SourceNotFoundError,
    TruncatedError,
    UserfaultError,
)
from userfault.sizes import format_size, parse_size
from userfault.sources._native import FileData, MemoryData, ZeroData
from userfault.sources._worker_data import WorkerData
from userfault.stats import MemoryStats, from_engine

if TYPE_CHECKING:
    import numpy as np

    from userfault.sources._abc import Description

__all__ = ["Advice", "PagedMemory", "find"]

Advice = Literal["normal", "random", "sequential"]

_DEFAULT_BLOCK = 64 << 10
# Fewer blocks than this, and those in flight are most of the budget.
_LEAST_BLOCKS = 8
_KIND_ZERO, _KIND_MEMORY, _KIND_FILE, _KIND_WORKER = range(4)
_ADVICE: dict[str, int] = {"normal": 0, "random": 1, "sequential": 2}
_TRACE_DTYPE = [("t_ns", "u8"), ("block", "u4"), ("kind", "u1"), ("pad", "u1", 3)]

_registry_lock = threading.Lock()
_registry: list[tuple[int, int, weakref.ref[PagedMemory]]] = []


def find(address: int) -> PagedMemory | None:
    """Return the open memory that holds `address`, None if there is none."""
    with _registry_lock:
        at = bisect.bisect_right(_registry, address, key=lambda entry: entry[0]) - 1
        if at < 0:
            return None
        start, stop, reference = _registry[at]
    memory = reference()
    return memory if memory is not None and not memory.closed and start <= address < stop else None


def _register(memory: PagedMemory) -> None:
    entry = (memory.address, memory.address + memory.nbytes, weakref.ref(memory, _forget))
    with _registry_lock:
        # An entry of a memory that is gone may still stand at the same address.
        _registry[:] = [old for old in _registry if old[2]() is not None]
        bisect.insort(_registry, entry, key=lambda e: e[0])


def _forget(reference: weakref.ref[PagedMemory]) -> None:
    # Runs wherever the last reference goes, perhaps inside one of the functions above: it must not wait for the lock.
    if _registry_lock.acquire(blocking=False):
        try:
            _registry[:] = [old for old in _registry if old[2] is not reference]
        finally:
            _registry_lock.release()


class PagedMemory(_engine.Memory):
    """Memory whose pages come from a source when they are first touched, and leave when the budget asks for it.

    It exports the read-only buffer protocol: `memoryview(memory)` and `numpy.frombuffer(memory)` are the memory itself.
    Arrays from `userfault.open` keep their memory alive through `.base`; `userfault.memory_of(array)` returns it.

    Attributes:
        name: What it is called in messages.
        nbytes: Length in bytes.
        block: Bytes that are loaded and evicted together, a power of two.
        nblocks: How many blocks there are; the last one may be cut short.
        address: Where it is, in this process.
        description: What a worker told of the source, None for files, memory and zeros.
        closed: Whether it was closed.
        extents: Whether 2 MiB extents (huge pages) may be used.
    """

    name: str
    description: Description | None
    _reserved: int

    def __init__(
        self,
        source: FileData | MemoryData | ZeroData | WorkerData,
        *,
        name: str,
        memory: SupportsIndex | str | None = None,
        block: SupportsIndex | str | None = None,
        readahead: bool = True,
    ) -> None:
        """Map `source`.

        Args:
            source: Where the bytes come from.
            name: What to call it in messages.
            memory: Budget of its own in bytes, or text such as `"256 MiB"`; None shares the process's budget
                (`userfault.limit`).
            block: Bytes to load and evict together: a power of two from the page size to 2 MiB. None: what the
                source asks for, else 64 KiB.
            readahead: Whether to load ahead of sequential and strided scans.

        Raises:
            BudgetError: The budget holds fewer than eight blocks, or a size is malformed.
            SourceError: The source cannot be opened.
            PrivilegeError: This user may not use userfaultfd.
            KernelError: The kernel refused, for want of memory, descriptors or threads.
        """
        self.name = name
        self.description = None
        budget = 0 if memory is None else parse_size(memory, what="memory")
        if memory is not None and not budget:
            raise BudgetError(
                "memory: a budget of 0 bytes holds no block; leave it out to share the process's budget"
            )
        if isinstance(source, WorkerData):
            source_id, description = pager.load(source.recipe)
            try:
                self.description = description
                if block is None and description.block:
                    block = _round_block(description.block, budget or pager.limit())
                self._open(source, description.nbytes, block, budget, readahead, source_id)
            except BaseException:
                # After the engine has it, the source goes with the memory.
                if not self.address:
                    pager.get().drop_source(source_id)
                raise
        else:
            self._open(source, source.nbytes, block, budget, readahead, -1)
        _register(self)

    def _open(
        self,
        source: object,
        nbytes: int,
        block: SupportsIndex | str | None,
        budget: int,
        readahead: bool,
        source_id: int,
    ) -> None:
        size = _block_size(block)
        share = budget or pager.limit()
        least = _LEAST_BLOCKS * size
        if share < min(least, -(-nbytes // size) * size):
            raise BudgetError(
                f"memory: {format_size(share)} is too small for {self.name}: blocks have {format_size(size)}, so give "
                f"{format_size(least)} or more, or a smaller block="
            )
        if nbytes <= 0:
            raise RangeError(f"{self.name} has {nbytes} bytes: there is nothing to map")
        self._reserved = 0
        kind, origin, fd, offset = _KIND_ZERO, None, -1, 0
        if isinstance(source, WorkerData):
            assert self.description is not None
            kind = _KIND_WORKER
            # Decoded chunks and resident blocks share the budget; neither starves the other.
            self._reserved = min(self.description.wants_cache, share // 2)
            pager.get().configure_source(source_id, affinity=self.description.affinity, cache=self._reserved)
        elif isinstance(source, FileData):
            kind, fd, offset = _KIND_FILE, _open_file(source, self.name), source.offset
        elif isinstance(source, MemoryData):
            kind, origin, offset = _KIND_MEMORY, source.buffer, source.offset
        try:
            super().__init__(
                pager.get(),
                name=self.name.encode(),
                nbytes=nbytes,
                block=size,
                kind=kind,
                origin=origin,
                fd=fd,
                offset=offset,
                source_id=source_id,
                budget=budget,
                reserved=self._reserved,
                readahead=readahead,
            )
        except _engine.EngineError as error:
            raise pager.engine_error(error, self.name) from None
        finally:
            if fd >= 0:
                os.close(fd)

    def __repr__(self) -> str:
        state = (
            "closed" if self.closed else f"{format_size(self.nbytes)} in blocks of {format_size(self.block)}"
        )
        return f"<userfault.PagedMemory {self.name!r}, {state}>"

    @property
    def budget(self) -> int:
        """Most bytes that may be resident, decoded chunks left out."""
        return self.stats().budget

    def prefetch(self, where: object = None, *, wait: bool = True) -> None:
        """Load what `where` needs before it is touched.

        Args:
            where: Bytes as `(start, stop)`, a `slice` or a `range`; an array that is a view of this memory; or None for
                all of it.
            wait: Return when everything is resident. False: have it loaded in the background, as far as it goes; errors
                show in `stats()`.

        Raises:
            SourceError: The source failed, after retries; its `detail` says how. The blocks stay absent.
            BudgetError: More than the budget holds.
            RangeError: `where` is not inside the memory.
            ClosedError: The memory is, or was meanwhile, closed.
        """
        self._check_open()
        runs = block_runs(self, where)
        wanted, budget = sum(count for _, count in runs) * self.block, self.stats().budget
        if wanted > max(budget, self.block):
            raise BudgetError(
                f"prefetch of {format_size(wanted)} of {self.name}: its budget holds {format_size(budget)}; ask for "
                "less at a time, or give it more memory"
            )
        for first, count in runs:
            try:
                self._prefetch(first, count, wait)
            except _engine.EngineError as error:
                raise self._source_error(error) from None

    def populate(self, where: object = None) -> None:
        """Make `where` resident, for a system call that cannot wait for faults.

        With `UFFD_USER_MODE_ONLY` (see `userfault doctor`) the kernel fails a `write(2)` or `send(2)` from a missing
        page with EFAULT. Nothing else should press on the same budget between this call and that one.

        Args:
            where: As in `prefetch`.

        Raises:
            BudgetError: It does not fit in the budget, or was evicted again by other accesses meanwhile.
            Exception: As `prefetch`.
        """
        runs = block_runs(self, where)
        for _ in range(3):
            self.prefetch(where)
            if all(self._resident(first, count) for first, count in runs):
                return
        raise BudgetError(f"populate of {self.name}: other accesses evicted it again; give it more memory")

    def evict(self, where: object = None) -> int:
        """Drop what is resident of the blocks that hold `where` (as in `prefetch`), and return how many bytes went.

        Raises:
            RangeError: `where` is not inside the memory.
            ClosedError: The memory is closed.
        """
        self._check_open()
        return sum(self._evict(first, count) for first, count in block_runs(self, where))

    def advise(self, advice: Advice) -> None:
        """Say how it will be read: `"random"` turns readahead off, `"sequential"` starts it at once.

        Raises:
            ValueError: `advice` is none of these.
            ClosedError: The memory is closed.
        """
        if advice not in _ADVICE:
            raise ValueError(f"advice {advice!r} is not one of {', '.join(map(repr, _ADVICE))}")
        self._check_open()
        self._advise(_ADVICE[advice])

    def stats(self) -> MemoryStats:
        """Return its counters; also after it was closed."""
        return from_engine(self._stats())

    def residency(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return one uint8 per block: 0 absent, 1 loading, 2 resident, 5 leaving, 7 poisoned (`enum uf_state`)."""
        import numpy as np

        states = np.zeros(self.nblocks, dtype=np.uint8)
        self._states(0, states.data)
        return states

    def _resident(self, first: int, count: int) -> bool:
        states = bytearray(count)
        self._states(first, states)
        return states == b"\2" * count

    def trace_start(self, capacity: int = 1 << 20) -> None:
        """Record what happens to blocks from now on, the newest `capacity` events (16 bytes each)."""
        self._check_open()
        self._trace(capacity)

    def trace_read(self) -> np.ndarray[Any, Any]:
        """Return the events since the last call, and forget them.

        Returns:
            A structured array: `t_ns` (CLOCK_MONOTONIC), `block`, `kind` (1 demand, 2 readahead, 3 prefetch,
            4 eviction, 5 poison).
        """
        import numpy as np

        parts = []
        while True:
            part = np.zeros(1 << 16, dtype=_TRACE_DTYPE)
            n, _ = self._trace_read(part.view(np.uint8).data)
            parts.append(part[:n])
            if n < len(part):
                return np.concatenate(parts)[["t_ns", "block", "kind"]]

    def trace_stop(self) -> None:
        """End recording and free its buffer."""
        self._trace(0)

    def close(self, *, force: bool = False) -> None:
        """End service and give the pages back. Idempotent.

        Args:
            force: Close although arrays of it are alive. Whoever reads them afterwards, or waits in a fault now, dies
                by SIGSEGV: never zeros, never a hang.

        Raises:
            ExportedError: Arrays or other buffers of it are alive, and `force` is not given.
        """
        if not self.closed and self._exports and not force:
            raise ExportedError(
                f"{self.name} cannot be closed: {self._exports} array(s) or other buffer(s) of it are alive. Delete "
                "them first, or close(force=True): then reading them ends the process with SIGSEGV"
            )
        self._close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; while an exception passes through, arrays that it keeps alive keep the memory open."""
        if kind is None or not self._exports:
            self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.name} is closed")

    def _source_error(self, error: _engine.EngineError) -> UserfaultError:
        if error.errno == errno.EBADF:
            return ClosedError(f"{self.name} was closed")
        offset = error.block * self.block
        length = min(self.block, self.nbytes - offset)
        return SourceError(
            f"{self.name}: bytes [{offset}, {offset + length}) cannot be read: "
            f"{error.message or os.strerror(error.errno)}",
            source_name=self.name,
            offset=offset,
            length=length,
            detail=error.message,
            errno=error.errno,
        )


def _round_block(preferred: int, budget: int) -> int:
    # What a source prefers need not be possible, nor fit into the budget; what a user asks for must.
    page = os.sysconf("SC_PAGE_SIZE")
    most = min(_engine.EXTENT, max(page, 1 << max(budget // (2 * _LEAST_BLOCKS), 1).bit_length() - 1))
    return min(max(page, 1 << (max(preferred, 1) - 1).bit_length()), most)


def _block_size(block: SupportsIndex | str | None) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    size = _DEFAULT_BLOCK if block is None else parse_size(block, what="block")
    if not page <= size <= _engine.EXTENT or size & (size - 1):
        raise BudgetError(
            f"block: {size} bytes is not a power of two from the page size ({page}) to {_engine.EXTENT} (2 MiB)"
        )
    return size


def _open_file(source: FileData, name: str) -> int:
    try:
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SourceNotFoundError(
            f"{source.path} does not exist", source_name=name, errno=errno.ENOENT
        ) from None
    except OSError as error:
        raise SourceError(f"{source.path}: {error.strerror}", source_name=name, errno=error.errno) from error
    size = os.fstat(fd).st_size
    if size < source.offset + source.nbytes:
        os.close(fd)
        raise TruncatedError(
            f"{source.path} has {size} bytes, but {name} needs bytes up to {source.offset + source.nbytes}"
        )
    return fd
