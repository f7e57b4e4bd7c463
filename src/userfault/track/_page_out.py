"""Cold memory handed to the kernel: to swap out now, or first when memory runs short."""

from __future__ import annotations

import errno
import operator
import os
from typing import TYPE_CHECKING, Any, Final, Literal

from userfault.errors import RangeError, UntrackableError
from userfault.kernel._address import PAGE_MASK, PAGE_SIZE, is_address
from userfault.kernel._mman import Advice
from userfault.kernel._syscalls import madvise_process
from userfault.kernel.errors import error_from_errno
from userfault.track import _runs
from userfault.track._targets import Target, targets_of
from userfault.track._touched import Touched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from userfault.track._runs import Runs

__all__ = ["page_out"]

_ADVICE: Final = {"pageout": int(Advice.PAGEOUT), "cold": int(Advice.COLD)}
_AT_ONCE: Final = 1024  # UIO_MAXIOV
_FORBIDDEN: Final = (
    "another process's memory may be advised with CAP_SYS_NICE, by its own user or with CAP_SYS_PTRACE"
)
_REMEDIES: Final = {
    errno.EPERM: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.ESRCH: "there is no such process",
    errno.ENOMEM: "a part of the range is not mapped",
    errno.EINVAL: "locked memory (mlock), huge pages (hugetlb) and device memory stay where they are",
    errno.ENOSYS: "process_madvise(2) came with Linux 5.10",
}


def page_out(*where: Any, pid: int | None = None, advice: Literal["pageout", "cold"] = "pageout") -> int:
    """Hand cold memory to the kernel.

    `"pageout"` has it reclaimed now: anonymous pages go to swap, those of files to their file. `"cold"` only puts it
    first in line for when memory runs short. Nothing is lost either way: what is touched again comes back. Anonymous
    pages stay where they are if there is no swap.

    Args:
        *where: What is cold, each one of: an object; a pair of an object and byte ranges in it, as `Touched.ranges`
            returns them; a `Touched` of `track_accesses`, which means everything of its objects that was *not* touched;
            a pair of addresses (start, end). Of objects, pages that they share with other data are left out.
        pid: Another process, whose memory is given by pairs of addresses.
        advice: `"pageout"` or `"cold"`.

    Returns:
        Bytes that the kernel was told of, whole pages.

    Raises:
        RangeError: No such advice, or an object with `pid`, or a range that is not inside of its object.
        UntrackableError: Arrays of `userfault.open`, which have a budget of their own; or a `Touched` that does not
            know of reads.
        UffdPermissionError: This process may not advise the other.
        TargetExitedError: There is no such process.
        NoMemoryError: Something of it is not mapped.
        InvalidRequestError: The kernel does not do it with this memory (locked, or huge pages of hugetlb).

    Example:
        >>> import numpy as np
        >>> from userfault.track import page_out
        >>> big = np.ones(1 << 20)
        >>> page_out((big, [(0, 4 << 20)]), advice="cold") > 4_000_000
        True
    """
    if advice not in _ADVICE:
        raise RangeError(f"advice {advice!r} is not one of 'pageout', 'cold'")
    runs = _runs.runs_of([pair for one in where for pair in _ranges(one, pid)])
    pairs = [(low, high - low) for low, high in runs.tolist()]
    owner = os.getpid() if pid is None else pid
    done = 0
    while pairs:
        try:
            told = madvise_process(owner, pairs[:_AT_ONCE], _ADVICE[advice])
        except OSError as error:
            number = error.errno or errno.EIO
            start, length = pairs[0]
            raise error_from_errno(
                number,
                call="process_madvise",
                address=start,
                length=length,
                done=done,
                remedy=_REMEDIES.get(number, ""),
            ) from None
        done += told
        pairs = _behind(pairs, told)
    return done


def _behind(pairs: list[tuple[int, int]], told: int) -> list[tuple[int, int]]:
    """Return what is left after so many bytes; the kernel stops in the middle where it refuses."""
    for index, (start, length) in enumerate(pairs):
        if told < length:
            return [(start + told, length - told), *pairs[index + 1 :]]
        told -= length
    return []


def _ranges(where: Any, pid: int | None) -> Iterable[tuple[int, int]]:
    if isinstance(where, tuple) and len(where) == 2:
        first, second = where
        if is_address(first) and is_address(second):
            return [_addresses(operator.index(first), operator.index(second))]
        if pid is None:
            return _inside(_one(first), second)
    if pid is not None:
        raise RangeError(
            f"memory of process {pid} is given by pairs of addresses (start, end), not by {type(where).__name__}"
        )
    if isinstance(where, Touched):
        return _untouched(where)
    target = _one(where)
    return _whole_pages(target, _runs.runs_of([(target.address, target.address + target.nbytes)]))


def _addresses(start: int, end: int) -> tuple[int, int]:
    if start & PAGE_MASK or end & PAGE_MASK or not 0 <= start < end:
        raise RangeError(f"[{start:#x}, {end:#x}) are not whole pages of {PAGE_SIZE} bytes")
    return start, end


def _one(obj: Any) -> Target:
    (target,) = targets_of([obj], {})
    if target.memory is not None:
        raise UntrackableError(
            f"{target.memory.name}: paged memory is not the kernel's to swap; evict its blocks with"
            " memory_of(array).evict()"
        )
    return target


def _inside(target: Target, ranges: Any) -> Iterator[tuple[int, int]]:
    pairs = [(operator.index(start), operator.index(stop)) for start, stop in ranges]
    for start, stop in pairs:
        if not 0 <= start <= stop <= target.nbytes:
            raise RangeError(f"bytes [{start}, {stop}) are not inside of the object's {target.nbytes} bytes")
    runs = _runs.runs_of([(target.address + start, target.address + stop) for start, stop in pairs])
    return _whole_pages(target, runs)


def _untouched(touched: Touched) -> Iterator[tuple[int, int]]:
    for target in touched._targets:
        if target.memory is None:
            _, runs = touched._runs(target.name, "accessed")
            whole = _runs.runs_of([(target.address, target.address + target.nbytes)])
            yield from _whole_pages(target, _runs.subtract(whole, runs))


def _whole_pages(target: Target, runs: Runs) -> Iterator[tuple[int, int]]:
    for start, end in runs.tolist():
        low, high = (start + PAGE_MASK) & ~PAGE_MASK, end & ~PAGE_MASK
        if high > low:
            yield low, high
