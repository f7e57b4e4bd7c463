"""The pages of this process or another: what they are, which were written, and how they are registered.

* `scan` asks PAGEMAP_SCAN (Linux 6.7) which pages are of some categories: present, swapped, huge, and above all
  *written* since they were last write-protected, in memory that is registered with a userfaultfd with `WP_ASYNC`.
  With `protect=True` the same call protects what it reports, atomically: no write is lost or reported twice.
* `entries` reads /proc/PID/pagemap, one 64-bit number per page (any kernel).
* `vm_flags` reads /proc/PID/smaps: which mappings are registered, and how.

Ranges are addresses (with a length), or objects: a `Mapping`, a NumPy array, anything with the buffer protocol. Of an
object that begins or ends inside of a page the whole page is meant. Nothing here touches the memory, and the GIL is
released while the kernel works. The results are NumPy arrays.

Example:
    >>> import numpy as np
    >>> from userfault.kernel import Mapping, RegisterMode, Feature, Userfaultfd, pagemap
    >>> from userfault.kernel.pagemap import PageCategory
    >>> def written_pages():
    ...     with Userfaultfd(Feature.WP_ASYNC) as uffd, Mapping.anonymous(64 << 20) as memory:
    ...         uffd.register(memory, mode=RegisterMode.WP)
    ...         pagemap.write_protect(memory)  # tracking begins
    ...         memory.write(5 * 4096, b"x")
    ...         memory.write(9 * 4096, b"x")
    ...         changed = pagemap.scan(memory, mask=PageCategory.WRITTEN, protect=True)  # and goes on
    ...         return [(start - memory.address) // 4096 for start, end in changed.ranges()]

    `written_pages()` is `[5, 9]` where pages are of 4096 bytes.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Self

from userfault.kernel import abi
from userfault.kernel._address import PAGE_SIZE, check_range
from userfault.kernel._page_range import pages_of
from userfault.kernel._proc import TargetFile
from userfault.kernel._smaps import VmFlags, vm_flags
from userfault.kernel.abi import PageCategory, PagemapBit
from userfault.kernel.errors import BadAddressError, UsageError, error_from_errno

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    Regions = npt.NDArray[np.void]
    Booleans = npt.NDArray[np.bool_]

__all__ = [
    "PageCategory",
    "PagemapBit",
    "Scan",
    "Scanner",
    "VmFlags",
    "entries",
    "has",
    "known_categories",
    "present",
    "protected",
    "scan",
    "vm_flags",
    "write_protect",
]

_ENTRY: Final = 8  # bytes of one entry of pagemap
_REGION: Final = abi.PAGE_REGION.size
_VECTOR: Final = 1 << 18  # regions: those of 1 GiB in the worst case, 6 MiB
_COPIED: Final = 2048  # so few are copied, and their block used again
_NONE: Final = PageCategory(0)
# As plain numbers: arithmetic with enums costs more than a scan of a small range.
_WP_MATCHING: Final = int(abi.ScanFlag.WP_MATCHING)
_CHECK_WPASYNC: Final = int(abi.ScanFlag.CHECK_WPASYNC)
_PAGEMAP_SCAN: Final = int(abi.Request.PAGEMAP_SCAN)
_WALK_END: Final = abi.SCAN_ARGUMENT.offsets["walk_end"]
_U64: Final = struct.Struct("=Q")
# A block for the next scan; at most one. Its memory was never touched beyond `_COPIED` regions.
_spare: Final[list[tuple[Regions, int]]] = []


@functools.cache
def _region_dtype() -> np.dtype[np.void]:
    import numpy as np

    return np.dtype([("start", np.uint64), ("end", np.uint64), ("categories", np.uint64)])


def _block(regions: int) -> tuple[Regions, int]:
    """Return room for at least so many regions, and its address. What is not filled costs address space only."""
    try:
        block, address = _spare.pop()
    except IndexError:
        pass
    else:
        if len(block) >= regions:
            return block, address
    import numpy as np

    block = np.empty(max(regions, _COPIED), _region_dtype())
    return block, block.ctypes.data


def give_back(regions: Regions) -> None:
    """Let the next scan use the memory of a large result, which nobody may look at any more."""
    block = regions.base
    if block is not None and not _spare:
        _spare.append((block, block.ctypes.data))


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What a scan found.

    Attributes:
        regions: One row for each stretch of matching pages that have the same categories, in order of address: a
            structured array of shape (n,) with the fields `start`, `end` (addresses, the end is behind the last byte)
            and `categories` (the bits of `returns` that its pages have), all uint64.
        start: Address where the scan began.
        end: Address where it was to end.
        walk_end: Address where it did end. Behind it nothing was looked at, nor protected.
    """

    regions: Regions
    start: int
    end: int
    walk_end: int

    @property
    def complete(self) -> bool:
        """Whether all of the range was looked at: not with `max_pages`, nor where a huge page was cut."""
        return self.walk_end >= self.end

    @property
    def pages(self) -> int:
        """How many pages matched."""
        return _page_count(self.regions)

    def where(self, categories: PageCategory) -> Scan:
        """Return the part of the result whose pages have all of these categories."""
        import numpy as np

        wanted = np.uint64(int(categories))
        return replace(self, regions=self.regions[(self.regions["categories"] & wanted) == wanted])

    def mask(self, start: int | None = None, length: int | None = None) -> Booleans:
        """Return one boolean for each page: whether it matched.

        Args:
            start: Address of the first page; None for where the scan began.
            length: Bytes, whole pages; None for all that was to be scanned from there.

        Returns:
            An array of shape (length / page size,).

        Raises:
            UsageError: Not whole pages.
        """
        import numpy as np

        if start is None:
            start = self.start
        if length is None:
            length = self.end - start
        check_range(start, length)
        low, high = np.uint64(start), np.uint64(start + length)
        inside = self.regions[(self.regions["end"] > low) & (self.regions["start"] < high)]
        # A step up where a region begins, down where it ends; the running sum is 1 inside of regions.
        steps = np.zeros(length // PAGE_SIZE + 1, np.int8)
        page = np.uint64(PAGE_SIZE)
        steps[(np.maximum(inside["start"], low) - low) // page] += 1
        steps[(np.minimum(inside["end"], high) - low) // page] -= 1
        return np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_)

    def ranges(self) -> list[tuple[int, int]]:
        """Return the matching stretches as (start, end) addresses; neighbours of different categories are joined."""
        import numpy as np

        if not len(self.regions):
            return []
        starts, ends = self.regions["start"], self.regions["end"]
        apart = starts[1:] != ends[:-1]
        first = starts[np.concatenate(([True], apart))]
        last = ends[np.concatenate((apart, [True]))]
        return list(zip(first.tolist(), last.tolist(), strict=True))


class Scanner:
    """The pagemap of a process, kept open for repeated scans. A context manager.

    It tells of the memory that the process had when this was made: a child that is forked later inherits a scanner
    of its parent's memory. Several threads may use one.

    Args:
        pid: The process; None is this one.
        fd: In place of `pid`, an open `/proc/PID/pagemap` (that another process sent, perhaps); it is not closed.

    Raises:
        TargetExitedError: There is no such process.
        UffdPermissionError: This process may not look at it.
        NotSupportedError: /proc is not mounted.
    """

    __slots__ = ("_file",)

    def __init__(self, pid: int | None = None, *, fd: int | None = None) -> None:
        if pid is not None and fd is not None:
            raise UsageError("give pid or fd, not both")
        self._file = TargetFile("pagemap", pid, fd)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._file.closed

    def fileno(self) -> int:
        """Return the descriptor of the pagemap."""
        return self._file.fd

    def scan(
        self,
        where: Any,
        length: int | None = None,
        *,
        mask: PageCategory = _NONE,
        anyof: PageCategory = _NONE,
        inverted: PageCategory = _NONE,
        returns: PageCategory | None = None,
        max_pages: int = 0,
        max_regions: int | None = None,
        protect: bool = False,
        check_wpasync: bool = False,
    ) -> Scan:
        """Find pages by their categories; with `protect`, write-protect those found that were written.

        A page matches if, after the bits of `inverted` are turned over, it has all bits of `mask`, and at least one
        of `anyof` (if any are given). With neither, all pages of the mappings match. Holes between mappings never do.

        The kernel is asked as often as it takes. `scan(mask=WRITTEN)` is its fast path.

        Args:
            where: The range: an address, or an object.
            length: Bytes; None for all of the object.
            mask: Categories that a page must have.
            anyof: Categories of which it must have one.
            inverted: Categories that are turned over before: with `mask`, those that it must *not* have.
            returns: Categories to tell in the result; None for those of `mask` and `anyof`, or without these for
                all that the kernel knows. The more, the more regions.
            max_pages: Stop after so many matching pages; 0 for no limit. `walk_end` is where to go on.
            max_regions: Regions to ask for in one call (memory for the answer: 24 bytes each); None for what suits.
            protect: Write-protect the pages that match and are WRITTEN, in the same step; mappings that are not
                registered for WP with WP_ASYNC are passed over.
            check_wpasync: Refuse a range with such mappings, before anything is protected.

        Raises:
            UffdPermissionError: `check_wpasync`, and a mapping is not registered for WP with WP_ASYNC.
            InvalidRequestError: A category that this kernel does not know.
            NotSupportedError: No PAGEMAP_SCAN (before Linux 6.7).
            BadAddressError: Outside of the address space.
            NoMemoryError: No memory for page tables. With `protect`, take all of the range as written: what was
                protected before is not told.
            TargetExitedError: The process has exited.
            UsageError: With `protect`, or an address: not whole pages.

        See `Documentation/admin-guide/mm/pagemap.rst`, and ioctl PAGEMAP_SCAN in `fs/proc/task_mmu.c`.
        """
        start, end = pages_of(where, length, exact=protect)
        if max_pages < 0:
            raise UsageError(f"max_pages {max_pages} is negative")
        if max_regions is None:
            max_regions = min(_VECTOR, (end - start) // PAGE_SIZE)
        elif max_regions < 1:
            raise UsageError(f"max_regions {max_regions} is not positive")
        told = int(mask) | int(anyof) or known_categories() if returns is None else returns
        flags = 0
        if check_wpasync:
            flags |= _CHECK_WPASYNC
        if protect:
            flags |= _WP_MATCHING
            if check_wpasync:
                self._check_wpasync(start, end)
        masks = (int(inverted), int(mask), int(anyof), int(told))
        regions, walk_end = self._walk(start, end, flags, masks, max_pages, max_regions)
        self._file.check_alive()
        return Scan(regions, start, end, walk_end)

    def _walk(
        self,
        start: int,
        end: int,
        flags: int,
        masks: tuple[int, int, int, int],
        max_pages: int,
        max_regions: int,
    ) -> tuple[Regions, int]:
        """Ask until the end of the range or the limit is reached; return the regions and where that was."""
        full: list[Regions] = []
        block, address = _block(max(max_regions, min(_VECTOR, (end - start) // PAGE_SIZE)))
        used, found = 0, 0
        while True:
            vector, room = address + used * _REGION, min(max_regions, len(block) - used)
            limit = max_pages - found if max_pages else 0
            count, walk_end = self._call(start, end, flags, vector, room, limit, masks)
            through = walk_end >= end
            if count:
                new = block[used : used + count]
                used += count
                found += _page_count(new) if max_pages else 0
                if walk_end < new["end"][-1]:
                    # Not where it ended: the walk came to the end of the range, and two things leave such a trace.
                    # After every 512 regions the kernel empties its buffer and notes where it was, for good. Or it
                    # met a huge page that is cut, which cannot be protected, and left it out: no region is there.
                    through = True
                    if not flags & _WP_MATCHING or _has_region_at(new, walk_end):
                        walk_end = end
            if through or walk_end <= start or (max_pages and found >= max_pages):
                break
            start = walk_end
            if used == len(block):
                full.append(block)
                (block, address), used = _block(len(block)), 0
        if full:
            import numpy as np

            return np.concatenate([*full, block[:used]]), walk_end
        if used > _COPIED:
            return block[:used], walk_end  # to copy would cost half as much again as the scan
        found_regions = block[:used].copy()
        if not _spare:
            _spare.append((block, address))
        return found_regions, walk_end

    def _check_wpasync(self, start: int, end: int) -> None:
        """Ask for a refusal only: a scan that is refused halfway has protected pages and not told which.

        That no page is to be of a mapping which allows it lets the kernel pass over those without a look.
        """
        wanted = PageCategory.WPALLOWED
        self._call(start, end, _CHECK_WPASYNC, 0, 0, 0, (wanted, wanted, 0, 0))

    def _call(
        self, start: int, end: int, flags: int, vector: int, room: int, max_pages: int, masks: tuple[int, ...]
    ) -> tuple[int, int]:
        """Make one call; return the number of regions and `walk_end`."""
        fields = (abi.SCAN_ARGUMENT.size, flags, start, end, 0, vector, room, max_pages, *masks)
        argument = bytearray(abi.SCAN_ARGUMENT.pack(*fields))
        try:
            count: int = fcntl.ioctl(self._file.fd, _PAGEMAP_SCAN, argument)
        except OSError as error:
            number = error.errno or 0
            raise error_from_errno(number, call="PAGEMAP_SCAN", address=start, length=end - start) from None
        return count, _U64.unpack_from(argument, _WALK_END)[0]

    def write_protect(self, where: Any, length: int | None = None, *, check_wpasync: bool = True) -> None:
        """Write-protect every page of a range, present or not, without asking which were written: tracking begins.

        This is what UFFDIO_WRITEPROTECT does, at two thirds of the price, and for other processes as well.

        Args:
            where: The range, whole pages: an address, or an object.
            length: Bytes; None for all of the object.
            check_wpasync: Refuse a range with mappings that are not registered for WP with WP_ASYNC, before anything
                is protected. With False these are passed over.

        Raises:
            UffdPermissionError: `check_wpasync`, and there is such a mapping.
            NotSupportedError: No PAGEMAP_SCAN (before Linux 6.7).
            TargetExitedError: The process has exited.
            UsageError: Not whole pages.
        """
        start, end = pages_of(where, length, exact=True)
        flags = _WP_MATCHING
        if check_wpasync:
            self._check_wpasync(start, end)
            flags |= _CHECK_WPASYNC
        # Without a vector the kernel protects everything, and looks at nothing twice.
        self._call(start, end, flags, 0, 0, 0, (0, 0, 0, 0))
        self._file.check_alive()

    def entries(self, where: Any, length: int | None = None) -> npt.NDArray[np.uint64]:
        """Return the entries of pagemap, one for each page.

        Args:
            where: The range: an address, or an object.
            length: Bytes; None for all of the object.

        Returns:
            An array of shape (pages,). `PagemapBit` names its bits, `has` tests them. The bits below are the page
            frame number, or swap type and offset; only CAP_SYS_ADMIN sees the frame numbers.

        Raises:
            BadAddressError: Outside of the address space.
            TargetExitedError: The process has exited.
        """
        import numpy as np

        start, end = pages_of(where, length, exact=False)
        result = np.empty((end - start) // PAGE_SIZE, np.uint64)
        view, offset, done = result.data.cast("B"), start // PAGE_SIZE * _ENTRY, 0
        while done < len(view):
            try:
                count = os.preadv(self._file.fd, [view[done:]], offset + done)
            except OSError as error:
                number = error.errno or 0
                raise error_from_errno(number, call="read", path=self._file.path, remedy="") from None
            if not count:
                self._file.check_alive()
                beyond = start + done // _ENTRY * PAGE_SIZE
                raise BadAddressError(
                    f"read {self._file.path}: {beyond:#x} is outside of the address space",
                    errno=errno.EFAULT,
                    call="read",
                    address=beyond,
                )
            done += count
        return result

    def close(self) -> None:
        """Close the pagemap. Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _page_count(regions: Regions) -> int:
    return int((regions["end"] - regions["start"]).sum()) // PAGE_SIZE


def _has_region_at(regions: Regions, address: int) -> bool:
    import numpy as np

    index = int(np.searchsorted(regions["start"], np.uint64(address), side="right")) - 1
    return index >= 0 and address < int(regions["end"][index])


@functools.cache
def known_categories() -> PageCategory:
    """Return the categories that this kernel's PAGEMAP_SCAN knows, found by asking.

    Raises:
        NotSupportedError: No PAGEMAP_SCAN (before Linux 6.7).
    """
    with Scanner() as scanner:
        scanner._call(0, 0, 0, 0, 0, 0, (0, 0, 0, 0))  # of an empty range: says only whether it may be asked
        found = _NONE
        for category in PageCategory:
            try:
                scanner._call(0, 0, 0, 0, 0, 0, (0, category, 0, 0))
            except ValueError:  # EINVAL
                continue
            found |= category
    return found


def scan(
    where: Any,
    length: int | None = None,
    *,
    pid: int | None = None,
    fd: int | None = None,
    mask: PageCategory = _NONE,
    anyof: PageCategory = _NONE,
    inverted: PageCategory = _NONE,
    returns: PageCategory | None = None,
    max_pages: int = 0,
    max_regions: int | None = None,
    protect: bool = False,
    check_wpasync: bool = False,
) -> Scan:
    """Find pages of this process, or of `pid`, by their categories: see `Scanner.scan`.

    Example:
        >>> from userfault.kernel import Mapping, pagemap
        >>> def present_pages():
        ...     with Mapping.anonymous(1 << 20) as memory:
        ...         memory.write(0, bytes(20_000))
        ...         return pagemap.scan(memory, mask=pagemap.PageCategory.PRESENT).pages
    """
    with Scanner(pid, fd=fd) as scanner:
        return scanner.scan(
            where,
            length,
            mask=mask,
            anyof=anyof,
            inverted=inverted,
            returns=returns,
            max_pages=max_pages,
            max_regions=max_regions,
            protect=protect,
            check_wpasync=check_wpasync,
        )


def write_protect(
    where: Any, length: int | None = None, *, pid: int | None = None, check_wpasync: bool = True
) -> None:
    """Write-protect every page of a range for tracking: see `Scanner.write_protect`."""
    with Scanner(pid) as scanner:
        scanner.write_protect(where, length, check_wpasync=check_wpasync)


def entries(where: Any, length: int | None = None, *, pid: int | None = None) -> npt.NDArray[np.uint64]:
    """Return the entries of /proc/PID/pagemap, one uint64 for each page: see `Scanner.entries`."""
    with Scanner(pid) as scanner:
        return scanner.entries(where, length)


def has(entries: npt.NDArray[np.uint64], bits: PagemapBit) -> Booleans:
    """Return which entries have all of these bits, as an array of booleans of the same shape.

    (`entries & PagemapBit.PRESENT` alone makes NumPy 1 and 2 disagree on the type.)
    """
    import numpy as np

    wanted = np.uint64(int(bits))
    found: Booleans = (entries & wanted) == wanted
    return found


def present(where: Any, length: int | None = None, *, pid: int | None = None) -> Booleans:
    """Return which pages are in memory and mapped: an array of booleans, one for each page."""
    return has(entries(where, length, pid=pid), PagemapBit.PRESENT)


def protected(where: Any, length: int | None = None, *, pid: int | None = None) -> Booleans:
    """Return which pages a userfaultfd protects (WP or RWP), in memory, swapped out, or to be so when they come."""
    return has(entries(where, length, pid=pid), PagemapBit.UFFD_PROTECTED)
