"""What a source of bytes is: the interface, and what is told of it to the process that maps it.

A `PageSource` lives in a worker process, never in the program itself: a thread that waits for a page holds
the GIL, so nothing that this interpreter runs could serve it. The program sends a *recipe* (see
`Recipe`) to a worker; the worker calls `load()`, answers with a `Description`, and reads from then on.

Nothing here imports NumPy: a worker imports only what its sources need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from userfault.errors import RangeError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ArraySource",
    "Description",
    "Order",
    "PageSource",
    "PageStore",
    "Recipe",
    "check_range",
    "describe",
    "flush_all",
    "read_all",
    "write_all",
]

Order = Literal["C", "F"]


class PageSource(ABC):
    """Bytes that can be read in ranges.

    A subclass gives `nbytes` and `read_into`; the other attributes tell how to use it well. It is pickled
    once, into each worker process that reads from it. `userfault.testing.PageSourceTests` checks an
    implementation.

    Attributes:
        block: Preferred block size in bytes, None for the default. A memory rounds it to a power of two
            between the page size and 2 MiB.
        concurrency: How many `read_into` calls may run at once in one worker, each in a thread of its own. 1
            means that the source is not thread-safe.
        affinity: Whether all reads should go to one worker, because the source keeps decoded data that its
            threads share.
        wants_cache: Bytes of decoded data that it would like to keep. They count in the budget of the memory.
        name: What to call it in messages.

    Example:
        >>> from userfault.sources import PageSource
        >>> class Squares(PageSource):
        ...     nbytes = 1 << 40
        ...
        ...     def read_into(self, offset, buffer):
        ...         for i in range(len(buffer)):
        ...             buffer[i] = (offset + i) ** 2 % 256
    """

    block: int | None = None
    concurrency: int = 1
    affinity: bool = False
    wants_cache: int = 0
    name: str = ""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Length in bytes; it never changes."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` with the bytes from `offset` on.

        Args:
            offset: First byte to read; `offset + len(buffer)` is at most `nbytes`.
            buffer: Writable, contiguous, of format `"B"`.

        Raises:
            Exception: Whatever it is, the bytes count as not read; the engine asks again, with back-off, and
                in the end poisons the block.
        """

    def set_cache(self, nbytes: int) -> None:  # noqa: B027 - most sources keep nothing
        """Keep at most `nbytes` of decoded data from now on.

        Called before the first read, and when budgets change.
        """

    def info(self) -> Mapping[str, object]:
        """Return facts for people, of types that JSON has: format, chunks, codecs, location."""
        return {}

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Release what the source holds. Called once, after the last read."""


class PageStore(PageSource):
    """A source that can be written, too.

    All reads and writes of one store go to one worker process, in at most `concurrency` threads at once. The engine
    never has two writes of the same bytes under way, but a block may be read while its neighbour is written. A worker
    that dies is replaced, and what it had not yet answered is written again.

    An array that is a store is a subclass of both: `class MyStore(ArraySource, PageStore)`.

    Attributes:
        transactional: Whether writes become visible and durable only by `flush`, all at once. What is evicted in
            between waits in scratch, and a worker that dies loses no more than its unfinished flush: the next one
            starts from the beginning.
        write_unit: Bytes that are best written together (those of a chunk, say), None for a block: dirty blocks of one
            aligned unit come in one after the other. A memory rounds it to a power of two.
        writable: Whether this one may be written; a store that was opened read-only says no.

    Example:
        >>> from userfault.sources import PageStore
        >>> class Plates(PageStore):
        ...     "One file of 1 MiB for each MiB."
        ...
        ...     nbytes = 1 << 30
        ...     block = write_unit = 1 << 20
        ...
        ...     def __init__(self, folder):
        ...         self.folder = folder
        ...
        ...     def read_into(self, offset, buffer):
        ...         buffer[:] = (self.folder / str(offset >> 20)).read_bytes()
        ...
        ...     def write_from(self, offset, buffer):
        ...         (self.folder / str(offset >> 20)).write_bytes(buffer)
    """

    transactional: bool = False
    write_unit: int | None = None
    writable: bool = True

    @abstractmethod
    def write_from(self, offset: int, buffer: memoryview) -> None:
        """Store the whole of `buffer` from `offset` on.

        Return when the store keeps it even if this process is killed; `flush` makes it durable. Writing the same once
        more must do no harm. A transactional store may keep it to itself until `flush`.

        Args:
            offset: First byte to write; `offset + len(buffer)` is at most `nbytes`.
            buffer: Read-only, contiguous, of format `"B"`; valid during this call.

        Raises:
            Exception: Whatever it is, the bytes count as not written: they stay dirty in memory, and come again.
        """

    def flush(self) -> None:
        """Make everything that was written before durable: fsync, commit.

        Called when all earlier `write_from` have returned; later ones may come meanwhile if `concurrency` is more than
        one.

        Raises:
            Exception: Whatever it is, `flush()` of the memory raises it as `FlushError`, and everything counts as not
                durable yet.
        """


class ArraySource(PageSource):
    """A source whose bytes are the elements of an array, in C or Fortran order.

    Attributes:
        order: `"C"` if the last axis is contiguous, `"F"` if the first one is.
    """

    order: Order = "C"

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements; never one that holds Python objects."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        size: int = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Description:
    """What a worker tells of a source that it loaded.

    Attributes:
        nbytes: Length in bytes.
        block: Preferred block size in bytes, None for the default.
        concurrency: How many reads may run at once in one worker.
        affinity: Whether all reads should go to one worker.
        wants_cache: Bytes of decoded data that the source would like to keep.
        dtype: Type of the elements as text (`userfault.sources.dtype_from_text` reads it), None for plain
            bytes.
        shape: Shape, None for plain bytes.
        order: `"C"` or `"F"`.
        name: What to call it in messages.
        extra: Facts for people, of types that JSON has.
        writable: Whether it is a `PageStore` that may be written.
        transactional: Whether writes become visible only by a flush.
        write_unit: Bytes that are best written together, None for a block.
    """

    nbytes: int
    block: int | None = None
    concurrency: int = 1
    affinity: bool = False
    wants_cache: int = 0
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    order: Order = "C"
    name: str = ""
    extra: dict[str, object] = field(default_factory=dict)
    writable: bool = False
    transactional: bool = False
    write_unit: int | None = None


class Recipe(Protocol):
    """What is pickled to a worker: how to make the source there.

    So the program need not import the libraries that read the data.
    """

    def load(self) -> PageSource:
        """Open the source. Every error is raised again, as it is, in the program."""


def describe(source: PageSource) -> Description:
    """Return what is to be told of `source`."""
    dtype = shape = None
    order: Order = "C"
    if isinstance(source, ArraySource):
        dtype, shape, order = _dtype_text(source), tuple(map(int, source.shape)), source.order
    store = source if isinstance(source, PageStore) and source.writable else None
    return Description(
        nbytes=int(source.nbytes),
        block=source.block,
        concurrency=source.concurrency,
        affinity=source.affinity,
        wants_cache=int(source.wants_cache),
        dtype=dtype,
        shape=shape,
        order=order,
        name=source.name,
        extra=dict(source.info()),
        writable=store is not None,
        transactional=store is not None and store.transactional,
        write_unit=None if store is None else store.write_unit,
    )


def _dtype_text(source: ArraySource) -> str:
    from userfault.sources._shaped import ShapedSource

    if isinstance(source, ShapedSource):
        return source.dtype_text  # no need of NumPy
    from userfault.sources._dtypes import dtype_to_text

    return dtype_to_text(source.dtype)


def check_range(source: PageSource, offset: int, length: int) -> None:
    """Check that `length` bytes from `offset` on are inside `source`.

    Raises:
        RangeError: They are not.
    """
    if offset < 0 or offset + length > source.nbytes:
        name = f" of {source.name}" if source.name else ""
        raise RangeError(
            f"bytes [{offset}, {offset + length}){name} are out of range: it has {source.nbytes} bytes"
        )


def read_all(source: PageSource, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `source`, and see that it says so.

    Raises:
        EOFError: `read_into` returned a count, and not that of the whole buffer. (`return file.readinto(buffer)` is
            easily written, and the rest of the buffer holds an older read.)
        Exception: Whatever the source raises.
    """
    read_into: Callable[[int, memoryview], object] = source.read_into
    count = read_into(offset, buffer)
    if isinstance(count, int) and not isinstance(count, bool) and count != len(buffer):
        raise EOFError(f"read_into returned {count}, but was to fill {len(buffer)} bytes")


def write_all(source: PageSource, offset: int, buffer: memoryview) -> None:
    """Have `source` store `buffer`, and see that it says so.

    Raises:
        TypeError: It is no `PageStore`.
        OSError: `write_from` returned a count, and not that of the whole buffer. (`return file.write(buffer)` is easily
            written, and a full disk takes a part.)
        Exception: Whatever the store raises.
    """
    write_from: Callable[[int, memoryview], object] = _store(source).write_from
    count = write_from(offset, buffer)
    if isinstance(count, int) and not isinstance(count, bool) and count != len(buffer):
        raise OSError(f"write_from returned {count}, but was to store {len(buffer)} bytes")


def flush_all(source: PageSource) -> None:
    """Have `source` make durable what was written.

    Raises:
        TypeError: It is no `PageStore`.
        Exception: Whatever the store raises.
    """
    _store(source).flush()


def _store(source: PageSource) -> PageStore:
    if not isinstance(source, PageStore):
        raise TypeError(f"{source.name or type(source).__name__} cannot be written: it is no PageStore")
    return source
