"""PagedMemory: an address range, its source, its budget."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, SupportsIndex

from userfault import _engine, pager
from userfault._blocks import block_size, check_budget, round_block, round_unit
from userfault._files import check_scratch, open_file
from userfault._pin import Pin
from userfault._ranges import block_runs
from userfault._registry import find, register
from userfault._resident import Advice, ResidentMemory
from userfault._write_back import flush_blocks, flush_unasked, flush_when_python_exits, lost_text
from userfault.errors import (
    BudgetError,
    ClosedError,
    ExportedError,
    FlushError,
    ModeError,
    RangeError,
)
from userfault.sizes import format_size, parse_size
from userfault.sources._native import FileData, MemoryData, ZeroData
from userfault.sources._worker_data import WorkerData

if TYPE_CHECKING:
    from userfault.sources._abc import Description

__all__ = ["Advice", "Delivery", "Mode", "PagedMemory", "Pin", "find"]

Mode = Literal["r", "r+", "c", "w+"]
Delivery = Literal["thread", "direct"]

_KIND_ZERO, _KIND_MEMORY, _KIND_FILE, _KIND_WORKER = range(4)
_DELIVERY: dict[str, int] = {"thread": _engine.DELIVERY_THREAD, "direct": _engine.DELIVERY_DIRECT}
_MODES = ("r", "r+", "c", "w+")


class PagedMemory(ResidentMemory):
    """Memory whose pages come from a source when they are first touched, and leave when the budget asks for it.

    It exports the buffer protocol: `memoryview(memory)` and `numpy.frombuffer(memory)` are the memory itself, writable
    in all modes but `"r"`. Arrays from `userfault.open` keep their memory alive through `.base`;
    `userfault.memory_of(array)` returns it.

    What was written in mode `"r+"` or `"w+"` goes back to the source when its block is evicted, with `flush()` and
    `close()`, when the memory goes, and when the interpreter exits. The last two cannot raise: what fails there is
    logged.

    Attributes:
        name: What it is called in messages.
        nbytes: Length in bytes.
        block: Bytes that are loaded and evicted together, a power of two.
        nblocks: How many blocks there are; the last one may be cut short.
        address: Where it is, in this process.
        description: What a worker told of the source, None for files, memory and zeros.
        closed: Whether it was closed.
        writable: Whether its bytes may be written: in all modes but `"r"`.
        mode: `"r"`, `"r+"`, `"c"` or `"w+"`, as in `numpy.memmap`.
        delivery: `"thread"` or `"direct"`: who resolves faults.
        extents: Whether 2 MiB extents (huge pages) may be used.
    """

    description: Description | None
    mode: Mode
    delivery: Delivery
    _reserved: int
    _writes_back = False
    _last_words = ""

    def __init__(
        self,
        source: FileData | MemoryData | ZeroData | WorkerData,
        *,
        name: str,
        memory: SupportsIndex | str | None = None,
        block: SupportsIndex | str | None = None,
        readahead: bool = True,
        mode: Mode = "r",
        delivery: Delivery = "thread",
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
            mode: `"r"` for reading; `"r+"` writes back to the source, `"w+"` too (whoever calls has created it); `"c"`
                keeps changes private to this process.
            delivery: Who resolves a fault: a `"thread"` of the engine, or `"direct"`ly the thread that faults, in a
                handler of SIGBUS (see `userfault.rearm`).

        Raises:
            ModeError: The source cannot be written, or the mode is not known.
            BudgetError: The budget holds fewer than eight blocks, or a size is malformed.
            SourceError: The source cannot be opened.
            PrivilegeError: This user may not use userfaultfd.
            KernelError: The kernel refused, for want of memory, descriptors or threads.
        """
        if mode not in _MODES:
            raise ModeError(f"mode {mode!r} is not known; give one of {', '.join(map(repr, _MODES))}")
        if delivery not in _DELIVERY:
            raise ModeError(f"delivery={delivery!r} is not known; give 'thread' or 'direct'")
        self.name, self.mode, self.delivery, self._direct = name, mode, delivery, delivery == "direct"
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
                    block = round_block(description.block, budget or pager.limit())
                self._open(source, description.nbytes, block, budget, readahead, source_id)
            except BaseException:
                # After the engine has it, the source goes with the memory.
                if not self.address:
                    pager.get().drop_source(source_id)
                raise
        else:
            self._open(source, source.nbytes, block, budget, readahead, -1)
        register(self)
        if self._writes_back:
            flush_when_python_exits(self)

    def _open(
        self,
        source: object,
        nbytes: int,
        block: SupportsIndex | str | None,
        budget: int,
        readahead: bool,
        source_id: int,
    ) -> None:
        size = block_size(block)
        share = budget or pager.limit()
        check_budget(share, size, nbytes, self.name)
        if nbytes <= 0:
            raise RangeError(f"{self.name} has {nbytes} bytes: there is nothing to map")
        if nbytes >= 1 << 63:
            raise RangeError(f"{self.name} has {nbytes} bytes, more than there are addresses")
        store = self._store(source)
        if store in (_engine.STORE_SCRATCH, _engine.STORE_STAGED):
            check_scratch(self.name)
        self._reserved = 0
        kind, origin, fd, offset, unit = _KIND_ZERO, None, -1, 0, 0
        if isinstance(source, WorkerData):
            assert self.description is not None
            kind = _KIND_WORKER
            # Decoded chunks and resident blocks share the budget; neither starves the other.
            self._reserved = min(self.description.wants_cache, share // 2)
            # Only one process may write, so that what it keeps of what it wrote is what all reads see.
            alone = self.description.affinity or store in (_engine.STORE_SOURCE, _engine.STORE_STAGED)
            pager.get().configure_source(source_id, affinity=alone, cache=self._reserved)
            unit = round_unit(self.description.write_unit, size) if store else 0
        elif isinstance(source, FileData):
            fd = open_file(source, self.name, write=store == _engine.STORE_SOURCE)
            kind, offset = _KIND_FILE, source.offset
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
                store=store,
                write_unit=unit,
                delivery=_DELIVERY[self.delivery],
            )
        except _engine.EngineError as error:
            raise pager.engine_error(error, self.name) from None
        finally:
            if fd >= 0:
                os.close(fd)
        self._writes_back = store in (_engine.STORE_SOURCE, _engine.STORE_STAGED)

    def _store(self, source: object) -> int:
        """Return where changes go (`enum uf_store_kind`)."""
        if self.mode == "r":
            return _engine.STORE_NONE
        if self.mode == "c":
            return _engine.STORE_SCRATCH
        if isinstance(source, FileData):
            return _engine.STORE_SOURCE
        if self.description is None or not self.description.writable:
            raise ModeError(
                f"mode {self.mode!r}: {self.name} cannot be written: what it comes from can only be read. Mode 'c' "
                "keeps changes private to this process"
            )
        return _engine.STORE_STAGED if self.description.transactional else _engine.STORE_SOURCE

    def __repr__(self) -> str:
        state = (
            "closed" if self.closed else f"{format_size(self.nbytes)} in blocks of {format_size(self.block)}"
        )
        return f"<userfault.PagedMemory {self.name!r}, {state}>"

    @property
    def budget(self) -> int:
        """Most bytes that may be resident, decoded chunks left out."""
        return self.stats().budget

    def flush(self, where: object = None) -> None:
        """Write back what was changed, and return when everything written before the call is durable.

        Durable is what the source means by it: a file is synced, an object put, a transaction committed (all of it,
        whatever `where` is). In modes `"r"` and `"c"` there is nothing to do.

        Args:
            where: As in `prefetch`; what lies between its parts may be written back, too.

        Raises:
            FlushError: Some ranges could not be stored; they stay dirty and in memory, and the next flush tries again.
            ForkedError: This process is a forked child of the one that opened the memory.
            RangeError: `where` is not inside the memory.
            ClosedError: The memory is closed.
        """
        self._check_open()
        runs = block_runs(self, where)
        if runs and self._writes_back:
            # In one call: each costs a sync, or even a commit.
            first, (last, count) = runs[0][0], runs[-1]
            flush_blocks(self, first, last + count - first)

    def close(self, *, force: bool = False) -> None:
        """Write back what was changed, end service, and give the pages back. Idempotent.

        A forked child closes what it inherited without writing it back.

        Args:
            force: Close although arrays of it are alive: whoever uses them afterwards, or waits in a fault now, dies by
                SIGSEGV; never zeros, never a hang. And although changes cannot be written back: what is lost is said in
                a `RuntimeWarning`.

        Raises:
            ExportedError: Arrays or other buffers of it are alive, and `force` is not given.
            FlushError: Changes cannot be written back, and `force` is not given. The memory stays open.
        """
        if self.closed:
            return
        if self._exports and not force:
            raise ExportedError(
                f"{self.name} cannot be closed: {self._exports} array(s) or other buffer(s) of it are alive. Delete "
                "them first, or close(force=True): then using them ends the process with SIGSEGV"
            )
        lost = None
        if self._writes_back and not self._forked:
            try:
                flush_blocks(self, 0, self.nblocks)
            except ClosedError:  # by another thread
                return
            except FlushError as error:
                if not force:
                    raise
                lost = lost_text(self, error)
        if self._when_gone is not None:
            self._when_gone(self)
        self._close()
        if lost is not None:
            warnings.warn(lost, RuntimeWarning, stacklevel=2)

    def __del__(self) -> None:
        flush_unasked(self)
        if self._when_gone is not None:
            self._when_gone(self)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; while an exception passes through, arrays that it keeps alive keep the memory open."""
        if kind is None or not self._exports:
            self.close()
