"""What a memory tells of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from userfault import _engine
from userfault._sigbus import warn_if_replaced
from userfault.errors import ClosedError, TrackError
from userfault.stats import MemoryStats, from_engine

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

__all__ = ["ObservedMemory"]

_TRACE_DTYPE = [("t_ns", "u8"), ("block", "u4"), ("took_ns", "u4"), ("kind", "u1"), ("pad", "u1", 7)]
# States (`enum uf_state`) in which a block's bytes are in memory: clean, upgrading, dirty, reinstalled, restored.
_RESIDENT = bytes((2, 3, 4, 8, 9))


class ObservedMemory(_engine.Memory):
    """The part of `PagedMemory` that counts and records.

    Attributes:
        trace_lost: Events of the trace that were overwritten before `trace_read` came for them.
    """

    name: str
    trace_lost = 0
    _direct = False
    # Who has the trace, if there is one: "the program", or "a recorder", which is told before the memory goes.
    _traced_for = ""
    _when_gone: Callable[[ObservedMemory], None] | None = None

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
        """Record what happens to blocks from now on, the newest `capacity` events (24 bytes each).

        Raises:
            TrackError: A `userfault.track.Recorder` records it.
        """
        self._trace_for("the program", capacity)

    def trace_read(self) -> np.ndarray[Any, Any]:
        """Return the events since the last call, and forget them.

        Returns:
            A structured array: `t_ns` (CLOCK_MONOTONIC), `block`, `kind` (1 demand, 2 readahead, 3 prefetch,
            4 eviction, 5 poison, 6 written back, 7 first write, 8 replay), `took_ns` (of a demand, from its fault to
            the block in place, if that is known; else 0).

        Raises:
            TrackError: A `userfault.track.Recorder` records it.
        """
        self._check_trace("the program")
        return self._read_trace()

    def trace_stop(self) -> None:
        """End recording and free its buffer.

        Raises:
            TrackError: A `userfault.track.Recorder` records it.
        """
        self._check_trace("the program")
        self._end_trace()

    def _check_trace(self, who: str) -> None:
        if self._traced_for and self._traced_for != who:
            raise TrackError(
                f"{self.name}: {self._traced_for} has its trace; events go to one reader only, so end that one first"
            )

    def _trace_for(self, who: str, capacity: int) -> None:
        self._check_open()
        self._check_trace("" if who == "a recorder" else who)
        self._trace(capacity)
        self.trace_lost = 0
        self._traced_for = who

    def _read_trace(self) -> np.ndarray[Any, Any]:
        import numpy as np

        parts = []
        while True:
            part = np.zeros(1 << 16, dtype=_TRACE_DTYPE)
            n, lost = self._trace_read(part.view(np.uint8).data)
            self.trace_lost += lost
            parts.append(part[:n])
            if n < len(part):
                return np.concatenate(parts)[["t_ns", "block", "kind", "took_ns"]]

    def _end_trace(self) -> None:
        self._trace(0)
        self._traced_for = ""
