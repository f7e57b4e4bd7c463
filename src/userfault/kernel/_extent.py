"""A range of addresses that is ours until it is given back, and who uses it meanwhile.

Unmapping memory that something still refers to ends the process, or worse, hands it the memory that another
thread maps there next. So everything that touches an extent says so, and what unmaps or moves it is refused
until the last user has gone.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from userfault.errors import ClosedError, ExportedError
from userfault.kernel import _mman
from userfault.kernel._placing import check_length, check_multiple
from userfault.kernel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    Piece = tuple[int, int]

__all__ = ["Extent"]


class _Mark:
    """Shows by being alive that a view is (ctypes arrays cannot be members of a set)."""

    __slots__ = ("__weakref__", "extent")

    def __init__(self, extent: Extent) -> None:
        self.extent = extent


class Extent:
    """Mapped addresses, less what was unmapped of them. Its methods may be called by several threads.

    Attributes:
        address: Address of the first byte.
        length: Length in bytes, with what was unmapped.
        page_size: Size of its pages in bytes.
        label: What kind of memory it is, for messages.
        closed: Whether it was closed.
    """

    __slots__ = (
        "__weakref__",
        "_lock",
        "_pieces",
        "_users",
        "_views",
        "address",
        "closed",
        "label",
        "length",
        "page_size",
    )

    def __init__(self, address: int, length: int, page_size: int, label: str) -> None:
        self.address = address
        self.length = length
        self.page_size = page_size
        self.label = label
        self.closed = False
        # What is still mapped, sorted: in between other threads may have mapped memory of their own.
        self._pieces: list[Piece] = [(address, address + length)]
        self._lock = threading.RLock()
        self._users = 0
        self._views: weakref.WeakSet[_Mark] = weakref.WeakSet()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.address:#x} + {self.length:#x}"
        return f"<Mapping {self.label} {state}>"

    def __del__(self) -> None:
        # Without effect where `__init__` was not reached, and at the interpreter's end, when all goes anyway.
        with suppress(Exception):
            self._unmap_all()

    @property
    def in_use(self) -> bool:
        """Whether somebody reads, writes or holds a view."""
        return bool(self._users or len(self._views))

    @property
    def empty(self) -> bool:
        """Whether nothing is mapped any more."""
        return not self._pieces

    def check_open(self) -> None:
        """Raise ClosedError once it was closed."""
        if self.closed:
            raise ClosedError("the mapping is closed")

    @contextmanager
    def used(self, start: int, length: int | None, *, whole_pages: bool = False) -> Iterator[Piece]:
        """Keep a part where it is meanwhile; gives its address and length.

        Raises:
            UsageError: It is not wholly inside of what is mapped, or not whole pages where these are meant.
        """
        with self._lock:
            # First, so that a signal handler or finaliser that runs in here and would close us is refused.
            self._users += 1
            try:
                address, length = self._part(start, length, whole_pages)
            except BaseException:
                self._users -= 1
                raise
        try:
            yield address, length
        finally:
            with self._lock:
                self._users -= 1

    def export(self, start: int, length: int | None) -> ctypes.Array[ctypes.c_ubyte]:
        """Return a part as an array that keeps all of it where it is, until nothing refers to the array.

        Raises:
            UsageError: It is not wholly inside of what is mapped.
        """
        # Whatever is made of the array refers to it, it to its mark, and that to us: we live as long.
        mark = _Mark(self)
        with self._lock:
            self._views.add(mark)
            try:
                address, length = self._part(start, length, whole_pages=False)
                array = (ctypes.c_ubyte * length).from_address(address)
                array.mark = mark  # type: ignore[attr-defined]
            except BaseException:
                self._views.discard(mark)  # the exception may keep it alive
                raise
        return array

    def unmap(self, start: int, length: int | None) -> None:
        """Unmap whole pages; the rest stays.

        Raises:
            ExportedError: Somebody uses it.
            UsageError: Not whole pages inside of what is mapped.
        """
        with self._lock:
            address, length = self._part(start, length, whole_pages=True)
            gone = self._take(address, address + length, "unmapped")
        try:
            _munmap(gone)
        except BaseException:
            self._give_back(gone)
            raise

    def move(self, new_length: int, flags: int, target: int, replaced: Extent | None) -> int:
        """Call mremap(2); with DONTUNMAP this extent stays what it is, otherwise it is the moved one.

        Args:
            new_length: Bytes that it is to have.
            flags: A RemapFlag.
            target: Where to, if the flags say FIXED.
            replaced: The extent that is there, which loses that range.

        Returns:
            The address where the pages are now.

        Raises:
            ExportedError: Somebody uses it, or what is replaced.
            UsageError: A part of it was unmapped.
        """
        with self._lock:
            self.check_open()
            if self._pieces != [(self.address, self.address + self.length)]:
                raise UsageError(f"{self!r} cannot be moved: a part of it was unmapped")
            moved = self._take(self.address, self.address + self.length, "moved")
        try:
            if replaced is not None:
                # For good: mremap unmaps what is there before it can still fail, and then somebody else's memory may
                # come to lie there, which a later `close` must not unmap.
                with replaced._lock:
                    replaced._take(target, target + new_length, "replaced")
            placed = _mman.mremap(self.address, self.length, new_length, flags, target)
        except BaseException:
            self._give_back(moved)
            raise
        if not flags & _mman.RemapFlag.DONTUNMAP:
            self.address, self.length = placed, new_length
            moved = [(placed, placed + new_length)]
        self._give_back(moved)
        return placed

    def close(self) -> None:
        """Unmap what is left. Idempotent.

        Raises:
            ExportedError: Somebody uses it.
        """
        with self._lock:
            if self.closed:
                return
            self._check_unused("closed")
            self.closed = True
        self._unmap_all()

    def _unmap_all(self) -> None:
        gone, self._pieces = self._pieces, []
        self.closed = True
        _munmap(gone)

    def _part(self, start: int, length: int | None, whole_pages: bool) -> Piece:
        """Return address and length of a part, checked. Under the lock."""
        self.check_open()
        if length is None:
            length = self.length - start
        if start < 0 or length < 0 or start + length > self.length:
            raise UsageError(f"bytes [{start}, {start + length}) are not inside of {self!r}")
        if whole_pages:
            check_multiple("start", start, self.page_size)
            check_length(length, self.page_size)
        address = self.address + start
        if length and not any(low <= address and address + length <= high for low, high in self._pieces):
            raise UsageError(f"bytes [{start}, {start + length}) of {self!r} are not mapped any more")
        return address, length

    def _check_unused(self, what: str) -> None:
        if self.in_use:
            raise ExportedError(
                f"{self!r} cannot be {what}: {len(self._views)} view(s) of it are alive, {self._users} call(s) use"
                " it. Delete or release them first"
            )

    def _take(self, low: int, high: int, what: str) -> list[Piece]:
        """Own [low, high) no more, and return what of it was mapped. Under the lock."""
        self._check_unused(what)
        taken = [(max(low, a), min(high, b)) for a, b in self._pieces if a < high and low < b]
        before = [(a, min(b, low)) for a, b in self._pieces if a < low]
        behind = [(max(a, high), b) for a, b in self._pieces if b > high]
        self._pieces = before + behind
        return taken

    def _give_back(self, pieces: list[Piece]) -> None:
        with self._lock:
            self._pieces = sorted(self._pieces + pieces)


def _munmap(pieces: list[Piece]) -> None:
    # Never under the lock: with EVENT_UNMAP it waits for the handler, which may want to look at the mapping.
    for low, high in pieces:
        _mman.munmap(low, high - low)
