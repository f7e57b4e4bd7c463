"""Recordings: what was touched, look by look, written down while the program runs."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from userfault._trace._file import TraceWriter, read_trace
from userfault._trace._model import Cost, Trace
from userfault.errors import ForkedError, RangeError, TrackError
from userfault.track._pacing import Pace
from userfault.track._running import facts, running
from userfault.track._sampling import Faults, Samples
from userfault.track._targets import targets_of

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Recorder", "record_to"]

What = Literal["writes", "accesses"]


class Recorder:
    """Records which pages of some objects are touched, and what paged memories load, until it is stopped.

    A thread of its own looks every so often and writes down what was touched since. Of paged memories (the arrays of
    `userfault.open`) it records every event instead: what was loaded on demand and ahead of it, evicted and written
    back. Nothing of the memory itself is touched or copied. A context manager.

    Looking costs: the thread's own time, and in the program one page fault for each page that is found touched. Where
    the thread would take more than `budget`, it looks less often; the trace has the times at which it did look, and
    says what the recording has cost.

    In a forked child nothing is recorded, and the parent's recording goes on. If the program ends with a recorder
    running, the file is closed; if it is killed, the file has what was recorded until about two seconds before.

    Args:
        objects: Arrays, tensors, buffers, paged memories; called by their place: "0", "1", ... One alone need not stand
            in a list. A dictionary has their names.
        every: Seconds from one look to the next, at least.
        to: Path of the trace file, which is replaced if it exists. None: the trace is kept in memory, as small as the
            file would be.
        what: `"writes"`, or `"accesses"` for reads too. Paged memories always tell all they do.
        budget: Share of one CPU that the recorder's thread may take.
        method: How accesses are told, one of `userfault.track.methods()`. None for the best for each object.
        **named: Further objects with their names.

    Attributes:
        path: Path of the trace file, None if it is kept in memory.

    Example:
        >>> import numpy as np
        >>> from userfault.track import Recorder
        >>> table = np.zeros((1000, 4096), np.uint8)
        >>> def recorded():
        ...     with Recorder(table=table) as recorder:
        ...         table[100:200] = 1
        ...     return recorder.trace
        >>> recorded().object("table").watched
        'writes'
    """

    def __init__(
        self,
        objects: Any = (),
        *,
        every: float = 0.1,
        to: str | os.PathLike[str] | None = None,
        what: What = "writes",
        budget: float = 0.03,
        method: str | None = None,
        **named: Any,
    ) -> None:
        if not every > 0:
            raise RangeError(
                f"every={every!r} is no interval: give the seconds from one look to the next, as 0.1"
            )
        if not 0 < budget <= 1:
            raise RangeError(f"budget={budget!r} is no share of a CPU: give one above 0 and up to 1, as 0.03")
        _check_what(what)
        self.path = None if to is None else Path(to)
        self._what, self._method = what, method
        self._first: list[tuple[str | None, Any]] = [*_pairs(objects), *named.items()]
        self._pace = Pace(every, budget)
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._state: Literal["new", "running", "ended", "forked"] = "new"
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._memory: io.BytesIO | None = None
        self._writer: TraceWriter | None = None
        self._watched: list[Samples | Faults] = []
        self._names: set[str] = set()
        self._ids = 0
        self._began_ns = self._ended_ns = 0
        self._cpu_ns = self._looks = self._traps = self._lost = 0
        self._notes: list[str] = []

    def __repr__(self) -> str:
        return f"<userfault.track.Recorder {self._state}, {self.path or 'in memory'}>"

    @property
    def running(self) -> bool:
        """Whether it records."""
        return self._state == "running"

    @property
    def interval(self) -> float:
        """Seconds from one look to the next, as the budget has it now."""
        return self._pace.interval

    @property
    def names(self) -> tuple[str, ...]:
        """The objects that are recorded now."""
        with self._lock:
            return tuple(one.thing.name for one in self._watched)

    @property
    def cost(self) -> Cost:
        """What the recording has cost so far."""
        until = self._ended_ns or time.monotonic_ns()
        return Cost(self._cpu_ns, until - self._began_ns if self._began_ns else 0, self._looks, self._traps)

    @property
    def trace(self) -> Trace:
        """What was recorded; while it runs, up to now.

        Raises:
            TrackError: It was not started.
            OSError: The file cannot be read.
        """
        if self._state == "new":
            raise TrackError(f"{self!r} has no trace: start it first")
        with self._lock:
            if self._state == "running" and self._writer is not None:
                self._writer.flush()
            source = self.path if self._memory is None else self._memory.getvalue()
        assert source is not None
        return read_trace(source)

    def start(self) -> Self:
        """Begin.

        Raises:
            TrackError: It was started before, or another tracker or recorder is in its way.
            UntrackableError: An object cannot be tracked; the message names it and what would be needed.
            PrivilegeError: This process may not use userfaultfd.
            OSError: The file cannot be written.
        """
        if self._state != "new":
            raise TrackError(f"{self!r} was started before: make another")
        memory = io.BytesIO()
        self._memory = memory if self.path is None else None
        self._began_ns = time.monotonic_ns()
        self._writer = TraceWriter(
            memory if self.path is None else self.path,
            started_ns=time.time_ns(),
            about={**facts(), "every": self._pace.every, "budget": self._pace.budget},
        )
        self._state = "running"
        try:
            for name, obj in self._first:
                self.add(obj, name)
        except BaseException:
            self._state = "ended"
            self._drop_all()
            self._writer.abandon()
            raise
        self._first = []
        running.add(self)
        self._thread = threading.Thread(target=self._run, name="userfault-recorder", daemon=True)
        self._thread.start()
        return self

    def add(self, obj: Any, name: str | None = None, *, site: str = "", what: What | None = None) -> str:
        """Record another object from now on. It is kept alive until `remove` or the end; paged memories are not.

        Args:
            obj: An array, tensor, buffer or paged memory.
            name: What it is called. None: the memory's name, or a number. To one that was there before "#2" is added,
                and so on.
            site: Where it was made, for reports.
            what: `"writes"` or `"accesses"`, if it is not the same as for the others.

        Returns:
            The name that it has in the trace.

        Raises:
            TrackError: The recorder does not run, or another tracker or recorder is in its way.
            RangeError: It is recorded already.
            UntrackableError: It cannot be tracked; the message says what would be needed.
        """
        what = self._what if what is None else _check_what(what)
        with self._lock, self._counted():
            writer = self._running_writer()
            (target,) = targets_of((), {str(self._ids) if name is None else name: obj})
            for one in self._watched:
                if one.holds(target):
                    raise RangeError(f"{target.name!r} is recorded already, as {one.thing.name!r}")
            fresh = self._fresh(
                target.name if target.memory is None or name is not None else target.memory.name
            )
            if target.name != fresh:
                (target,) = targets_of((), {fresh: obj})
            made: Samples | Faults
            if target.memory is not None:
                made = Faults(self._ids, target, fresh, site, self._began_ns)
            else:
                made = Samples(self._ids, target, what, self._method, site, self._began_ns)
            try:
                writer.add_object(made.thing)
            except BaseException:
                made.drop()
                raise
            self._ids += 1
            self._names.add(fresh)
            self._watched.append(made)
            self._notes += [
                note for note in (f"{fresh}: {text}" for text in made.notes) if note not in self._notes
            ]
            return fresh

    def remove(self, which: Any) -> None:
        """Record an object no longer, given by name or itself; what was recorded of it stays.

        Raises:
            TrackError: The recorder does not run.
            RangeError: It is not recorded.
        """
        with self._lock, self._counted():
            writer = self._running_writer()
            one = self._find(which)
            self._watched.remove(one)
            self._traps += one.end(writer, died=True)
            self._count_lost(one)

    def look(self) -> None:
        """Look now as well, for example where a part of the program ends.

        Raises:
            TrackError: The recorder does not run.
        """
        with self._lock:
            self._look()

    def stop(self) -> Trace | Path:
        """Look a last time and end. Again it only returns the same.

        Returns:
            The path of the trace file, or the trace if it is kept in memory.

        Raises:
            TrackError: It was not started, or recording failed on the way: the cause is attached, the trace has what
                was recorded until then.
            ForkedError: This is a forked child, where nothing was recorded.
        """
        if self._state == "forked":
            raise ForkedError(f"{self!r} belongs to the parent of this process: start another one here")
        if self._state == "new":
            raise TrackError(f"{self!r} has nothing to stop: start it first")
        if self._state == "running":
            self._wake.set()
            thread = self._thread
            if thread is not None and thread is not threading.current_thread():
                thread.join()
            with self._lock:
                self._finish()
        if self._failed is not None:
            raise TrackError(f"recording ended early: {self._failed}") from self._failed
        return self.trace if self.path is None else self.path

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state == "running":  # else it was stopped inside, or this is a forked child
            self.stop()

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        due = time.monotonic() + self._pace.interval
        try:
            while not self._wake.wait(max(0.0, due - time.monotonic())):
                began = time.monotonic()
                with self._lock:
                    if self._state != "running":
                        return
                    self._look()
                due = began + self._pace.interval
        except BaseException as error:  # for stop() to raise
            self._failed = error

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        began_ns = time.thread_time_ns()
        try:
            yield
        finally:
            self._cpu_ns += time.thread_time_ns() - began_ns

    def _look(self) -> None:
        writer = self._running_writer()
        began_ns = time.thread_time_ns()
        for one in self._watched:
            self._traps += one.look(writer)
        for one in [one for one in self._watched if isinstance(one, Faults) and one.ended]:
            self._watched.remove(one)
            self._count_lost(one)
        self._looks += 1
        writer.state(time.monotonic_ns() - self._began_ns, self._lost_so_far(), self.cost)
        spent_ns = time.thread_time_ns() - began_ns
        self._cpu_ns += spent_ns
        self._pace.looked(spent_ns)

    def _finish(self) -> None:
        """Look a last time and close the file, whatever goes wrong."""
        writer = self._running_writer()
        began_ns = time.thread_time_ns()
        self._state = "ended"
        running.discard(self)
        try:
            while self._watched:
                one = self._watched.pop()
                try:
                    self._traps += one.end(writer, died=False)
                    self._count_lost(one)
                except BaseException as error:
                    self._failed = self._failed or error
            self._looks += 1
            self._ended_ns = time.monotonic_ns()
            self._cpu_ns += time.thread_time_ns() - began_ns
            used = (self._ended_ns - self._began_ns) * 1e-9 / self._looks
            if self._pace.held_back:
                self._notes.append(
                    f"looked every {used:.3g} s instead of every {self._pace.every:g} s: more would have taken over"
                    f" {self._pace.budget:.1%} of a CPU"
                )
            writer.note(every_used=used, held_back=self._pace.held_back, notes=self._notes)
            writer.close(self._ended_ns - self._began_ns, self._lost, self.cost)
        except BaseException as error:
            self._failed = self._failed or error
        finally:
            writer.abandon()

    def _drop_all(self) -> None:
        while self._watched:
            self._watched.pop().drop()

    def _running_writer(self) -> TraceWriter:
        if self._state != "running" or self._writer is None:
            raise TrackError(f"{self!r} does not run: start it first, or make another")
        return self._writer

    def _fresh(self, name: str) -> str:
        number, fresh = 1, name
        while fresh in self._names:
            number += 1
            fresh = f"{name}#{number}"
        return fresh

    def _find(self, which: Any) -> Samples | Faults:
        if isinstance(which, str):
            found = [one for one in self._watched if one.thing.name == which]
        else:
            (target,) = targets_of((), {"it": which})
            found = [one for one in self._watched if one.holds(target)]
        if found:
            return found[0]
        known = ", ".join(repr(one.thing.name) for one in self._watched)
        what = repr(which) if isinstance(which, str) else f"this {type(which).__name__}"
        raise RangeError(f"{what} is not recorded; the objects are {known or 'none'}")

    def _count_lost(self, one: Samples | Faults) -> None:
        if isinstance(one, Faults):
            self._lost += one.lost

    def _lost_so_far(self) -> int:
        return self._lost + sum(one.lost for one in self._watched if isinstance(one, Faults))

    def _forked(self) -> None:
        """In a forked child: there must not be a second writer, and the thread is not here."""
        if self._state != "running":
            return
        self._state = "forked"
        self._lock = threading.RLock()
        for one in self._watched:
            one.forked()
        self._watched = []
        if self._writer is not None:
            self._writer.abandon()


def record_to(path: str | os.PathLike[str], *objects: Any, **options: Any) -> Recorder:
    """Make a recorder that writes to a file: `Recorder(objects, to=path, ...)`, not started yet."""
    return Recorder(objects, to=path, **options)


def _check_what(what: What) -> What:
    if what not in ("writes", "accesses"):
        raise RangeError(f"what={what!r} is neither 'writes' nor 'accesses'")
    return what


def _pairs(objects: Any) -> list[tuple[str | None, Any]]:
    if isinstance(objects, Mapping):
        return list(objects.items())
    if isinstance(objects, (list, tuple, set, frozenset)) or (
        isinstance(objects, Iterable) and not hasattr(objects, "__len__")
    ):
        return [(None, obj) for obj in objects]
    return [(None, objects)]
