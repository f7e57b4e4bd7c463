"""Where a mapping goes: at an address, at an aligned one, or anywhere; and the checks of its numbers."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from userfault.kernel import _mman
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel._mman import MapFlag, Protection
from userfault.kernel.errors import PageExistsError, UsageError

__all__ = ["check_length", "check_multiple", "huge_bits", "map_flags", "place"]

_HUGE_SHIFT: Final = 26  # MAP_HUGE_SHIFT and MFD_HUGE_SHIFT
_TYPE_BITS: Final = MapFlag.SHARED | MapFlag.PRIVATE | MapFlag.DROPPABLE
_TRIES: Final = 100


def check_multiple(what: str, value: int, page_size: int) -> None:
    """Refuse an address or offset inside of a page."""
    if value < 0 or value % page_size:
        raise UsageError(f"{what} {value:#x} is not a multiple of the page size {page_size}")


def check_length(length: int, page_size: int) -> None:
    """Refuse what is not a number of whole pages."""
    if length <= 0 or length % page_size:
        up = max(1, -(-length // page_size)) * page_size
        raise UsageError(
            f"length {length} is not a positive multiple of the page size {page_size}: {up} would be"
        )


def huge_bits(size: int) -> int:
    """Return the bits by which mmap and memfd_create are told the size of huge pages."""
    if size <= PAGE_SIZE or size & (size - 1):
        raise UsageError(f"huge page size {size} is not a power of two above {PAGE_SIZE}")
    return (size.bit_length() - 1) << _HUGE_SHIFT


def map_flags(flags: int, shared: bool, noreserve: bool, populate: bool) -> int:
    """Add the flags of mmap(2) that the arguments stand for; a type among `flags` stays."""
    if not flags & _TYPE_BITS:
        flags |= MapFlag.SHARED if shared else MapFlag.PRIVATE
    if noreserve:
        flags |= MapFlag.NORESERVE
    if populate:
        flags |= MapFlag.POPULATE
    return flags


def place(
    length: int,
    address: int | None,
    align: int | None,
    page_size: int,
    protection: int,
    flags: int,
    fd: int = -1,
    offset: int = 0,
) -> int:
    """Map at an address, or at a multiple of `align`."""
    check_length(length, page_size)
    if align is None:
        align = page_size
    if align <= 0 or align & (align - 1):
        raise UsageError(f"align {align} is not a power of two")
    align = max(align, page_size)
    if address is not None:
        check_multiple("address", address, page_size)
        if address % align:
            raise UsageError(f"address {address:#x} is not a multiple of align {align}")
        return _mman.mmap_exactly(address, length, protection, flags, fd, offset)
    if align == page_size:
        return _mman.mmap(0, length, protection, flags, fd, offset)
    for _ in range(_TRIES):
        # Find room that holds an aligned range, give it back, take the range: if another thread was faster, again.
        # Mapping over a reservation instead would leave a hole that is not ours where the second mmap fails.
        room = length + align
        found = _mman.mmap(0, room, Protection.NONE, MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.NORESERVE)
        _mman.munmap(found, room)
        with suppress(PageExistsError):
            return _mman.mmap_exactly(-(-found // align) * align, length, protection, flags, fd, offset)
    raise UsageError(f"no room for {length} bytes at a multiple of {align} stayed free; give an address")
