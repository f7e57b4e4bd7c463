"""NumPy's large arrays as they come and go, and the variables of frames. For `userfault record` only.

NumPy asks a *handler* for the memory of arrays (NEP 49). The one here gives every array from a threshold on a mapping
of its own, so that whole pages belong to it, and remembers it; smaller ones go to NumPy's own. An array keeps the
handler that made it, so this module is never unloaded.
"""

from types import FrameType
from typing import Any, Final

PAGES_DEFAULT: Final[int]
PAGES_HUGE: Final[int]
"""Advise huge pages for arrays of 4 MiB and more, as NumPy does."""
PAGES_SMALL: Final[int]
BORN: Final[int]
DIED: Final[int]

class HandlerError(Exception):
    """This NumPy's allocator hook cannot be used; the message says why."""

def start(threshold: int, pages: int, most_dead: int) -> None:
    """Begin to give arrays of `threshold` bytes and more mappings of their own, wherever the handler is installed.

    Args:
        threshold: Bytes, a page at least.
        pages: `PAGES_DEFAULT`, `PAGES_HUGE` or `PAGES_SMALL`.
        most_dead: Bytes of arrays that died and wait for a drain; beyond, their pages are given back at once.

    Raises:
        HandlerError: NumPy cannot be asked for it.
        OSError: It has begun already (EBUSY), or the threshold is below a page (EINVAL).
    """

def stop() -> None:
    """End that. Arrays stay where they are; those that are dead are unmapped."""

def install() -> bool:
    """Have NumPy use the handler in this context: in this thread, and in contexts copied from its own.

    Returns:
        Whether it is used. False: the program has a handler of its own here, which stays.

    Raises:
        HandlerError: NumPy cannot be asked for it.
    """

def uninstall() -> None:
    """Have NumPy use its own handler in this context again, if it uses this one."""

def drain(min_age_ns: int) -> list[tuple[int, int, int, int, int, bool]]:
    """Return what happened since the last call, as (kind, address, bytes, born_ns, died_ns, dropped).

    Births come first, those of arrays that are younger than `min_age_ns` with a later call, and never if they die
    before. Deaths are told only of arrays whose birth was told; until `release` nobody gets their addresses. Times are
    CLOCK_MONOTONIC, died_ns of a birth is 0. `dropped`: its pages were given back, so what the kernel says of them is
    void.
    """

def is_young(address: int) -> bool:
    """Return whether a living array that `drain` has not told of holds this address."""

def release(address: int) -> bool:
    """Unmap an array whose death `drain` has told of. False: there is none at this address."""

def stats() -> dict[str, int]:
    """Return how many arrays there are (`live`, `live_bytes`), wait for release (`dead`, `dead_bytes`), died untold.

    The latter since the start: `brief`, `brief_bytes`, and the largest, `brief_most`. `spare_bytes` are kept for the
    next array; `failed` counts large arrays that were left to NumPy's handler for want of memory or mappings.
    """

def frame_locals(frame: FrameType) -> dict[str, Any]:
    """Return the variables of a frame, of any thread, without leaving anything behind in it.

    Empty if that is not possible: where the frame is being traced or its function calls `locals`, before Python 3.13,
    and without the GIL, where its thread may be changing it.
    """
