"""What a memory tells of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from userfault import _engine
from userfault._sigbus import warn_if_replaced
from userfault.errors import ClosedError
from userfault.stats import MemoryStats, from_engine

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ObservedMemory"]

_TRACE_DTYPE = [("t_ns", "u8"), ("block", "u4"), ("kind", "u1"), ("pad", "u1", 3)]
# States (`enum uf_state`) in which a block's bytes are in memory: clean, upgrading, dirty, reinstalled, restored.
_RESIDENT = bytes((2, 3, 4, 8, 9))


class ObservedMemory(_engine.Memory):
    """The part of `PagedMemory` that counts and records."""

    name: str
    _direct = False

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.name} is closed")
        if self._direct:
            warn_if_replaced(self.name, stacklevel=3)

    def stats(self) -> MemoryStats:
        """Return its counters; also after it was closed."""
        if self._direct and not self.closed:
            warn_if_replaced(self.name, stacklevel=2)
        return from_engine(self._stats())

    def residency(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the state of each block as uint8 (`enum uf_state`).

        In memory are 2 clean, 3 about to become dirty, 4 dirty, 8 dirty with an older write-back under way, and 9 clean
        with a write-back under way; 0 is absent, 1 loading, 5 leaving, 6 being written back (touched, it returns from
        there), 7 poisoned.
        """
        import numpy as np

        states = np.zeros(self.nblocks, dtype=np.uint8)
        self._states(0, states.data)
        return states

    def _resident(self, first: int, count: int) -> bool:
        states = bytearray(count)
        self._states(first, states)
        return not states.translate(None, _RESIDENT)

    def trace_start(self, capacity: int = 1 << 20) -> None:
        """Record what happens to blocks from now on, the newest `capacity` events (16 bytes each)."""
        self._check_open()
        self._trace(capacity)

    def trace_read(self) -> np.ndarray[Any, Any]:
        """Return the events since the last call, and forget them.

        Returns:
            A structured array: `t_ns` (CLOCK_MONOTONIC), `block`, `kind` (1 demand, 2 readahead, 3 prefetch,
            4 eviction, 5 poison, 6 written back, 7 first write).
        """
        import numpy as np

        parts = []
        while True:
            part = np.zeros(1 << 16, dtype=_TRACE_DTYPE)
            n, _ = self._trace_read(part.view(np.uint8).data)
            parts.append(part[:n])
            if n < len(part):
                return np.concatenate(parts)[["t_ns", "block", "kind"]]

    def trace_stop(self) -> None:
        """End recording and free its buffer."""
        self._trace(0)
