"""The probe's trials of system calls that go with userfaultfd, without one (or with one that nobody waits for)."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Final

from userfault.kernel import abi
from userfault.kernel._kinds import MemoryKind
from userfault.kernel._probing.areas import PATTERN, TrialError, area, filled, regular_file
from userfault.kernel._syscalls import madvise_self

if TYPE_CHECKING:
    from userfault.kernel._probing.trials import Lab

__all__ = ["batched_advice", "guard", "nowait_events", "nowait_reads", "populate"]

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_MADV_GUARD_INSTALL: Final = 102  # Linux 6.13
_MADV_GUARD_REMOVE: Final = 103


def batched_advice(_: Lab) -> str:
    """Drop two areas at once."""
    with filled() as first, filled() as second:
        madvise_self([(one.address, one.size) for one in (first, second)], mmap.MADV_DONTNEED)
        for pages in (first, second):
            pages.expect(bytes(len(PATTERN)))
    return "two areas were dropped in one call"


def guard(_: Lab) -> str:
    """Make a page refuse access, and take that back."""
    with area(MemoryKind.ANONYMOUS) as pages:
        pages.memory.madvise(_MADV_GUARD_INSTALL)
        if not pages.is_trapped(pages.read):
            raise TrialError("a guard page could be read")
        pages.memory.madvise(_MADV_GUARD_REMOVE)
        pages.expect(bytes(len(PATTERN)))
    return "a guard page refused to be read, until it was removed"


def populate(_: Lab) -> str:
    """Map a page before it is touched."""
    with area(MemoryKind.ANONYMOUS) as pages:
        pages.memory.madvise(_MADV_POPULATE_WRITE)
    return "a page was mapped before it was touched"


def nowait_reads(_: Lab) -> str:
    """Read a file only as far as that needs no waiting. Which file system knows that depends on the file system."""
    path = regular_file()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.preadv(fd, [bytearray(16)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return f"{path} would have had to be read from its disk"
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise TrialError(f"the file system of {path} does not know RWF_NOWAIT") from error
        raise
    finally:
        os.close(fd)
    return f"{path} was read"


def nowait_events(lab: Lab) -> str:
    """Ask for a message without waiting, on a descriptor that needs no O_NONBLOCK for it."""
    # It has O_NONBLOCK here, because a kernel that ignored the flag would wait for ever. One that does not know it
    # says EOPNOTSUPP all the same.
    with lab.userfaultfd() as fd:
        try:
            os.preadv(fd, [bytearray(abi.MESSAGE_SIZE)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return "a read returned at once"
    raise TrialError("a message came from nowhere")
