"""Memory to use with a userfaultfd: any kind, anywhere, never touched by itself.

A `Mapping` owns one mmap(2), unlike `mmap.mmap` of any kind, size of pages, alignment and address. It knows
the kinds that userfaultfd tells apart: anonymous memory, shared memory, huge pages and files, shared and
private.

**Touching it.** Where a userfaultfd traps pages, a Python expression that touches one (`view[0]`, NumPy
arithmetic) waits in the kernel *with the GIL held*, so no Python thread of the same process can serve the
fault. `read`, `read_into` and `write` release the GIL while they touch the memory: with a handler in another
thread, use these.

Example:
    >>> from userfault.kernel.mapping import Advice, Mapping
    >>> with Mapping.memfd(1 << 20) as memory, memory.alias() as second:
    ...     memory.write(4096, b"the same page")
    ...     second.read(4096, 8)
    b'the same'
    >>> with Mapping.anonymous(4 << 20, align=2 << 20) as memory:
    ...     memory.madvise(Advice.HUGEPAGE)
    ...     memory.address % (2 << 20)
    0
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from userfault.kernel import _mman
from userfault.kernel._address import PAGE_SIZE, span_of
from userfault.kernel._extent import Extent
from userfault.kernel._kinds import MemoryKind, kind_of_file
from userfault.kernel._mman import Advice, MapFlag, Protection, RemapFlag
from userfault.kernel._placing import check_length, check_multiple, huge_bits, map_flags, place
from userfault.kernel.errors import UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Advice", "MapFlag", "Mapping", "MemoryKind", "Protection"]

READ_WRITE: Final = Protection.READ | Protection.WRITE


class Mapping:
    """One mapping of memory, unmapped by `close()`, by the end of its `with` block, or when nothing refers to it.

    It is made by `anonymous`, `memfd`, `of_file` and `alias`. It has the buffer protocol (`memoryview(m)`,
    `numpy.asarray(m)`) on Python 3.12 and newer, and `view()` on all.

    Parts are given by `start`, the first byte counted from the beginning of the mapping, and `length`; `None` is all
    that follows. All methods may be called by several threads. What moves or unmaps memory is refused while a view of
    it is alive, or another thread is in a method that uses it.
    """

    __slots__ = ("__weakref__", "_extent", "_fd", "_kind", "_offset", "_protection", "_shared")

    def __init__(
        self,
        address: int,
        length: int,
        *,
        kind: MemoryKind,
        shared: bool,
        page_size: int,
        protection: Protection,
        fd: int | None = None,
        offset: int = 0,
    ) -> None:
        """Take over memory that is mapped already, and the descriptor of its file; the constructors call this."""
        self._extent = Extent(address, length, page_size, kind)
        self._kind = kind
        self._shared = shared
        self._protection = protection
        self._fd = fd
        self._offset = offset

    # --- constructors --------------------------------------------------------------------------------------

    @classmethod
    def anonymous(
        cls,
        length: int,
        *,
        shared: bool = False,
        address: int | None = None,
        align: int | None = None,
        huge_page_size: int | None = None,
        noreserve: bool = False,
        protection: Protection = READ_WRITE,
        populate: bool = False,
        flags: int = 0,
    ) -> Self:
        """Map memory that is of no file.

        Args:
            length: Bytes, a multiple of the page size.
            shared: Shared with forked children; only shared memory has minor faults.
            address: Where exactly it is to be; None for where the kernel likes.
            align: Multiple that the address is to be of; 2 MiB, for example, lets transparent huge pages fit.
            huge_page_size: Take pages of this size from the reserved pool (hugetlb), for example `2 << 20`.
            noreserve: Do not promise the memory (MAP_NORESERVE): a terabyte may be mapped to use little of it.
            protection: What the processor is to allow.
            populate: Have every page now.
            flags: Further `MapFlag`s. A type among them (`DROPPABLE`) takes the place of shared or private.

        Raises:
            PageExistsError: Something is mapped at `address`.
            NoMemoryError: No room, or too few huge pages are free.
            InvalidRequestError: Flags that do not go together, a huge page size that the machine does not have.
            UsageError: A length, address or size that cannot be.
        """
        page_size = PAGE_SIZE
        kind = MemoryKind.SHMEM if shared else MemoryKind.ANONYMOUS
        flags = map_flags(flags | MapFlag.ANONYMOUS, shared, noreserve, populate)
        if huge_page_size is not None:
            page_size = huge_page_size
            kind = MemoryKind.HUGETLB if shared else MemoryKind.PRIVATE_HUGETLB
            flags |= MapFlag.HUGETLB | huge_bits(huge_page_size)
        placed = place(length, address, align, page_size, protection, flags)
        return cls(placed, length, kind=kind, shared=shared, page_size=page_size, protection=protection)

    @classmethod
    def memfd(
        cls,
        length: int,
        *,
        shared: bool = True,
        address: int | None = None,
        align: int | None = None,
        huge_page_size: int | None = None,
        name: str = "userfault",
        noreserve: bool = False,
        protection: Protection = READ_WRITE,
        populate: bool = False,
        flags: int = 0,
    ) -> Self:
        """Map a new file in memory (memfd), which `alias` can map a second time and `fd` can send to others.

        The file is `length` bytes long, a multiple of the page size; /proc/PID/maps shows its `name`. A private mapping
        (not `shared`) keeps what is written to itself. The other arguments are those of `anonymous`.

        Raises:
            NoMemoryError, PageExistsError, InvalidRequestError, UsageError: As for `anonymous`.
        """
        memfd_flags = 0 if huge_page_size is None else os.MFD_HUGETLB | huge_bits(huge_page_size)
        check_length(length, huge_page_size or PAGE_SIZE)
        fd = _mman.memory_file(name, length, memfd_flags)
        flags = map_flags(flags, shared, noreserve, populate)
        return cls._of_own_file(fd, length, 0, shared, address, align, protection, flags)

    @classmethod
    def of_file(
        cls,
        fd: int,
        length: int,
        *,
        offset: int = 0,
        shared: bool = True,
        address: int | None = None,
        align: int | None = None,
        noreserve: bool = False,
        protection: Protection = READ_WRITE,
        populate: bool = False,
        flags: int = 0,
    ) -> Self:
        """Map a part of an open file. The descriptor is duplicated, and stays the caller's.

        `length` and `offset` are bytes, multiples of the page size. The file may end before; touching pages that begin
        beyond its end is SIGBUS. A private mapping (not `shared`) keeps what is written from the file. The other
        arguments are those of `anonymous`.

        Raises:
            UffdPermissionError: The file is not open for that.
            NotSupportedError: It cannot be mapped.
            NoMemoryError, PageExistsError, InvalidRequestError, UsageError: As for `anonymous`.
        """
        flags = map_flags(flags, shared, noreserve, populate)
        own = _mman.duplicate(fd)
        return cls._of_own_file(own, length, offset, shared, address, align, protection, flags)

    @classmethod
    def _of_own_file(
        cls,
        fd: int,
        length: int,
        offset: int,
        shared: bool,
        address: int | None,
        align: int | None,
        protection: Protection,
        flags: int,
    ) -> Self:
        """Map a file whose descriptor is ours: the mapping gets it, or it is closed."""
        try:
            kind, page_size = kind_of_file(fd, shared=shared)
            check_multiple("offset", offset, page_size)
            start = place(length, address, align, page_size, protection, flags, fd, offset)
        except BaseException:
            os.close(fd)
            raise
        return cls(
            start,
            length,
            kind=kind,
            shared=shared,
            page_size=page_size,
            protection=protection,
            fd=fd,
            offset=offset,
        )

    def alias(
        self,
        *,
        protection: Protection | None = None,
        address: int | None = None,
        align: int | None = None,
    ) -> Mapping:
        """Map the same pages of the file once more, elsewhere.

        Args:
            protection: What the processor is to allow there; None for the same as here.
            address: As for `anonymous`.
            align: As for `anonymous`.

        Raises:
            UsageError: The mapping is private, or of no file: there is nothing to share.
        """
        self._extent.check_open()
        if self._fd is None:
            raise UsageError(f"{self._kind} memory of no file cannot be mapped twice: use Mapping.memfd")
        if not self._shared:
            raise UsageError(
                f"{self._kind} memory has pages of its own, which no second mapping can show: map what is in the file"
                " with Mapping.of_file(m.fd, m.length)"
            )
        allowed = self._protection if protection is None else protection
        fd = _mman.duplicate(self._fd)
        return Mapping._of_own_file(
            fd, self.length, self._offset, True, address, align, allowed, MapFlag.SHARED
        )

    # --- what it is ----------------------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """Address of the first byte."""
        self._extent.check_open()
        return self._extent.address

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self._extent.length

    @property
    def nbytes(self) -> int:
        """Length in bytes, by the name that arrays have for it."""
        return self._extent.length

    @property
    def page_size(self) -> int:
        """Size of its pages in bytes: the huge ones of hugetlb memory."""
        return self._extent.page_size

    @property
    def kind(self) -> MemoryKind:
        """What a userfaultfd can do with it."""
        return self._kind

    @property
    def shared(self) -> bool:
        """Whether other mappings of the same pages see what is written."""
        return self._shared

    @property
    def protection(self) -> Protection:
        """What the processor allows, by the last call that was about all of it."""
        return self._protection

    @property
    def fd(self) -> int | None:
        """Descriptor of the file behind it, None for memory of no file. The mapping closes it."""
        self._extent.check_open()
        return self._fd

    @property
    def offset(self) -> int:
        """Where in its file it begins, in bytes."""
        return self._offset

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._extent.closed

    def __repr__(self) -> str:
        return repr(self._extent)

    # --- its bytes -----------------------------------------------------------------------------------------

    def view(self, start: int = 0, length: int | None = None) -> memoryview:
        """Return a view of bytes, read-only where the mapping is. While it is alive the mapping cannot be closed.

        Touching a trapped page through it waits with the GIL held: see the top of this module.

        Raises:
            UsageError: Not wholly inside of what is mapped.
        """
        view = memoryview(self._extent.export(start, length)).cast("B")
        return view if Protection.WRITE in self._protection else view.toreadonly()

    def __buffer__(self, flags: int, /) -> memoryview:
        return self.view()

    def read(self, start: int, length: int) -> bytes:
        """Return a copy of bytes. The GIL is released meanwhile, so that they may fault.

        Raises:
            UsageError: Not wholly inside of what is mapped, or not readable.
        """
        if length < 0:
            raise UsageError(f"length {length} is negative")
        result = bytearray(length)
        self.read_into(start, result)
        return bytes(result)

    def read_into(self, start: int, target: WriteableBuffer | Mapping) -> None:
        """Copy as many bytes as `target` is long into it. The GIL is released meanwhile.

        Args:
            start: The first byte.
            target: Writable contiguous memory, or another mapping.

        Raises:
            UsageError: Not wholly inside of what is mapped, not readable, or a target that cannot be written.
        """
        if isinstance(target, Mapping):
            target._need(Protection.WRITE)
            with target._extent.used(0, None) as (address, length):
                self._copy_out(start, address, length)
        elif memoryview(target).readonly:
            raise UsageError("the target cannot be written: pass a bytearray or another writable buffer")
        else:
            # `keep` holds the buffer, so that it is neither freed nor resized meanwhile.
            address, length, keep = span_of(target)
            self._copy_out(start, address, length)
            del keep

    def _copy_out(self, start: int, target: int, length: int) -> None:
        self._need(Protection.READ)
        with self._extent.used(start, length) as (address, _):
            _mman.copy_memory(target, address, length)

    def write(self, start: int, data: ReadableBuffer | Mapping) -> None:
        """Copy `data` in. The GIL is released meanwhile, so that the bytes may fault, those of `data` as well.

        Args:
            start: The first byte to write to.
            data: Any contiguous bytes-like object, or another mapping.

        Raises:
            UsageError: Not wholly inside of what is mapped, or not writable.
        """
        if isinstance(data, Mapping):
            data._need(Protection.READ)
            with data._extent.used(0, None) as (source, length):
                self._copy_in(start, source, length)
        else:
            source, length, keep = span_of(data)
            self._copy_in(start, source, length)
            del keep

    def _copy_in(self, start: int, source: int, length: int) -> None:
        self._need(Protection.WRITE)
        with self._extent.used(start, length) as (address, _):
            _mman.copy_memory(address, source, length)

    def _need(self, protection: Protection) -> None:
        if protection not in self._protection:
            raise UsageError(f"{self!r} is not mapped for {protection.name}: change that with protect()")

    # --- its pages -----------------------------------------------------------------------------------------

    def madvise(self, advice: Advice | int, start: int = 0, length: int | None = None) -> None:
        """Give the kernel advice about pages; numbers that `Advice` does not know are passed on.

        With a userfaultfd that has EVENT_REMOVE, `DONTNEED`, `FREE` and `REMOVE` return only when the event was read.

        Raises:
            InvalidRequestError: The kernel does not know the advice, or it does not go with this memory.
            HardwareError: `POPULATE_READ` or `POPULATE_WRITE` met a poisoned page.
            UsageError: Not whole pages of what is mapped.
        """
        with self._extent.used(start, length, whole_pages=True) as (address, nbytes):
            _mman.madvise(address, nbytes, advice)

    def protect(self, protection: Protection, start: int = 0, length: int | None = None) -> None:
        """Change what the processor allows. For a part, this splits the mapping in the kernel.

        Raises:
            UffdPermissionError: The file is not open for that.
            UsageError: Not whole pages of what is mapped.
        """
        with self._extent.used(start, length, whole_pages=True) as (address, nbytes):
            _mman.mprotect(address, nbytes, protection)
            if nbytes == self.length:
                self._protection = protection

    def mlock(self, start: int = 0, length: int | None = None, *, on_fault: bool = False) -> None:
        """Lock pages into memory, all of them now, or with `on_fault` each when it is first touched.

        Raises:
            NoMemoryError: More than RLIMIT_MEMLOCK allows, or a page that is trapped for programs only.
            UffdPermissionError: Nothing may be locked.
            UsageError: Not whole pages of what is mapped.
        """
        with self._extent.used(start, length, whole_pages=True) as (address, nbytes):
            _mman.mlock(address, nbytes, on_fault=on_fault)

    def munlock(self, start: int = 0, length: int | None = None) -> None:
        """Undo `mlock`.

        Raises:
            UsageError: Not whole pages of what is mapped.
        """
        with self._extent.used(start, length, whole_pages=True) as (address, nbytes):
            _mman.munlock(address, nbytes)

    def punch_hole(self, start: int = 0, length: int | None = None) -> None:
        """Free pages of the file: all its mappings have lost them, and no userfaultfd gets an event.

        Raises:
            UsageError: There is no file (use `madvise(Advice.REMOVE)`), or not whole pages of what is mapped.
            NotSupportedError: The file system cannot.
        """
        with self._extent.used(start, length, whole_pages=True) as (address, nbytes):
            if self._fd is None:
                raise UsageError(
                    f"{self._kind} memory of no file cannot be punched: use madvise(Advice.REMOVE)"
                )
            _mman.punch_hole(self._fd, self._offset + address - self._extent.address, nbytes)

    def unmap(self, start: int = 0, length: int | None = None) -> None:
        """Unmap pages; the rest stays. Touching what has gone is SIGSEGV.

        Raises:
            ExportedError: A view of it is alive, or another thread is using it.
            UsageError: Not whole pages of what is mapped.
        """
        self._extent.unmap(start, length)

    def remap(
        self,
        new_length: int | None = None,
        *,
        to: int | Mapping | None = None,
        dontunmap: bool = False,
        may_move: bool = True,
    ) -> Mapping:
        """Resize or move it with mremap(2): pages move, nothing is copied.

        Registrations with a userfaultfd that has EVENT_REMAP move along, and this returns only when its events were
        read. Without that feature the memory is not registered at its new place.

        Args:
            new_length: Length that it is to have, a multiple of the page size; None keeps it. A file behind it is not
                made longer.
            to: Where it is to be: an address, where whatever is mapped is *replaced*, or another mapping, which loses
                that range (and is closed when nothing is left of it), also if the kernel then fails to move. None for
                where the kernel likes.
            dontunmap: Leave the old range mapped, but empty (Linux 5.7): still registered, it traps again.
            may_move: False lets it grow and shrink only where it is.

        Returns:
            The mapping that has the pages now: this one, or with `dontunmap` a new one.

        Raises:
            NoMemoryError: No room.
            BadAddressError: In the kernel it is several mappings: a part was protected or advised differently.
            InvalidRequestError: Ranges that overlap, or a flag that this kernel or memory does not know.
            ExportedError: A view of it is alive, or another thread is using it.
            UsageError: A length or address that cannot be, or a part was unmapped.
        """
        length = self.length if new_length is None else new_length
        check_length(length, self.page_size)
        if dontunmap and length != self.length:
            raise UsageError(f"dontunmap keeps the length: {length} is not {self.length}")
        if isinstance(to, Mapping) and (to is self or to.length < length):
            raise UsageError(f"{to!r} cannot take {length} bytes of {self!r}")
        target = to.address if isinstance(to, Mapping) else to or 0
        check_multiple("address", target, self.page_size)
        flags = RemapFlag.MAYMOVE if may_move or dontunmap or to is not None else 0
        flags |= (RemapFlag.FIXED if to is not None else 0) | (RemapFlag.DONTUNMAP if dontunmap else 0)
        placed = self._extent.move(length, flags, target, to._extent if isinstance(to, Mapping) else None)
        if isinstance(to, Mapping) and to._extent.empty:
            to.close()
        if not dontunmap:
            return self
        return Mapping(
            placed,
            length,
            kind=self._kind,
            shared=self._shared,
            page_size=self.page_size,
            protection=self._protection,
            fd=None if self._fd is None else _mman.duplicate(self._fd),
            offset=self._offset,
        )

    # --- its end -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap it and close its file. Idempotent. With EVENT_UNMAP it returns only when the event was read.

        Raises:
            ExportedError: A view of it is alive, or another thread is using it.
        """
        self._extent.close()
        self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        self._extent.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; while an exception passes through, views that it keeps alive keep the memory mapped."""
        if kind is None or not self._extent.in_use:
            self.close()

    def __del__(self) -> None:
        # The extent goes by itself, now or with the last view of it.
        with suppress(Exception):
            self._close_file()
