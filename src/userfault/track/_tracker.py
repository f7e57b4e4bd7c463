"""What all trackers have in common: a subscription with a beginning and an end, and the questions that are asked."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Self

from userfault.errors import TrackError
from userfault.track._ledger import Subscription, ledger
from userfault.track._limits import limits_of
from userfault.track._targets import targets_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from userfault.track._ledger import Method
    from userfault.track._targets import Target
    from userfault.track._touched import Kind, Touched

__all__ = ["Tracker"]


class Tracker:
    """A tracker of some objects, a context manager; used through its subclasses.

    While it is open, `peek` and the questions (`ranges`, `mask`, ...) tell what was touched since the interval began,
    and change nothing; `take` tells it and begins a new interval. After the end they answer for the last interval.
    """

    _what = "tracker"
    _reads = False
    _writes = True

    def __init__(self, objects: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self._targets = tuple(targets_of(objects, named))
        self._subscription: Subscription | None = None
        self._last: Touched | None = None

    def _choose(self, target: Target) -> Method:
        raise NotImplementedError

    def __repr__(self) -> str:
        state = "open" if self.open else "not started" if self._last is None else "ended"
        return f"<{type(self).__name__} of {', '.join(self.names)}, {state}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the objects."""
        return tuple(target.name for target in self._targets)

    @property
    def open(self) -> bool:
        """Whether it tracks."""
        return self._subscription is not None

    def start(self) -> Self:
        """Begin to track. It may begin again after its end.

        Raises:
            TrackError: It is open already, or another tracker of the same memory is in its way.
            UntrackableError: An object cannot be tracked; the message names it and what would be needed.
            PrivilegeError: This process may not use userfaultfd.
        """
        if self._subscription is not None:
            raise TrackError(f"{self!r} is open already: end it first, or make another")
        who = f"{self._what}({', '.join(self.names)})"
        made = ledger.subscribe(self._targets, self._choose, who=who, reads=self._reads, writes=self._writes)
        try:
            made.notes = [limits_of(target) for target in self._targets]
        except BaseException:
            made.close()
            raise
        self._subscription = made
        # A tracker that is dropped while it is open shall not go on for ever.
        self._finalizer = weakref.finalize(self, made.abandon)
        self._finalizer.atexit = False
        return self

    def stop(self) -> Touched:
        """End it, and return what was touched in the last interval.

        Raises:
            TrackError: It is not open.
        """
        subscription = self._opened()
        try:
            # Limits that came up meanwhile; before the last look, which they are about.
            subscription.notes = [
                tuple(dict.fromkeys(notes + limits_of(target)))
                for notes, target in zip(subscription.notes, self._targets, strict=True)
            ]
            self._last = subscription.touched(reset=True)
        finally:
            self._subscription = None
            self._finalizer.detach()
            subscription.close()
        return self._last

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._subscription is not None:  # else it was stopped inside
            self.stop()

    def _opened(self) -> Subscription:
        if self._subscription is None:
            raise TrackError(f"{self!r} is not open: use it with `with`, or call start()")
        return self._subscription

    def take(self) -> Touched:
        """Return what was touched in the interval, and begin a new one in the same step.

        No access is lost, whatever other threads do meanwhile: one that happens during the call is in this interval or
        in the next.

        Raises:
            TrackError: It is not open.
        """
        return self._opened().touched(reset=True)

    def peek(self) -> Touched:
        """Return what was touched in the interval so far, or in the last one if it has ended; nothing is reset.

        Raises:
            TrackError: It was never open.
        """
        if self._subscription is None and self._last is not None:
            return self._last
        return self._opened().touched(reset=False)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes touched of each object, by name: whole pages, cut at the object's ends."""
        return self.peek().nbytes

    def ranges(self, which: Any = None, kind: Kind | None = None) -> list[tuple[int, int]]:
        """Return the bytes that were touched as (start, stop), as `Touched.ranges` does."""
        return self.peek().ranges(which, kind)

    def slices(self, which: Any = None, kind: Kind | None = None) -> list[slice]:
        """Return what was touched as slices of the longest-striding axis, as `Touched.slices` does."""
        return self.peek().slices(which, kind)

    def mask(self, which: Any = None, kind: Kind | None = None) -> NDArray[np.bool_]:
        """Return one boolean for each page: whether it was touched, as `Touched.mask` does."""
        return self.peek().mask(which, kind)

    def shared(self, which: Any = None, kind: Kind | None = None) -> list[tuple[int, int]]:
        """Return the part of `ranges` that lies on pages shared with other data, as `Touched.shared` does."""
        return self.peek().shared(which, kind)

    def blind(self, which: Any = None) -> list[tuple[int, int]]:
        """Return where the method could not look, as `Touched.blind` does."""
        return self.peek().blind(which)

    def method(self, which: Any = None) -> str:
        """Return how the object is tracked."""
        return self.peek().method(which)

    def granularity(self, which: Any = None) -> int:
        """Return how many bytes are told apart."""
        return self.peek().granularity(which)

    def notes(self, which: Any = None) -> tuple[str, ...]:
        """Return what else must be known of the result, in sentences; usually nothing."""
        return self.peek().notes(which)
