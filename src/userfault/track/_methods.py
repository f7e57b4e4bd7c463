"""The ways to track memory: which there are, which this kernel and user have, and which is taken for what."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from userfault.errors import OptionError, PrivilegeError, UntrackableError
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel.abi import Feature, PageCategory
from userfault.kernel.errors import UffdError, UffdPermissionError
from userfault.kernel.pagemap import known_categories
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.track._method_blocks import blocks_read
from userfault.track._method_drop import drop
from userfault.track._method_rwp import read_write_protection
from userfault.track._vmas import vmas

if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.track._ledger import Method
    from userfault.track._targets import Target
    from userfault.track._vmas import Vma

__all__ = ["MethodInfo", "access_method", "check_tells_reads", "methods"]


@dataclass(frozen=True)
class MethodInfo:
    """A way of tracking.

    Attributes:
        name: What results call it, and what `track_accesses(method=)` takes.
        memory: The memory that it is for.
        granularity: How finely it tells.
        reads: Whether it tells accesses at all.
        writes: Whether it tells writes.
        since: The first release of Linux that has it.
        needs: What is missing here, and how to get it; "" where it can be used.
    """

    name: str
    memory: str
    granularity: str
    reads: bool
    writes: bool
    since: str
    needs: str

    @property
    def available(self) -> bool:
        """Whether this kernel and user have it."""
        return not self.needs


def _known_features() -> Feature:
    with Userfaultfd() as uffd:
        return uffd.available_features


def _lacks(release: str, has: Callable[[Feature], bool]) -> str:
    """Say what is missing for something that came with a release of Linux."""
    try:
        if has(_known_features()):
            return ""
    except UffdError as error:
        return str(error)
    return f"Linux {release} or newer, this kernel is older or was built without it"


def _lacks_write_protection() -> str:
    return _lacks("6.7", lambda known: Feature.WP_ASYNC in known)


def _lacks_read_write_protection() -> str:
    return _lacks(
        "7.3", lambda known: Feature.RWP_ASYNC in known and PageCategory.ACCESSED in known_categories()
    )


def _lacks_stash() -> str:
    from userfault import _mirror

    lacking = _lacks("6.8", lambda known: Feature.MOVE in known)
    if lacking or not _mirror.available():
        return lacking
    return "faults of system calls, too: see docs/privileges.md"


def _lacks_blocks() -> str:
    return _lacks("5.11", lambda known: True)


@functools.cache
def _stash() -> Method:
    # Not before it is used: its extension is a library of its own.
    from userfault.track._method_stash import StashMethod

    return StashMethod()


_SMALL: Final = "page"
_EITHER: Final = "page, or huge page of hugetlb memory"
# Name: memory, granularity, reads, writes, release, and what says what is missing.
_ALL: Final[dict[str, tuple[str, str, bool, bool, str, Callable[[], str]]]] = {
    "wp-async": (
        "all that can be written",
        _EITHER,
        False,
        True,
        "6.7",
        _lacks_write_protection,
    ),
    "drop": (
        "shared: memfd, /dev/shm, mmap with MAP_SHARED, files mapped for writing, userfault.track.shared_array",
        _SMALL,
        True,
        True,
        "6.7",
        _lacks_write_protection,
    ),
    "stash": ("private anonymous: NumPy, bytearray, mmap", _SMALL, True, True, "6.8", _lacks_stash),
    "rwp-async": (
        "private anonymous, shared memory of memfd and tmpfs, hugetlb",
        _EITHER,
        True,
        False,
        "7.3",
        _lacks_read_write_protection,
    ),
    "blocks": ("paged: userfault.open, userfault.empty", "block", True, True, "5.11", _lacks_blocks),
}


def methods() -> list[MethodInfo]:
    """Return all ways of tracking, and what this kernel and user lack for each, found out by trying.

    Example:
        >>> from userfault.track import methods
        >>> [method.name for method in methods()]
        ['wp-async', 'drop', 'stash', 'rwp-async', 'blocks']
    """
    return [MethodInfo(name, *about[:-1], about[-1]()) for name, about in _ALL.items()]


def access_method(target: Target, *, forced: str | None, writes: bool) -> Method:
    """Choose how an object's accesses are tracked.

    Args:
        target: The object.
        forced: The method that the caller wants, None for the best.
        writes: Whether writes shall be told apart from reads.

    Raises:
        UntrackableError: Nothing here can do it; the message says what would be needed.
        PrivilegeError: This process may not have a userfaultfd.
    """
    if target.memory is not None:
        if forced not in (None, "blocks"):
            raise UntrackableError(
                f"{target.name}: the method {forced!r} is not for paged memory, of which the engine itself knows what"
                " is touched: leave method= out"
            )
        return blocks_read
    if forced is not None:
        return _forced(target, forced)
    wanted = [_suitable(vma, writes) for vma in vmas(target.start, target.end)]
    if not wanted:
        raise UntrackableError(f"{target.name}: its memory is not mapped any more")
    names = [name for name in wanted[0] if all(name in names for names in wanted)]
    if not names:
        raise UntrackableError(
            f"{target.name} lies in mappings of different kinds, for which no one method is: track its parts one by one"
        )
    reasons = []
    for name in names:
        needs = _ALL[name][-1]()
        if not needs and name == "rwp-async" and not read_write_protection.takes(target.start, target.end):
            needs = "memory that is anonymous, of a memfd, of tmpfs or hugetlb"
        if not needs:
            return _method(name)
        reasons.append(f"{name!r} needs {needs}")
    _check_allowed()
    raise UntrackableError(
        f"{target.name}: nothing here can track reads of such memory: {'; '.join(reasons)}. {_REMEDY}"
    )


_REMEDY: Final = "Have it in memory of userfault.track.shared_array or userfault.empty, or use track_writes"


def _suitable(vma: Vma, writes: bool) -> list[str]:
    """Return the methods for a mapping, the best first."""
    if vma.page_size != PAGE_SIZE:
        return ["rwp-async"]
    if vma.shared:
        return ["drop", "rwp-async"] if writes else ["rwp-async", "drop"]
    if vma.file:  # private: what was written exists here only, and cannot be moved
        return ["rwp-async"]
    return ["stash", "rwp-async"] if writes else ["rwp-async", "stash"]


def _method(name: str) -> Method:
    if name == "stash":
        return _stash()
    return drop if name == "drop" else read_write_protection


def check_tells_reads(name: str) -> None:
    """Refuse the name of a method that is none, or that does not tell reads.

    Raises:
        OptionError: It is.
    """
    telling = [known for known, about in _ALL.items() if about[2]]
    if name not in telling:
        raise OptionError(f"method={name!r} is no method that tells reads; there are {', '.join(telling)}")


def _forced(target: Target, name: str) -> Method:
    if name == "blocks":
        raise UntrackableError(
            f"{target.name}: the method 'blocks' is for paged memory: make the array with userfault.empty or open"
        )
    if needs := _ALL[name][-1]():
        _check_allowed()
        raise UntrackableError(f"{target.name}: the method {name!r} needs {needs}")
    return _method(name)


def _check_allowed() -> None:
    """Say so where it is only that this user may not."""
    try:
        _known_features()
    except UffdPermissionError as error:
        raise PrivilegeError(
            f"tracking accesses needs a userfaultfd: {error}", call="userfaultfd", errno=error.errno
        ) from None
