"""The numbers and structures of userfaultfd and PAGEMAP_SCAN, complete through Linux 7.3.

They are ours, not taken from the machine's headers, because those are often older than its kernel; a test
compiles a C program against `linux/userfaultfd.h` and compares everything that header knows. Names are the
kernel's without their prefix: `UFFD_FEATURE_SIGBUS` is `Feature.SIGBUS`, `UFFDIO_COPY_MODE_WP` is
`CopyMode.WP`, the request `UFFDIO_COPY` is `Request.COPY`.

Unknown bits are kept, so that a newer kernel's answers survive a round trip:

    >>> from userfault.kernel.abi import Feature
    >>> int(Feature(1 << 40 | Feature.MOVE)) == 1 << 40 | 1 << 16
    True
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from userfault.kernel._ioc import io, ior, iow, iowr

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "API",
    "CONTINUE",
    "COPY",
    "FEATURE_SINCE",
    "MESSAGE_FORK",
    "MESSAGE_PAGEFAULT",
    "MESSAGE_RANGE",
    "MESSAGE_REMAP",
    "MESSAGE_SIZE",
    "MOVE",
    "PAGE_REGION",
    "POISON",
    "RANGE",
    "REGISTER",
    "REGISTER_MODE_SINCE",
    "RWPROTECT",
    "SCAN_ARGUMENT",
    "SET_MODE",
    "SYSCALL_NUMBERS",
    "UFFD_API",
    "UFFD_DEVICE",
    "WRITEPROTECT",
    "ZEROPAGE",
    "ContinueMode",
    "CopyMode",
    "Event",
    "FaultFlag",
    "Feature",
    "Layout",
    "MoveMode",
    "OpenFlag",
    "Operation",
    "PageCategory",
    "PagemapBit",
    "PoisonMode",
    "RegisterMode",
    "Request",
    "RwprotectMode",
    "ScanFlag",
    "WriteprotectMode",
    "ZeropageMode",
]

UFFD_API: Final = 0xAA
UFFD_DEVICE: Final = "/dev/userfaultfd"

# No C library wraps userfaultfd(2). From arch/*/syscalls/syscall.tbl; whoever is not listed uses the generic
# table's 282.
SYSCALL_NUMBERS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "x86_64": 323,
        "i386": 374,
        "arm": 388,
        "armv7l": 388,
        "armv6l": 388,
        "aarch64": 282,
        "riscv64": 282,
        "loongarch64": 282,
        "ppc64le": 364,
        "ppc64": 364,
        "ppc": 364,
        "s390x": 355,
        "sparc64": 352,
        "mips64": 5317,
    }
)


class OpenFlag(IntFlag):
    """Flags of userfaultfd(2) and of the device's NEW request, beside `O_CLOEXEC` and `O_NONBLOCK`."""

    USER_MODE_ONLY = 1  # Linux 5.11: anybody may have it; system calls that touch a missing page get EFAULT


class Feature(IntFlag):
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


class RegisterMode(IntFlag):
    """What a registered range traps. WP and RWP exclude each other on one mapping."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


REGISTER_MODE_SINCE: Final[Mapping[RegisterMode, str]] = MappingProxyType(
    {RegisterMode.MISSING: "4.3", RegisterMode.WP: "5.7", RegisterMode.MINOR: "5.13", RegisterMode.RWP: "7.3"}
)


class CopyMode(IntFlag):
    """Modes of UFFDIO_COPY."""

    DONTWAKE = 1 << 0
    WP = 1 << 1  # Linux 5.7


class ZeropageMode(IntFlag):
    """Modes of UFFDIO_ZEROPAGE."""

    DONTWAKE = 1 << 0


class ContinueMode(IntFlag):
    """Modes of UFFDIO_CONTINUE."""

    DONTWAKE = 1 << 0
    WP = 1 << 1  # Linux 6.4


class PoisonMode(IntFlag):
    """Modes of UFFDIO_POISON."""

    DONTWAKE = 1 << 0


class MoveMode(IntFlag):
    """Modes of UFFDIO_MOVE."""

    DONTWAKE = 1 << 0
    ALLOW_SRC_HOLES = 1 << 1


class WriteprotectMode(IntFlag):
    """Modes of UFFDIO_WRITEPROTECT: DONTWAKE is not where COPY has it, and WP|DONTWAKE is EINVAL."""

    WP = 1 << 0
    DONTWAKE = 1 << 1


class RwprotectMode(IntFlag):
    """Modes of UFFDIO_RWPROTECT (Linux 7.3). RWP|DONTWAKE is EINVAL."""

    RWP = 1 << 0
    DONTWAKE = 1 << 1


class Event(IntEnum):
    """What a message is about. They start at 0x12, "to be more strict against bugs"."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultFlag(IntFlag):
    """Flags of a page fault message; none of WP, MINOR and RWP means that the page is missing."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class Layout(struct.Struct):
    """A C structure: its `struct` format, its C name and the names of its fields in order.

    `=` formats have no padding of their own; every gap is written out as `x`, and the test compares each
    offset with C.
    """

    def __init__(self, c_name: str, **fields: str) -> None:
        super().__init__("=" + "".join(fields.values()))
        self.c_name: Final = c_name
        self.fields: Final = tuple(name for name, code in fields.items() if not code.endswith("x"))
        offsets: dict[str, int] = {}
        position = 0
        for name, code in fields.items():
            if name in self.fields:
                offsets[name] = position
            position += struct.calcsize("=" + code)
        self.offsets: Final[Mapping[str, int]] = MappingProxyType(offsets)


# Structures. `range_start` and `range_len` stand for the nested uffdio_range.
API: Final = Layout("uffdio_api", api="Q", features="Q", ioctls="Q")
RANGE: Final = Layout("uffdio_range", start="Q", len="Q")
REGISTER: Final = Layout("uffdio_register", range_start="Q", range_len="Q", mode="Q", ioctls="Q")
COPY: Final = Layout("uffdio_copy", dst="Q", src="Q", len="Q", mode="Q", copy="q")
ZEROPAGE: Final = Layout("uffdio_zeropage", range_start="Q", range_len="Q", mode="Q", zeropage="q")
CONTINUE: Final = Layout("uffdio_continue", range_start="Q", range_len="Q", mode="Q", mapped="q")
POISON: Final = Layout("uffdio_poison", range_start="Q", range_len="Q", mode="Q", updated="q")
MOVE: Final = Layout("uffdio_move", dst="Q", src="Q", len="Q", mode="Q", move="q")
WRITEPROTECT: Final = Layout("uffdio_writeprotect", range_start="Q", range_len="Q", mode="Q")
RWPROTECT: Final = Layout("uffdio_rwprotect", range_start="Q", range_len="Q", mode="Q")
SET_MODE: Final = Layout("uffdio_set_mode", enable="Q", disable="Q")

# One message is 32 bytes whatever it says. The union begins at byte 8; `gap` is the reserved bytes 1 to 7.
MESSAGE_SIZE: Final = 32
MESSAGE_PAGEFAULT: Final = Layout(
    "uffd_msg", event="B", gap="7x", flags="Q", address="Q", ptid="I", rest="4x"
)
MESSAGE_FORK: Final = Layout("uffd_msg", event="B", gap="7x", ufd="I", rest="20x")
MESSAGE_REMAP: Final = Layout("uffd_msg", event="B", gap="7x", from_="Q", to="Q", len="Q")
# REMOVE and UNMAP
MESSAGE_RANGE: Final = Layout("uffd_msg", event="B", gap="7x", start="Q", end="Q", rest="8x")

PAGE_REGION: Final = Layout("page_region", start="Q", end="Q", categories="Q")
SCAN_ARGUMENT: Final = Layout(
    "pm_scan_arg",
    size="Q",
    flags="Q",
    start="Q",
    end="Q",
    walk_end="Q",
    vec="Q",
    vec_len="Q",
    max_pages="Q",
    category_inverted="Q",
    category_mask="Q",
    category_anyof_mask="Q",
    return_mask="Q",
)


class Operation(IntFlag):
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


_UFFDIO: Final = 0xAA


class Request(IntEnum):
    """ioctl request words on this architecture.

    UNREGISTER and WAKE are declared `_IOR` although the kernel reads their argument.
    """

    NEW = io(_UFFDIO, 0x00)  # on /dev/userfaultfd, Linux 6.1
    API = iowr(_UFFDIO, 0x3F, API.size)
    REGISTER = iowr(_UFFDIO, 0x00, REGISTER.size)
    UNREGISTER = ior(_UFFDIO, 0x01, RANGE.size)
    WAKE = ior(_UFFDIO, 0x02, RANGE.size)
    COPY = iowr(_UFFDIO, 0x03, COPY.size)
    ZEROPAGE = iowr(_UFFDIO, 0x04, ZEROPAGE.size)
    MOVE = iowr(_UFFDIO, 0x05, MOVE.size)  # Linux 6.8
    WRITEPROTECT = iowr(_UFFDIO, 0x06, WRITEPROTECT.size)  # Linux 5.7
    CONTINUE = iowr(_UFFDIO, 0x07, CONTINUE.size)  # Linux 5.13
    POISON = iowr(_UFFDIO, 0x08, POISON.size)  # Linux 6.6
    RWPROTECT = iowr(_UFFDIO, 0x09, RWPROTECT.size)  # Linux 7.3
    SET_MODE = iow(_UFFDIO, 0x0A, SET_MODE.size)  # Linux 7.3
    PAGEMAP_SCAN = iowr(ord("f"), 16, SCAN_ARGUMENT.size)  # on /proc/PID/pagemap, Linux 6.7


class ScanFlag(IntFlag):
    """Flags of PAGEMAP_SCAN."""

    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


class PageCategory(IntFlag):
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


class PagemapBit(IntFlag):
    """Bits of one 64-bit entry of /proc/PID/pagemap."""

    SOFT_DIRTY = 1 << 55
    EXCLUSIVE = 1 << 56
    UFFD_PROTECTED = 1 << 57  # WP or RWP, or their marker
    GUARD = 1 << 58
    FILE = 1 << 61
    SWAPPED = 1 << 62  # also set for markers
    PRESENT = 1 << 63
