"""Bits and events: what goes into the fields of userfaultfd's structures, and what the kernel answers in them."""

from __future__ import annotations

from enum import KEEP, EnumType, IntEnum, IntFlag
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FEATURE_SINCE",
    "REGISTER_MODE_SINCE",
    "ContinueMode",
    "CopyMode",
    "Event",
    "FaultFlag",
    "Feature",
    "Flags",
    "MoveMode",
    "OpenFlag",
    "Operation",
    "PageCategory",
    "PagemapBit",
    "PoisonMode",
    "RegisterMode",
    "RwprotectMode",
    "ScanFlag",
    "WriteprotectMode",
    "ZeropageMode",
]

_U64: Final = (1 << 64) - 1


class _KeepingType(EnumType):
    """The type of classes whose `~` leaves no bit out.

    IntFlag's own has only the bits that have a name: `features & ~Feature.MOVE` would lose a newer kernel's. A
    method of `Flags` would have no effect, because Enum gives each class of flags IntFlag's own again.
    """

    def __init__(cls, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        type.__setattr__(cls, "__invert__", lambda flag: cls(~int(flag) & _U64))


class Flags(IntFlag, metaclass=_KeepingType, boundary=KEEP):
    """Bits of one 64-bit field. Bits without a name here are those of a newer kernel, and are kept."""


class OpenFlag(Flags):
    """Flags of userfaultfd(2) and of the device's NEW request, beside `O_CLOEXEC` and `O_NONBLOCK`."""

    USER_MODE_ONLY = 1  # Linux 5.11: anybody may have it; system calls that touch a missing page get EFAULT


class Feature(Flags):
    """Bits of `uffdio_api.features`. `FEATURE_SINCE` says which release brought each."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16
    RWP = 1 << 17
    RWP_ASYNC = 1 << 18


FEATURE_SINCE: Final[Mapping[Feature, str]] = MappingProxyType(
    {
        Feature.PAGEFAULT_FLAG_WP: "5.7",
        Feature.EVENT_FORK: "4.11",
        Feature.EVENT_REMAP: "4.11",
        Feature.EVENT_REMOVE: "4.11",
        Feature.MISSING_HUGETLBFS: "4.11",
        Feature.MISSING_SHMEM: "4.11",
        Feature.EVENT_UNMAP: "4.11",
        Feature.SIGBUS: "4.14",
        Feature.THREAD_ID: "4.14",
        Feature.MINOR_HUGETLBFS: "5.13",
        Feature.MINOR_SHMEM: "5.14",
        Feature.EXACT_ADDRESS: "5.18",
        Feature.WP_HUGETLBFS_SHMEM: "5.19",
        Feature.WP_UNPOPULATED: "6.4",
        Feature.POISON: "6.6",
        Feature.WP_ASYNC: "6.7",
        Feature.MOVE: "6.8",
        Feature.RWP: "7.3",
        Feature.RWP_ASYNC: "7.3",
    }
)


class RegisterMode(Flags):
    """What a registered range traps. WP and RWP exclude each other on one mapping."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


REGISTER_MODE_SINCE: Final[Mapping[RegisterMode, str]] = MappingProxyType(
    {RegisterMode.MISSING: "4.3", RegisterMode.WP: "5.7", RegisterMode.MINOR: "5.13", RegisterMode.RWP: "7.3"}
)


class CopyMode(Flags):
    """Modes of UFFDIO_COPY."""

    DONTWAKE = 1 << 0
    WP = 1 << 1  # Linux 5.7


class ZeropageMode(Flags):
    """Modes of UFFDIO_ZEROPAGE."""

    DONTWAKE = 1 << 0


class ContinueMode(Flags):
    """Modes of UFFDIO_CONTINUE."""

    DONTWAKE = 1 << 0
    WP = 1 << 1  # Linux 6.4


class PoisonMode(Flags):
    """Modes of UFFDIO_POISON."""

    DONTWAKE = 1 << 0


class MoveMode(Flags):
    """Modes of UFFDIO_MOVE."""

    DONTWAKE = 1 << 0
    ALLOW_SRC_HOLES = 1 << 1


class WriteprotectMode(Flags):
    """Modes of UFFDIO_WRITEPROTECT: DONTWAKE is not where COPY has it, and WP|DONTWAKE is EINVAL."""

    WP = 1 << 0
    DONTWAKE = 1 << 1


class RwprotectMode(Flags):
    """Modes of UFFDIO_RWPROTECT (Linux 7.3). RWP|DONTWAKE is EINVAL."""

    RWP = 1 << 0
    DONTWAKE = 1 << 1


class Operation(Flags):
    """Bits of `uffdio_api.ioctls` and `uffdio_register.ioctls`: 1 << number of the request.

    The mask of REGISTER promises too much (MOVE on shared memory, COPY on files): only trying tells.
    """

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    RWPROTECT = 1 << 0x09
    SET_MODE = 1 << 0x0A
    API = 1 << 0x3F


class Event(IntEnum):
    """What a message is about. They start at 0x12, "to be more strict against bugs".

    `Event(number)` raises ValueError for a number that is not here; what reads messages of a newer kernel must be
    ready for it.
    """

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultFlag(Flags):
    """Flags of a page fault message; none of WP, MINOR and RWP means that the page is missing."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class ScanFlag(Flags):
    """Flags of PAGEMAP_SCAN."""

    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


class PageCategory(Flags):
    """What PAGEMAP_SCAN can say of a page."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7  # Linux 6.8
    GUARD = 1 << 8  # Linux 6.15
    ACCESSED = 1 << 9  # Linux 7.3


class PagemapBit(Flags):
    """Bits of one 64-bit entry of /proc/PID/pagemap; no header has them, they are in Documentation/admin-guide/mm.

    The lower 55 bits are a page frame number or a place in swap: mask them off before you make a `PagemapBit`, since
    the enum keeps each value that it has ever seen.
    """

    SOFT_DIRTY = 1 << 55
    EXCLUSIVE = 1 << 56
    UFFD_PROTECTED = 1 << 57  # WP or RWP, or their marker
    GUARD = 1 << 58
    FILE = 1 << 61
    SWAPPED = 1 << 62  # also set for markers
    PRESENT = 1 << 63
