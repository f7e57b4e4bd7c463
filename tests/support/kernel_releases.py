"""What the kernel's releases do differently: the one place where tests look at its number."""

from __future__ import annotations

import errno
import os
import re
from functools import cache
from typing import Any, Final

from support.kernel import PAGE

__all__ = ["UNTOUCHED", "documented", "release"]

# What these tests put where the kernel is to write a result.
UNTOUCHED: Final = 0x5A5A5A5A

Release = tuple[int, int]

_FIRST: Final = (0, 0)
_LAST: Final = (99, 0)

# Each alternative with the first and the last release on which it was seen; between two of them nobody has looked, and
# either is right. Seen were 6.1, 6.12, 6.18, 7.2 and 7.3.
_ALTERNATIVES: Final[dict[str, tuple[tuple[Release, Release, Any], ...]]] = {
    # --- registering
    "REGISTER of droppable memory": ((_FIRST, (6, 12), 0), ((6, 18), _LAST, errno.EINVAL)),
    "registering again without WP, which was all": ((_FIRST, (7, 2), "replaced"), ((7, 3), _LAST, "busy")),
    "registering again without WP, which was a part": ((_FIRST, (7, 2), "kept"), ((7, 3), _LAST, "busy")),
    "UNREGISTER of another's mapping": ((_FIRST, (6, 12), 0), ((6, 18), _LAST, errno.EINVAL)),
    # --- filling
    "fills while the address space changes": (
        (_FIRST, (6, 1), ((errno.EAGAIN, UNTOUCHED), errno.EAGAIN)),
        ((6, 12), _LAST, ((errno.EAGAIN, -errno.EAGAIN), errno.EFAULT)),
    ),
    "COPY from the kernel's half": (
        (_FIRST, (6, 1), (errno.EFAULT, -errno.EFAULT)),
        ((6, 12), _LAST, (errno.EINVAL, UNTOUCHED)),
    ),
    "COPY over a guard": (
        (_FIRST, (6, 18), (0, PAGE)),
        ((7, 2), _LAST, (errno.EEXIST, -errno.EEXIST)),
    ),
    "COPY beyond the end of a file of shmem": (
        (_FIRST, (6, 18), (errno.EFAULT, -errno.EFAULT)),
        ((7, 2), _LAST, (errno.ENOMEM, -errno.ENOMEM)),
    ),
    "COPY beyond the end of a file of hugetlb": ((_FIRST, _LAST, (errno.EFAULT, -errno.EFAULT)),),
    "COPY to huge pages from an empty pool": (
        (_FIRST, (6, 12), (errno.ENOMEM, -errno.ENOMEM)),
        ((6, 18), _LAST, (errno.EEXIST, -errno.EEXIST)),
    ),
    "CONTINUE beyond the end of the file": (
        (_FIRST, (6, 18), (errno.EINVAL, -errno.EINVAL)),
        ((7, 2), _LAST, (errno.EFAULT, -errno.EFAULT)),
    ),
    # --- protecting: 6.1 takes one mapping at a time, and leaves marks in the page tables of what is not registered
    "WRITEPROTECT of several mappings, one without the mode": (
        (_FIRST, (6, 1), (errno.ENOENT, [False] * 4)),
        ((6, 12), _LAST, (errno.ENOENT, [True, True, False, False])),
    ),
    "WRITEPROTECT over a hole": (
        (_FIRST, (6, 1), (errno.ENOENT, [False] * 4)),
        ((6, 12), _LAST, (0, [True, False, True, True])),
    ),
    "protection of moved memory that nobody follows": ((_FIRST, (6, 1), True), ((6, 12), _LAST, False)),
    "protection after the end of the userfaultfd": ((_FIRST, (6, 1), True), ((6, 12), _LAST, False)),
    "protection in a forked child of private huge pages": ((_FIRST, (6, 1), True), ((6, 12), _LAST, False)),
    "WRITTEN of memory that is not registered for WP": ((_FIRST, (7, 2), [0, 1, 2, 3]), ((7, 3), _LAST, [])),
    # --- the rest of the kernel
    # A userfaultfd can be asked not to wait (read_iter) since 6.10.
    "RWF_NOWAIT without a message": ((_FIRST, (6, 9), errno.EOPNOTSUPP), ((6, 10), _LAST, errno.EAGAIN)),
    # 6.1 pinned buffers with the lock of the address space held, and so could not wait.
    "registering missing pages with io_uring": (
        (_FIRST, (6, 1), (errno.EFAULT, [])),
        ((6, 12), _LAST, (0, [0, 1, 2])),
    ),
    "MADV_COLLAPSE of registered memory with a hole": (
        (_FIRST, (6, 1), errno.EINVAL),
        ((6, 12), _LAST, errno.EBUSY),
    ),
    "process_madvise(MADV_DONTNEED) of the own process": (
        (_FIRST, (6, 12), errno.EINVAL),
        ((6, 18), _LAST, 0),
    ),
    "mremap of several mappings": ((_FIRST, (6, 12), errno.EFAULT), ((6, 18), _LAST, 0)),
}


@cache
def release() -> Release:
    """Major and minor number of the running kernel."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None, os.uname().release
    return int(found[1]), int(found[2])


def documented(fact: str) -> tuple[Any, ...]:
    """What this release may answer, where releases differ."""
    now = release()
    before: tuple[Any, ...] = ()
    for first, last, value in _ALTERNATIVES[fact]:
        if first <= now <= last:
            return (value,)
        if first > now:
            return (*before, value)
        before = (value,)
    return before
