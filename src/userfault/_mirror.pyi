"""The binding of the engine's mirror: accesses to private anonymous memory, told by moving its pages away.

Everything releases the GIL while it works. `userfault.track` is its only user, and maps `MirrorError` to
`userfault.errors`. Runs are C-contiguous arrays of (start, end) addresses, uint64.
"""

from typing import Final, Self, final

import numpy as np
from numpy.typing import NDArray

ACCESSED: Final[int]
WRITTEN: Final[int]
BLIND: Final[int]

class MirrorError(Exception):
    """A call failed.

    Attributes:
        errno: Positive error number; engine/mirror.h says what each means.
    """

    errno: int
    def __init__(self, errno: int) -> None: ...

def available() -> int:
    """Return 0, or why this kernel or user cannot: ENOSYS, EPERM."""

def begin(runs: NDArray[np.uint64]) -> None:
    """Watch runs of pages, all or nothing."""

def collect(runs: NDArray[np.uint64], rearm: bool) -> bytes:
    """Return what was touched since the last call with `rearm`: (start, end, what) as uint64, in no order."""

def end(runs: NDArray[np.uint64]) -> None:
    """Make it plain memory again."""

def stats() -> dict[str, int]:
    """Return `reads`, `writes`, `upgrades` (faults served, of each kind) and `pages` (watched); zeros if none are."""

@final
class Cold:
    """Pages of [start, end) that are evicted to a file when they are cold (Linux 7.3); engine/cold.h.

    Calls exclude each other. In a forked child it is closed: errno ECHILD.
    """

    def __new__(cls, start: int, end: int, store: int, offset: int) -> Self: ...
    def detect(self) -> None:
        """Have all pages count as cold until they are accessed."""

    def evict(self, runs: NDArray[np.uint64]) -> tuple[bytes, int]:
        """Write cold pages to the store and drop them; return (start, end) of what went as uint64, and errno or 0."""

    def stats(self) -> dict[str, int]:
        """Return pages: `out`, `evicted`, `loaded`, `kept`."""

    def close(self) -> None:
        """Bring everything back."""
