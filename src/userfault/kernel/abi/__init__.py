"""The numbers and structures of userfaultfd and PAGEMAP_SCAN, complete through Linux 7.3.

They are ours, not taken from the machine's headers, because those are often older than its kernel; a test
compiles C programs against the newest header that can be had and compares everything in it. Names are the
kernel's without their prefix: `UFFD_FEATURE_SIGBUS` is `Feature.SIGBUS`, `UFFDIO_COPY_MODE_WP` is
`CopyMode.WP`, the request `UFFDIO_COPY` is `Request.COPY`, `struct uffdio_copy` is `COPY`. `C_NAMES` and
`LAYOUTS` find them by the header's names, and `c_name` gives those back:

    >>> from userfault.kernel import abi
    >>> abi.C_NAMES["UFFDIO_COPY_MODE_WP"]
    <CopyMode.WP: 2>
    >>> abi.c_name(abi.Feature.SIGBUS | abi.Feature.MOVE)
    'UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MOVE'
    >>> abi.LAYOUTS["uffdio_copy"].offsets["copy"]
    32

Unknown bits are kept, so that a newer kernel's answers survive a round trip:

    >>> int(abi.Feature(1 << 40 | abi.Feature.MOVE)) == 1 << 40 | 1 << 16
    True
"""

from userfault.kernel._architecture import SYSCALL_NUMBERS
from userfault.kernel.abi._flags import (
    FEATURE_SINCE,
    REGISTER_MODE_SINCE,
    ContinueMode,
    CopyMode,
    Event,
    FaultFlag,
    Feature,
    MoveMode,
    OpenFlag,
    Operation,
    PageCategory,
    PagemapBit,
    PoisonMode,
    RegisterMode,
    RwprotectMode,
    ScanFlag,
    WriteprotectMode,
    ZeropageMode,
)
from userfault.kernel.abi._layouts import (
    API,
    CONTINUE,
    COPY,
    LAYOUTS,
    MESSAGE_FORK,
    MESSAGE_PAGEFAULT,
    MESSAGE_RANGE,
    MESSAGE_REMAP,
    MESSAGE_SIZE,
    MESSAGES,
    MOVE,
    PAGE_REGION,
    POISON,
    RANGE,
    REGISTER,
    RWPROTECT,
    SCAN_ARGUMENT,
    SET_MODE,
    WRITEPROTECT,
    ZEROPAGE,
    Layout,
)
from userfault.kernel.abi._names import C_NAMES, c_name
from userfault.kernel.abi._requests import (
    API_FEATURES,
    API_IOCTLS,
    API_RANGE_IOCTLS,
    API_RANGE_IOCTLS_BASIC,
    API_REGISTER_MODES,
    PAGEMAP_MAGIC,
    REQUEST_SINCE,
    UFFD_API,
    UFFD_DEVICE,
    UFFDIO_MAGIC,
    Request,
)

__all__ = [
    "API",
    "API_FEATURES",
    "API_IOCTLS",
    "API_RANGE_IOCTLS",
    "API_RANGE_IOCTLS_BASIC",
    "API_REGISTER_MODES",
    "CONTINUE",
    "COPY",
    "C_NAMES",
    "FEATURE_SINCE",
    "LAYOUTS",
    "MESSAGES",
    "MESSAGE_FORK",
    "MESSAGE_PAGEFAULT",
    "MESSAGE_RANGE",
    "MESSAGE_REMAP",
    "MESSAGE_SIZE",
    "MOVE",
    "PAGEMAP_MAGIC",
    "PAGE_REGION",
    "POISON",
    "RANGE",
    "REGISTER",
    "REGISTER_MODE_SINCE",
    "REQUEST_SINCE",
    "RWPROTECT",
    "SCAN_ARGUMENT",
    "SET_MODE",
    "SYSCALL_NUMBERS",
    "UFFDIO_MAGIC",
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
    "c_name",
]
