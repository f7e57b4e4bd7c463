"""What a correct handler makes of the kernel's answers, so that nobody repeats the known bugs.

The fill requests answer with more than success and failure. These helpers follow the rules that hold for all of
them (docs/kernel-api.md; mm/userfaultfd.c), and end in bounded time:

| answer | what it means | what is done here |
|---|---|---|
| EAGAIN, something done | a part was done; the reason comes with the next call | go on at the rest |
| EAGAIN, nothing done | mremap, munmap, madvise or fork is under way | read all events, back off, retry |
| EEXIST | there is a page already | wake its waiters, and go on behind it |
| ENOENT | the range crosses mappings, or is gone | page by page; a page that is gone is woken and counted |
| ENOMEM | out of memory for now | back off, try again until the deadline |
| ESRCH | the owner has exited | `TargetExitedError` |
| others | a bug, or a source that is gone | raised with what was done |

Events that were read on the way come first out of the next `read_events` of the same object: nothing is lost.
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from userfault.kernel._address import PAGE_SIZE, is_address, range_of, source_of
from userfault.kernel._requests import Outcome
from userfault.kernel.abi import PagemapBit
from userfault.kernel.errors import NoMemoryError, UsageError, error_from_errno

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from userfault.kernel.userfaultfd import Userfaultfd

__all__ = ["Served", "continue_all", "copy_all", "move_all", "poison_all", "zero_all"]

_FIRST_PAUSE_S: Final = 0.00005
_LONGEST_PAUSE_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a range. The three add up to its length.

    Attributes:
        filled: Bytes that this call filled.
        existed: Bytes where a page was already; their waiters were woken.
        gone: Bytes that are not registered or not mapped any more; their waiters were woken too.
    """

    filled: int
    existed: int
    gone: int


class _Serving:
    """One range on its way: what is done, and how long it may still take."""

    def __init__(
        self,
        uffd: Userfaultfd,
        call: str,
        start: int,
        length: int,
        *,
        page_size: int,
        others: Iterable[Userfaultfd],
        deadline_s: float,
    ) -> None:
        if page_size < PAGE_SIZE or page_size & (page_size - 1):
            raise UsageError(f"page_size {page_size} is no power of two of at least {PAGE_SIZE}")
        if start % page_size or length % page_size:
            raise UsageError(f"[{start:#x}, +{length:#x}) is not whole pages of {page_size} bytes")
        self.uffd = uffd
        self.call = call
        self.start = start
        self.length = length
        self.page_size = page_size
        self.others = tuple(others)
        self.deadline = time.monotonic() + deadline_s
        self.pause = _FIRST_PAUSE_S
        self.position = 0
        self.filled = self.existed = self.gone = 0
        self.retried_at = -1  # a page that was not found is asked for twice

    def run(self, fill: Callable[[int, int], Outcome], *, wake: bool) -> Served:
        """Call `fill(offset, length)` until all is done."""
        step = self.length
        while self.position < self.length:
            length = min(step, self.length - self.position)
            outcome = fill(self.position, length)
            if outcome.done:
                self.filled += outcome.done
                self.position += outcome.done
                self.pause = _FIRST_PAUSE_S
            if outcome.errno == 0 or (outcome.errno == errno.EAGAIN and outcome.done):
                continue
            if outcome.errno == errno.EAGAIN:
                self._drain()
                self._wait(outcome)
            elif outcome.errno == errno.EEXIST:
                # Only the first page is known to be there.
                self._look_for_huge_page()
                self._skip(wake=wake)
                self.existed += self.page_size
            elif outcome.errno == errno.ENOENT and length > self.page_size:
                self._drain()
                step = self.page_size
            elif outcome.errno == errno.ENOENT:
                self._drain()
                if self.retried_at != self.position:
                    self.retried_at = self.position
                    continue
                self._skip(wake=True)
                self.gone += self.page_size
            elif outcome.errno == errno.ENOMEM:
                self._wait(outcome)
            else:
                raise self._error(outcome)
        return Served(self.filled, self.existed, self.gone)

    def _skip(self, *, wake: bool) -> None:
        if wake:
            self.uffd.wake(self.start + self.position, self.page_size)
        self.position += self.page_size

    def _drain(self) -> None:
        for uffd in (self.uffd, *self.others):
            uffd.drain()

    def _wait(self, outcome: Outcome) -> None:
        if time.monotonic() + self.pause > self.deadline:
            raise self._error(outcome)
        time.sleep(self.pause)
        self.pause = min(self.pause * 2, _LONGEST_PAUSE_S)

    def _error(self, outcome: Outcome) -> Exception:
        return error_from_errno(
            outcome.errno,
            call=self.call,
            address=self.start + self.position,
            length=self.length - self.position,
            done=self.position,
        )

    def _look_for_huge_page(self) -> None:
        """Tell a page that exists from an empty pool: for huge pages without reservation the kernel says EEXIST.

        Waking and trying again would go on for ever. Looked at in this process's memory only.
        """
        if self.page_size == PAGE_SIZE or self.call not in ("UFFDIO_COPY", "UFFDIO_CONTINUE"):
            return
        pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{self.page_size >> 10}kB/free_hugepages")
        try:
            if int(pool.read_text()) > 0:
                return
            with open("/proc/self/pagemap", "rb") as pagemap:
                pagemap.seek((self.start + self.position) // PAGE_SIZE * 8)
                entry = int.from_bytes(pagemap.read(8), "little")
        except OSError:
            return
        if not entry & PagemapBit.PRESENT:
            remedy = "the pool of huge pages is empty (the kernel says EEXIST): raise vm.nr_hugepages"
            error = error_from_errno(
                errno.ENOMEM,
                call=self.call,
                address=self.start + self.position,
                length=self.page_size,
                done=self.position,
                remedy=remedy,
            )
            assert isinstance(error, NoMemoryError)
            raise error


def copy_all(
    uffd: Userfaultfd,
    dst: Any,
    src: Any,
    length: int | None = None,
    *,
    wake: bool = True,
    write_protect: bool = False,
    page_size: int = PAGE_SIZE,
    others: Iterable[Userfaultfd] = (),
    deadline_s: float = 10.0,
) -> Served:
    """Fill a range with a copy of `src`, whatever is in the way.

    Args:
        uffd: Whose range it is.
        dst: Where to, as `Userfaultfd.copy`.
        src: The bytes, as `Userfaultfd.copy`.
        length: In bytes.
        wake: Wake those who wait.
        write_protect: Install the pages write-protected.
        page_size: In bytes; of the huge pages where it is hugetlb memory.
        others: Further userfaultfds of the same process: a fork stops the requests of all of them until the
            event of each has been read.
        deadline_s: How long to try in seconds while the kernel says EAGAIN or ENOMEM.

    Returns:
        What was filled, existed and was gone.

    Raises:
        TargetExitedError: The owner has exited.
        AgainError: The address space was still changing at the deadline.
        NoMemoryError: There was still no memory at the deadline, or the pool of huge pages is empty.
        UffdError: The source cannot be read, or another refusal; `done` says how far it came.
    """
    if length is None and not is_address(dst):
        dst, length = range_of(dst, None, "target")
    address, length, keep = source_of(src, length)
    start, length = range_of(dst, length, "target")
    serving = _Serving(
        uffd, "UFFDIO_COPY", start, length, page_size=page_size, others=others, deadline_s=deadline_s
    )
    served = serving.run(
        lambda offset, count: uffd.try_copy(
            start + offset, address + offset, count, wake=wake, write_protect=write_protect
        ),
        wake=wake,
    )
    del keep
    return served


def zero_all(
    uffd: Userfaultfd,
    dst: Any,
    length: int | None = None,
    *,
    wake: bool = True,
    page_size: int = PAGE_SIZE,
    others: Iterable[Userfaultfd] = (),
    deadline_s: float = 10.0,
) -> Served:
    """Fill a range with zeros; huge pages, which have no zero page, with a copy of zeros.

    A write-protection mark on an empty page counts as a page that exists: where WP is registered and empty pages
    are protected, copy zeros instead.

    Raises:
        UffdError: As `copy_all`.
    """
    start, length = range_of(dst, length, "target")
    serving = _Serving(
        uffd, "UFFDIO_ZEROPAGE", start, length, page_size=page_size, others=others, deadline_s=deadline_s
    )
    if page_size == PAGE_SIZE:
        return serving.run(
            lambda offset, count: uffd.try_zeropage(start + offset, count, wake=wake), wake=wake
        )
    serving.call = "UFFDIO_COPY"
    zeros = bytes(page_size)

    def fill(offset: int, count: int) -> Outcome:
        done = 0
        while done < count:
            outcome = uffd.try_copy(start + offset + done, zeros, page_size, wake=wake)
            done += outcome.done
            if outcome.errno:
                # With something done the true reason comes with the next call, as the kernel has it.
                return Outcome(done, errno.EAGAIN) if done else outcome
        return Outcome(done, 0)

    return serving.run(fill, wake=wake)


def continue_all(
    uffd: Userfaultfd,
    dst: Any,
    length: int | None = None,
    *,
    wake: bool = True,
    write_protect: bool = False,
    page_size: int = PAGE_SIZE,
    others: Iterable[Userfaultfd] = (),
    deadline_s: float = 10.0,
) -> Served:
    """Map the pages of a range that are in the page cache.

    Raises:
        BadAddressError: The file has a hole there; `done` says how far it came.
        UffdError: As `copy_all`.
    """
    start, length = range_of(dst, length, "target")
    serving = _Serving(
        uffd, "UFFDIO_CONTINUE", start, length, page_size=page_size, others=others, deadline_s=deadline_s
    )
    return serving.run(
        lambda offset, count: uffd.try_continue(
            start + offset, count, wake=wake, write_protect=write_protect
        ),
        wake=wake,
    )


def poison_all(
    uffd: Userfaultfd,
    dst: Any,
    length: int | None = None,
    *,
    wake: bool = True,
    page_size: int = PAGE_SIZE,
    others: Iterable[Userfaultfd] = (),
    deadline_s: float = 10.0,
) -> Served:
    """Make what is missing in a range fail loudly; pages that exist stay as they are.

    Raises:
        UffdError: As `copy_all`.
    """
    start, length = range_of(dst, length, "target")
    serving = _Serving(
        uffd, "UFFDIO_POISON", start, length, page_size=page_size, others=others, deadline_s=deadline_s
    )
    return serving.run(lambda offset, count: uffd.try_poison(start + offset, count, wake=wake), wake=wake)


def move_all(
    uffd: Userfaultfd,
    dst: Any,
    src: Any,
    length: int | None = None,
    *,
    wake: bool = True,
    allow_holes: bool = False,
    others: Iterable[Userfaultfd] = (),
    deadline_s: float = 10.0,
) -> Served:
    """Move a range of pages; where a page exists already, the one to be moved stays where it is.

    Raises:
        RangeBusyError: A page is pinned or shared: copy it, then give up the source; `done` says how far it came.
        UffdError: As `copy_all`.
    """
    if length is None and not is_address(dst):
        dst, length = range_of(dst, None, "target")
    address, length = range_of(src, length, "source")
    start, length = range_of(dst, length, "target")
    serving = _Serving(
        uffd, "UFFDIO_MOVE", start, length, page_size=PAGE_SIZE, others=others, deadline_s=deadline_s
    )
    return serving.run(
        lambda offset, count: uffd.try_move(
            start + offset, address + offset, count, wake=wake, allow_holes=allow_holes
        ),
        wake=wake,
    )
