"""A recorder of a whole program: its objects come and go, and get names later."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from userfault.errors import TrackError
from userfault.track import Recorder
from userfault.track._sampling import Samples
from userfault.track._targets import targets_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from userfault.cli._record.frames import Variable

__all__ = ["ProgramRecorder"]


class ProgramRecorder(Recorder):
    """Asks before each look what there is to look at.

    Args:
        tick: Called before each look, in the recorder's thread. It may use all that is here.
        about: Facts on the run.
        **options: As of `Recorder`.
    """

    def __init__(
        self, tick: Callable[[ProgramRecorder], None], *, about: dict[str, Any], **options: Any
    ) -> None:
        super().__init__(**options)
        self._tick, self._facts = tick, about
        self._ended: dict[str, Samples] = {}

    def start(self) -> ProgramRecorder:
        """Begin. Raises as `Recorder.start`."""
        super().start()
        with self._lock:
            self._running_writer().note(**self._facts)
        return self

    def begin(self, obj: Any, name: str, *, site: str, born_ns: int) -> str:
        """Record an object that was born at `born_ns` (CLOCK_MONOTONIC). Returns its name, and raises, as `add`."""
        with self._lock:
            found = self.add(obj, name, site=site)
            self._say(found, born_ns=max(0, born_ns - self._began_ns))
            return found

    def resume(self, obj: Any, name: str) -> None:
        """Record an object as the next one of a name whose last object has ended.

        Raises:
            TrackError: There was none of this name, or one of another shape in memory; or as `add`.
        """
        with self._lock:
            writer = self._running_writer()
            before = self._ended.get(name)
            if before is None:
                raise TrackError(f"no object that was called {name!r} has ended")
            (target,) = targets_of((), {name: obj})
            old = before.thing
            made = Samples(old.id, target, self._what, self._method, old.site, self._began_ns)
            new = made.thing
            if (new.nbytes, new.granularity, new.lead) != (old.nbytes, old.granularity, old.lead):
                made.drop()
                raise TrackError(
                    f"{name!r} was {old.nbytes} bytes, and is {new.nbytes}, or lies otherwise in its pages"
                )
            made.thing = replace(new, born_ns=old.born_ns)
            writer.add_object(made.thing)
            self._watched.append(made)
            del self._ended[name]

    def end(self, name: str, *, died_ns: int, discard: bool) -> None:
        """Record an object no longer, which died at `died_ns` (CLOCK_MONOTONIC).

        Args:
            name: The object.
            died_ns: When it died.
            discard: There is nothing left to be seen of what was touched since the last look.

        Raises:
            RangeError: It is not recorded.
        """
        with self._lock:
            one = self._find(name)
            if not isinstance(one, Samples):
                self.remove(name)
                return
            if discard:
                self._watched.remove(one)
                one.drop()
            else:
                self.remove(name)
            self._running_writer().end_object(one.thing.id, max(0, died_ns - self._began_ns))
            self._ended[name] = one

    def rename(self, old: str, new: str, *, site: str, array: NDArray[Any] | Variable) -> None:
        """Call an object something else, because it turned out which array it is.

        Raises:
            RangeError: It is not recorded.
        """
        with self._lock:
            self._say(old, name=new, site=site, dtype=array.dtype.str, shape=array.shape)
            self._names.discard(old)
            self._names.add(new)

    def _say(self, which: str, /, **changes: Any) -> None:
        one = self._find(which)
        one.thing = replace(one.thing, **changes)
        self._running_writer().add_object(one.thing)

    def _look(self) -> None:
        before_ns, began_ns = self._cpu_ns, time.thread_time_ns()
        self._tick(self)
        self._cpu_ns = before_ns + time.thread_time_ns() - began_ns  # what is counted on the way is in it
        super()._look()
