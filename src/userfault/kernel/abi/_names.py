"""The header's names: from C to ours, and back for messages."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from userfault.kernel._architecture import syscall_number
from userfault.kernel.abi import _flags as flags
from userfault.kernel.abi import _requests as requests
from userfault.kernel.abi._requests import Request

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["C_NAMES", "c_name"]

_PREFIXES: Final[Mapping[type, str]] = MappingProxyType(
    {
        flags.OpenFlag: "UFFD_",
        flags.Feature: "UFFD_FEATURE_",
        flags.Event: "UFFD_EVENT_",
        flags.FaultFlag: "UFFD_PAGEFAULT_FLAG_",
        flags.RegisterMode: "UFFDIO_REGISTER_MODE_",
        flags.CopyMode: "UFFDIO_COPY_MODE_",
        flags.ZeropageMode: "UFFDIO_ZEROPAGE_MODE_",
        flags.ContinueMode: "UFFDIO_CONTINUE_MODE_",
        flags.PoisonMode: "UFFDIO_POISON_MODE_",
        flags.MoveMode: "UFFDIO_MOVE_MODE_",
        flags.WriteprotectMode: "UFFDIO_WRITEPROTECT_MODE_",
        flags.RwprotectMode: "UFFDIO_RWPROTECT_MODE_",
        flags.PageCategory: "PAGE_IS_",
        flags.ScanFlag: "PM_SCAN_",
        # The header's own macro is the bit's number.
        flags.Operation: "1 << _UFFDIO_",
        Request: "UFFDIO_",
    }
)
_OTHER_DRIVERS: Final[Mapping[Request, str]] = MappingProxyType(
    {Request.NEW: "USERFAULTFD_IOC_NEW", Request.PAGEMAP_SCAN: "PAGEMAP_SCAN"}
)


def c_name(value: flags.Flags | flags.Event | Request) -> str:
    """Return how C writes a value of this module, for messages and for looking it up in the kernel's documents.

    Raises:
        TypeError: No header has a name for this type (`PagemapBit`, plain numbers).

    >>> from userfault.kernel.abi import CopyMode, Feature, Operation, c_name
    >>> c_name(CopyMode.WP | CopyMode.DONTWAKE)
    'UFFDIO_COPY_MODE_DONTWAKE | UFFDIO_COPY_MODE_WP'
    >>> c_name(Feature.MOVE | 1 << 40), c_name(Operation.COPY), c_name(Feature(0))
    ('UFFD_FEATURE_MOVE | 0x10000000000', '1 << _UFFDIO_COPY', '0')
    """
    if isinstance(value, Request) and value in _OTHER_DRIVERS:
        return _OTHER_DRIVERS[value]
    try:
        prefix = _PREFIXES[type(value)]
    except KeyError:
        raise TypeError(f"no header of Linux names {value!r}") from None
    if not isinstance(value, flags.Flags):
        return prefix + value.name
    unnamed = int(value)
    words = []
    for member in value:
        words.append(f"{prefix}{member.name}")
        unnamed &= ~int(member)
    if unnamed or not words:
        words.append(hex(unnamed) if unnamed else "0")
    return " | ".join(words)


def _all_names() -> dict[str, int]:
    names: dict[str, int] = {
        c_name(member): member
        for family in _PREFIXES
        if family is not flags.Operation
        for member in family  # type: ignore[attr-defined]
    }
    names |= {f"_UFFDIO_{member.name}": int(member).bit_length() - 1 for member in flags.Operation}
    return names | {
        "UFFD_API": requests.UFFD_API,
        "UFFD_API_FEATURES": requests.API_FEATURES,
        "UFFD_API_REGISTER_MODES": requests.API_REGISTER_MODES,
        "UFFD_API_IOCTLS": requests.API_IOCTLS,
        "UFFD_API_RANGE_IOCTLS": requests.API_RANGE_IOCTLS,
        "UFFD_API_RANGE_IOCTLS_BASIC": requests.API_RANGE_IOCTLS_BASIC,
        "UFFDIO": requests.UFFDIO_MAGIC,
        "USERFAULTFD_IOC": requests.UFFDIO_MAGIC,
        "PROCFS_IOCTL_MAGIC": requests.PAGEMAP_MAGIC,
        "__NR_userfaultfd": syscall_number(),
    }


C_NAMES: Final[Mapping[str, int]] = MappingProxyType(_all_names())
