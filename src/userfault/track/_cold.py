"""Cold pages of arrays and buffers: found, handed to a callback or a store, dropped, and back when they are needed."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from userfault import _mirror, options
from userfault.errors import (
    ForkedError,
    PrivilegeError,
    RangeError,
    SourceError,
    TrackError,
    UntrackableError,
)
from userfault.kernel._address import PAGE_MASK
from userfault.kernel.pagemap import PageCategory, Scanner
from userfault.track import _runs
from userfault.track._targets import targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from userfault.track._runs import Runs

__all__ = ["ColdPages"]

_AT_ONCE: Final = 16 << 20  # bytes that a callback gets at a time, at most
_Result = TypeVar("_Result")
_WHY: Final = {
    errno.ENOSYS: (
        "cold pages are trapped by read-write protection, which needs Linux 7.3 or newer on a 64-bit machine; before,"
        " track_accesses tells what was not touched, and page_out hands it to swap"
    ),
    errno.EBUSY: "this memory is tracked, or registered with another userfaultfd: end what uses it first",
    errno.EINVAL: (
        "only private anonymous memory that is readable, writable and not locked (mlock) can be evicted: NumPy's own,"
        " bytearray, mmap without a file"
    ),
    errno.ENOMEM: "a part of this memory is not mapped, or there is no room for what is needed to evict it",
}


class ColdPages:
    """The pages of one object that are not accessed: which they are, and away with them (Linux 7.3).

    `detect()` begins to look. Later `cold()` tells what was not accessed since, and `evict()` writes such pages to the
    store and drops them from memory. Accessing them brings them back: the thread waits for that, whatever it is
    doing. An access while a page goes is noticed, and the page stays. Only whole pages of the object are looked at.

    Other trackers of the same memory and this exclude each other. In a forked child the memory is plain and complete.

    Args:
        memory: An array, a CPU tensor or a buffer, in private memory.
        store: Where evicted bytes go: a path, a file object or a descriptor that can be read and written; byte i of
            the object is at i there. None: a temporary file without a name, in the folder
            of scratch files (`USERFAULT_SCRATCH`).
        on_cold: Called as `on_cold(offset, data)` for what `evict` has evicted, with a copy of its bytes.

    Raises:
        UntrackableError: The memory cannot be evicted, or the kernel is older than Linux 7.3.
        PrivilegeError: This user gets no faults of the kernel (docs/privileges.md).

    Example:
        >>> import numpy as np
        >>> from userfault.track import ColdPages
        >>> def keep_what_is_used(table, work):
        ...     with ColdPages(table) as pages:
        ...         pages.detect()
        ...         work(table)
        ...         pages.evict()
        ...         return pages.nbytes_evicted
    """

    def __init__(
        self,
        memory: Any,
        store: str | os.PathLike[str] | int | Any | None = None,
        on_cold: Callable[[int, bytes], object] | None = None,
    ) -> None:
        (self._target,) = targets_of([memory], {})
        if self._target.memory is not None:
            raise UntrackableError(
                "arrays of userfault.open and userfault.empty are evicted by the engine itself: give them a budget"
            )
        self._address = self._target.address
        self._start = (self._address + PAGE_MASK) & ~PAGE_MASK
        self._end = (self._address + self._target.nbytes) & ~PAGE_MASK
        if self._start >= self._end:
            raise UntrackableError(f"an object of {self._target.nbytes} bytes has no whole page of its own")
        self._on_cold = on_cold
        self._file = _open_store(store)
        # Bytes of the store count from the object's first, those of the engine from the first page.
        self._skip = self._start - self._address
        try:
            self._cold = _mirror.Cold(self._start, self._end, self._file, self._skip)
        except _mirror.MirrorError as error:
            os.close(self._file)
            raise _error(error.errno) from None
        self._closed = False
        self._lock, self._pid = threading.Lock(), os.getpid()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def nbytes_evicted(self) -> int:
        """How many bytes are in the store, and not in memory."""
        return self._ask(self._cold.stats)["out"] * (PAGE_MASK + 1)

    @property
    def stats(self) -> dict[str, int]:
        """Pages that are out, were evicted, were loaded again, and were kept as they were accessed while they went."""
        return self._ask(self._cold.stats)

    def detect(self) -> None:
        """Begin to look: from here on all pages count as cold until they are accessed."""
        self._ask(self._cold.detect)

    def cold(self) -> list[tuple[int, int]]:
        """Return what is in memory and was not accessed since `detect`: (start, stop) bytes from the object's first.

        Before the first `detect` that is nothing.
        """
        self._check()
        with Scanner() as scanner:
            found = scanner.scan(
                self._start,
                self._end - self._start,
                mask=PageCategory.ACCESSED,
                inverted=PageCategory.ACCESSED,
                anyof=PageCategory.PRESENT | PageCategory.SWAPPED,
                returns=PageCategory.ACCESSED,
            )
        return [(start - self._address, stop - self._address) for start, stop in found.ranges()]

    def evict(self, ranges: Iterable[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
        """Write cold pages to the store, and drop them from memory.

        What is accessed meanwhile stays, as do pages that are pinned for I/O or shared with a forked child. Blocks for
        as long as the store takes.

        Args:
            ranges: Bytes from the object's first as `cold` returns them, of which whole pages are meant; None for all.

        Returns:
            What went, as `cold` does.

        Raises:
            SourceError: The store could not be written. What it is about stays in memory.
            RangeError: A range is not inside of the object.
        """
        runs = _runs.clip(self._runs(ranges), self._start, self._end)
        told, number = self._ask(lambda: self._cold.evict(np.ascontiguousarray(runs)))
        went = [
            (start - self._address, stop - self._address)
            for start, stop in np.frombuffer(told, np.uint64).reshape(-1, 2).tolist()
        ]
        if self._on_cold is not None:
            for start, stop in went:
                for first in range(start, stop, _AT_ONCE):
                    self._on_cold(first, os.pread(self._file, min(_AT_ONCE, stop - first), first))
        if number == errno.ENOSYS:
            raise _error(number)
        if number:
            raise SourceError(
                f"cold pages could not be written to their store: {os.strerror(number)}; they stay in memory",
                errno=number,
            )
        return went

    def close(self) -> None:
        """Bring everything back: it is plain memory again. Idempotent.

        Raises:
            SourceError: The store could not be read: bytes are lost, and to access them raises SIGBUS.
        """
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        try:
            with self._lock:
                if self._closed:
                    return
                self._closed = True
                try:
                    self._cold.close()
                finally:
                    os.close(self._file)
        except _mirror.MirrorError as error:
            raise SourceError(
                f"the store of cold pages cannot be read ({os.strerror(error.errno)}): what it holds of the object is"
                " lost, and to access it raises SIGBUS",
                errno=error.errno,
            ) from None

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"of {self._target.nbytes} bytes"
        return f"<userfault.track.ColdPages {state}>"

    def _runs(self, ranges: Iterable[tuple[int, int]] | None) -> Runs:
        if ranges is None:
            return _runs.runs_of([(self._start, self._end)])
        pairs = []
        for start, stop in ranges:
            if not 0 <= start <= stop <= self._target.nbytes:
                raise RangeError(
                    f"({start}, {stop}) is not inside of the object's {self._target.nbytes} bytes"
                )
            first, last = (
                (self._address + start + PAGE_MASK) & ~PAGE_MASK,
                (self._address + stop) & ~PAGE_MASK,
            )
            if first < last:
                pairs.append((first, last))
        return _runs.runs_of(pairs)

    def _check(self) -> None:
        if self._closed:
            raise TrackError("these ColdPages were closed: make new ones")

    def _ask(self, call: Callable[[], _Result]) -> _Result:
        if self._pid != os.getpid():  # where another thread may have held the lock
            raise _error(errno.ECHILD)
        try:
            with self._lock:  # nobody closes it meanwhile
                self._check()
                return call()
        except _mirror.MirrorError as error:
            raise _error(error.errno) from None


def _open_store(store: Any) -> int:
    """Return a descriptor of our own."""
    if store is None:
        with tempfile.TemporaryFile(dir=options.scratch_dir()) as file:
            return os.dup(file.fileno())
    if isinstance(store, int):
        return os.dup(store)
    if hasattr(store, "fileno"):
        store.flush()
        return os.dup(store.fileno())
    return os.open(store, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _error(number: int) -> Exception:
    if number == errno.ECHILD:
        return ForkedError("this process was forked: the memory is plain here, make new ColdPages of it")
    if number == errno.EPERM:
        return PrivilegeError(
            "to evict cold pages this user needs faults of the kernel, too: see docs/privileges.md",
            call="userfaultfd",
            errno=number,
        )
    if number in _WHY:
        return UntrackableError(_WHY[number])
    return TrackError(f"cold pages failed (errno {number}, {errno.errorcode.get(number, '?')})")
