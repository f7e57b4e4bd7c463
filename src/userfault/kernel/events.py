"""What a userfaultfd reports: one small object per message of 32 bytes.

`PageFault` is the only one that is always there; the others come if their feature was asked for. A thread that
causes `Fork`, `Remap`, `Remove` or `Unmap` waits until the event has been *read*; until it has run again all
fill and protect requests answer EAGAIN. Faults overtake events: read until nothing is left, apply the events,
then serve the faults. (docs: Documentation/admin-guide/mm/userfaultfd.rst; kernel: mm/userfaultfd.c,
`userfaultfd_ctx_read`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from userfault.kernel.abi import (
    MESSAGE_FORK,
    MESSAGE_PAGEFAULT,
    MESSAGE_RANGE,
    MESSAGE_REMAP,
    MESSAGE_SIZE,
    Event,
    FaultFlag,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.kernel.userfaultfd import Userfaultfd

__all__ = ["AnyEvent", "FaultKind", "Fork", "PageFault", "Remap", "Remove", "UnknownEvent", "Unmap", "decode"]


class FaultKind(StrEnum):
    """Why an access was trapped."""

    MISSING = "missing"  # no page: copy, zero, move or poison one
    MINOR = "minor"  # the page is in the page cache, and not mapped: continue_
    WRITE_PROTECT = "write-protect"  # a write to a protected page: writeprotect(protect=False)
    READ_WRITE_PROTECT = "read-write-protect"  # any access to a protected page: rwprotect(protect=False)


_KINDS: Final = tuple(
    FaultKind.WRITE_PROTECT
    if bits & FaultFlag.WP
    else FaultKind.MINOR
    if bits & FaultFlag.MINOR
    else FaultKind.READ_WRITE_PROTECT
    if bits & FaultFlag.RWP
    else FaultKind.MISSING
    for bits in range(16)
)


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits for a page. One message per waiting thread, and now and then one more: be idempotent.

    Attributes:
        address: Of the page (of the huge page on hugetlb), or of the access itself with `EXACT_ADDRESS`.
        flags: The kernel's flags.
        thread_id: Thread that waits, in the numbers of its own process's namespace; 0 without `THREAD_ID`.
    """

    address: int
    flags: FaultFlag
    thread_id: int

    @property
    def kind(self) -> FaultKind:
        """Why it was trapped, and so which request resolves it."""
        return _KINDS[self.flags & 15]

    @property
    def write(self) -> bool:
        """Whether the access is a write (mlock and futex count as writes)."""
        return bool(self.flags & FaultFlag.WRITE)


@dataclass(frozen=True, slots=True)
class Fork:
    """The process has forked. Its child's faults come through `child`, and wait until somebody serves them.

    Attributes:
        child: The child's userfaultfd, ready for use, with the features of its parent's; yours to close.
    """

    child: Userfaultfd


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap moved memory. The old range still wants a `wake` for threads that wait in it.

    Attributes:
        source: Where it was.
        target: Where it is.
        length: Its old length in bytes.
    """

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """The contents are being given up (MADV_DONTNEED, MADV_REMOVE, MADV_FREE): what is missing there is zeros now.

    It comes *before* the pages go, so a page that is filled right after reading it may go again.

    Attributes:
        start: First byte.
        end: One past the last byte.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """The range is unmapped, and so no longer registered; it may cover memory that never was.

    Attributes:
        start: First byte.
        end: One past the last byte.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """A message that came with a kernel newer than this library.

    Attributes:
        event: Its number.
        raw: The message, 32 bytes.
    """

    event: int
    raw: bytes


AnyEvent = PageFault | Fork | Remap | Remove | Unmap | UnknownEvent

_PAGEFAULT: Final = int(Event.PAGEFAULT)
# Making an enum member from a number costs more than the rest of decoding.
_FLAGS: Final = tuple(FaultFlag(bits) for bits in range(16))
_unpack_pagefaults: Final = MESSAGE_PAGEFAULT.iter_unpack


def decode(data: bytes, adopt: Callable[[int], Userfaultfd]) -> list[AnyEvent]:
    """Decode messages as read(2) gave them.

    Args:
        data: A multiple of 32 bytes.
        adopt: Makes an object of the descriptor in a fork event.
    """
    events: list[AnyEvent] = []
    for event, flags, address, thread_id in _unpack_pagefaults(data):
        if event == _PAGEFAULT:
            known = _FLAGS[flags] if flags < 16 else FaultFlag(flags)
            events.append(PageFault(address, known, thread_id))
        else:
            start = len(events) * MESSAGE_SIZE
            events.append(_decode_other(event, data[start : start + MESSAGE_SIZE], adopt))
    return events


def _decode_other(event: int, raw: bytes, adopt: Callable[[int], Userfaultfd]) -> AnyEvent:
    if event == Event.FORK:
        return Fork(adopt(MESSAGE_FORK.unpack(raw)[1]))
    if event == Event.REMAP:
        return Remap(*MESSAGE_REMAP.unpack(raw)[1:])
    if event == Event.REMOVE:
        return Remove(*MESSAGE_RANGE.unpack(raw)[1:])
    if event == Event.UNMAP:
        return Unmap(*MESSAGE_RANGE.unpack(raw)[1:])
    return UnknownEvent(event, raw)
