"""Which pages are read, and which are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from userfault.kernel._address import PAGE_SIZE
from userfault.track._ledger import ledger
from userfault.track._methods import access_method, check_tells_reads
from userfault.track._tracker import Tracker
from userfault.track._vmas import vmas

if TYPE_CHECKING:
    from collections.abc import Mapping

    from userfault.track._ledger import Method
    from userfault.track._targets import Target

__all__ = ["AccessTracker", "track_accesses"]

_HUGE: Final = (
    "memory never touched before may come as a transparent huge page: then all of that counts as accessed"
)


class AccessTracker(Tracker):
    """Knows which pages of some objects are read and written; made by `track_accesses`. A context manager.

    Its questions take `kind="accessed"` (the default), `"written"` or `"read_only"`. It may be used by several threads.
    After `os.fork` it works on in the child too, for the child's own accesses from the fork on; the parent's is not
    disturbed. Trackers of the same memory may be nested and overlap, those of `track_writes` among them.
    """

    _what = "track_accesses"
    _reads = True

    def __init__(
        self, objects: tuple[Any, ...], named: Mapping[str, Any], method: str | None, writes: bool
    ) -> None:
        if method is not None:
            check_tells_reads(method)
        super().__init__(objects, named)
        self._forced = method
        # Who asks for a method that cannot tell does without.
        self._writes = writes and method != "rwp-async"

    def start(self) -> Self:
        """Begin to track. It may begin again after its end. Raises as `Tracker.start`."""
        super().start()
        areas = ledger.areas
        for number, target in enumerate(self._targets):
            names = {name for start, end, name, _ in areas if start < target.end and end > target.start}
            if "rwp-async" in names and _may_come_huge(target):
                self._opened().notes[number] += (_HUGE,)
        return self

    def _choose(self, target: Target) -> Method:
        return access_method(target, forced=self._forced, writes=self._writes)


def _may_come_huge(target: Target) -> bool:
    if target.end - target.start <= PAGE_SIZE or any(vma.file for vma in vmas(target.start, target.end)):
        return False
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as text:
            return "[never]" not in text.read()
    except OSError:  # a kernel without them
        return False


def track_accesses(
    *objects: Any, method: str | None = None, writes: bool = True, **named: Any
) -> AccessTracker:
    """Track which pages of objects are read and written, exactly, by any thread of this process and by system calls.

    How depends on the memory and on the kernel, and `method()` tells what was taken: "drop" for shared memory (a memfd,
    `/dev/shm`, `userfault.track.shared_array`), "stash" for private memory (NumPy's own), "blocks" for the arrays of
    `userfault.open` and `userfault.empty`, "rwp-async" from Linux 7.3 on where writes need not be told apart or nothing
    else is for the memory. `userfault.track.methods()` says which of them work here. The first access of each page in
    an interval takes longer, by a microsecond or so ("stash": ten).

    An object that does not begin or end at a page's border shares its outer pages with other data: `shared()` says
    which bytes that concerns.

    Args:
        *objects: The objects, called by their place: "0", "1", ...
        method: The method to use for all of them; None for the best that there is for each.
        writes: Whether writes shall be told apart from reads. Without, the cheapest method may be taken, and if it
            cannot tell, asking for writes is an `UntrackableError`.
        **named: Further objects with the names that results have for them.

    Returns:
        A tracker that was not started yet: use it with `with`, or call `start()`.

    Raises:
        UntrackableError: An object has no memory that can be tracked (on entering: nothing here can; the message says
            what would be needed).
        RangeError: No objects, or two of one name.
        OptionError: `method` is none that tells reads.

    Example:
        >>> from userfault.track import shared_array, track_accesses
        >>> table = shared_array((100, 4096), "uint8")
        >>> def used_rows():
        ...     with track_accesses(table) as w:
        ...         table[20] = table[40]
        ...     return w.slices(table, "read_only"), w.slices(table, "written")

        Where pages are of 4096 bytes, `used_rows()` is `([slice(40, 41)], [slice(20, 21)])`.
    """
    return AccessTracker(objects, named, method, writes)
