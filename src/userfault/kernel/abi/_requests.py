"""Requests: the ioctl words on this architecture, and the sets of bits that the header gives a name."""

from __future__ import annotations

from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from userfault.kernel._ioc import io, ior, iow, iowr
from userfault.kernel.abi import _layouts as layouts
from userfault.kernel.abi._flags import Feature, Operation, RegisterMode

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "API_FEATURES",
    "API_IOCTLS",
    "API_RANGE_IOCTLS",
    "API_RANGE_IOCTLS_BASIC",
    "API_REGISTER_MODES",
    "PAGEMAP_MAGIC",
    "REQUEST_SINCE",
    "UFFDIO_MAGIC",
    "UFFD_API",
    "UFFD_DEVICE",
    "Request",
]

UFFD_API: Final = 0xAA
UFFD_DEVICE: Final = "/dev/userfaultfd"

# The letter of the driver in a request word: of userfaultfd and its device, and of the files in /proc.
UFFDIO_MAGIC: Final = 0xAA
PAGEMAP_MAGIC: Final = ord("f")


class Request(IntEnum):
    """ioctl request words on this architecture.

    UNREGISTER and WAKE are declared `_IOR` although the kernel reads their argument.
    """

    NEW = io(UFFDIO_MAGIC, 0x00)  # on /dev/userfaultfd
    API = iowr(UFFDIO_MAGIC, 0x3F, layouts.API.size)
    REGISTER = iowr(UFFDIO_MAGIC, 0x00, layouts.REGISTER.size)
    UNREGISTER = ior(UFFDIO_MAGIC, 0x01, layouts.RANGE.size)
    WAKE = ior(UFFDIO_MAGIC, 0x02, layouts.RANGE.size)
    COPY = iowr(UFFDIO_MAGIC, 0x03, layouts.COPY.size)
    ZEROPAGE = iowr(UFFDIO_MAGIC, 0x04, layouts.ZEROPAGE.size)
    MOVE = iowr(UFFDIO_MAGIC, 0x05, layouts.MOVE.size)
    WRITEPROTECT = iowr(UFFDIO_MAGIC, 0x06, layouts.WRITEPROTECT.size)
    CONTINUE = iowr(UFFDIO_MAGIC, 0x07, layouts.CONTINUE.size)
    POISON = iowr(UFFDIO_MAGIC, 0x08, layouts.POISON.size)
    RWPROTECT = iowr(UFFDIO_MAGIC, 0x09, layouts.RWPROTECT.size)
    SET_MODE = iow(UFFDIO_MAGIC, 0x0A, layouts.SET_MODE.size)
    PAGEMAP_SCAN = iowr(PAGEMAP_MAGIC, 16, layouts.SCAN_ARGUMENT.size)  # on /proc/PID/pagemap


REQUEST_SINCE: Final[Mapping[Request, str]] = MappingProxyType(
    {
        Request.NEW: "6.1",
        Request.API: "4.3",
        Request.REGISTER: "4.3",
        Request.UNREGISTER: "4.3",
        Request.WAKE: "4.3",
        Request.COPY: "4.3",
        Request.ZEROPAGE: "4.3",
        Request.MOVE: "6.8",
        Request.WRITEPROTECT: "5.7",
        Request.CONTINUE: "5.13",
        Request.POISON: "6.6",
        Request.RWPROTECT: "7.3",
        Request.SET_MODE: "7.3",
        Request.PAGEMAP_SCAN: "6.7",
    }
)

# What Linux 7.3 knows in all. The kernel that runs says itself what it knows: UFFDIO_API, UFFDIO_REGISTER.
API_FEATURES: Final = Feature(sum(Feature))
API_REGISTER_MODES: Final = RegisterMode(sum(RegisterMode))
API_IOCTLS: Final = Operation.REGISTER | Operation.UNREGISTER | Operation.SET_MODE | Operation.API
# BASIC is what huge pages of hugetlbfs can do.
API_RANGE_IOCTLS_BASIC: Final = (
    Operation.WAKE
    | Operation.COPY
    | Operation.WRITEPROTECT
    | Operation.CONTINUE
    | Operation.POISON
    | Operation.RWPROTECT
)
API_RANGE_IOCTLS: Final = API_RANGE_IOCTLS_BASIC | Operation.ZEROPAGE | Operation.MOVE
