"""Which pages are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from userfault.track._method_blocks import blocks
from userfault.track._method_wp import write_protection
from userfault.track._tracker import Tracker

if TYPE_CHECKING:
    from userfault.track._ledger import Method
    from userfault.track._targets import Target

__all__ = ["WriteTracker", "track_writes"]


class WriteTracker(Tracker):
    """Knows which pages of some objects are written; made by `track_writes`. A context manager.

    It may be used by several threads. After `os.fork` it works on in the child too, for the child's own writes from the
    fork on; the parent's is not disturbed. Trackers of the same memory may be nested and overlap.
    """

    _what = "track_writes"

    def _choose(self, target: Target) -> Method:
        return blocks if target.memory is not None else write_protection


def track_writes(*objects: Any, **named: Any) -> WriteTracker:
    """Track which pages of objects are written, exactly, by any thread of this process and by system calls.

    The kernel notes the first write of each page, no handler is involved. It works on all memory of this process:
    NumPy arrays and views of any strides, `bytearray`, `mmap`, PyTorch tensors on the CPU, mapped files, the `buf` of
    `multiprocessing.shared_memory`, and the arrays of `userfault.open`, whose *blocks* the engine watches. What the
    objects' memory is must not change meanwhile: a `bytearray` cannot be resized as long as its tracker exists.

    A page that is written is reported even if the same bytes were written. An object that does not begin or end at a
    page's border shares its outer pages with other data: `shared()` says which bytes that concerns.

    Args:
        *objects: The objects, called by their place: "0", "1", ...
        **named: Further objects with the names that results have for them.

    Returns:
        A tracker that was not started yet: use it with `with`, or call `start()`.

    Raises:
        UntrackableError: An object has no memory that can be tracked (on entering: the kernel cannot).
        RangeError: No objects, or two of one name.

    Example:
        >>> import numpy as np
        >>> from userfault.track import track_writes
        >>> table = np.zeros((100, 4096), np.uint8)
        >>> def changed_rows():
        ...     with track_writes(table=table) as w:
        ...         table[40:42] = 1
        ...     return w.slices("table")

        `changed_rows()` has the rows 40 and 41, and those that share a page with them.
    """
    return WriteTracker(objects, named)
