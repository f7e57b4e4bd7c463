"""Traces as files: written while the program runs, read back whole. See docs/trace-format.md."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from userfault._trace._frames import FrameKind, file_header, frame
from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE, SAMPLE_DTYPE, Cost, Trace, TracedObject
from userfault._trace._reading import read_trace
from userfault._trace._tables import pack_events, pack_samples
from userfault.errors import ClosedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TraceWriter", "read_trace", "write_trace"]

# When what was collected becomes a frame: at so many rows, or after so long. Samples in which nothing was touched can
# wait longer, because little is lost with them if the program dies.
_ROWS = 1 << 16
_WAIT_NS = 2_000_000_000
_IDLE_WAIT_NS = 60_000_000_000
# How often a file that grows says how things stand.
_STATE_NS = 30_000_000_000


class TraceWriter:
    """Writes a trace while it is recorded, in memory that does not grow with it. Not safe for several threads.

    What was given to it stands in the file two seconds later at the latest (samples in which nothing was touched:
    a minute), whatever then becomes of the program. In a forked child it writes nothing.

    Args:
        to: Path of the file, which is replaced if it exists, or a binary file that is open for writing and stays open.
        started_ns: When the trace begins, in nanoseconds since the epoch.
        about: Facts on the run, as JSON can say them.
    """

    def __init__(
        self,
        to: str | os.PathLike[str] | IO[bytes],
        *,
        started_ns: int = 0,
        about: dict[str, Any] | None = None,
    ) -> None:
        self._owner = os.getpid()
        self._closed = False
        self._owned = isinstance(to, (str, os.PathLike))
        # Unbuffered: a buffer would be written twice after a fork, and not at all after a crash.
        self._file: Any = open(to, "wb", buffering=0) if isinstance(to, (str, os.PathLike)) else to  # noqa: SIM115
        self._samples: list[tuple[int, int, int, NDArray[Any]]] = []
        self._events: list[NDArray[Any]] = []
        self._rows = 0
        self._busy = False
        self._failed: OSError | None = None
        self._oldest_ns: int | None = None
        self._said: dict[str, Any] | None = None
        self.nbytes = 0
        """Bytes written so far."""
        try:
            self._write(file_header())
            self._json(FrameKind.ABOUT, {"started_ns": started_ns, "about": about or {}})
        except BaseException:
            self._release()
            raise

    def note(self, **facts: Any) -> None:
        """Add to the facts on the run; later ones replace earlier ones of the same name."""
        self._json(FrameKind.ABOUT, {"about": facts})

    def add_object(self, thing: TracedObject) -> None:
        """Add an object. It comes before its first sample or event."""
        said = asdict(thing)
        for name in ("died_ns", "latency"):
            del said[name]
        self._json(FrameKind.OBJECT, said)
        if thing.died_ns is not None or thing.latency:
            self.end_object(thing.id, thing.died_ns, thing.latency)

    def end_object(
        self, number: int, died_ns: int | None, latency: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Say when an object went (None: it was there to the end), and the histograms of its latencies."""
        self._json(FrameKind.OBJECT_END, {"id": number, "died_ns": died_ns, "latency": latency or {}})

    def add_sample(self, number: int, start_ns: int, stop_ns: int, runs: NDArray[Any]) -> None:
        """Add what was touched of an object between two times: rows of `RUN_DTYPE`, ascending and apart."""
        self._samples.append((number, start_ns, stop_ns, runs))
        self._rows += len(runs) + 1
        self._busy = self._busy or len(runs) > 0
        self._added(stop_ns)

    def add_events(self, events: NDArray[Any]) -> None:
        """Add events of paged memories: rows of `EVENT_DTYPE`, by time."""
        if len(events):
            self._events.append(events)
            self._rows += len(events)
            self._busy = True
            self._added(int(events["t_ns"][-1]))

    def _added(self, t_ns: int) -> None:
        if self._oldest_ns is None:
            self._oldest_ns = t_ns
        wait_ns = _WAIT_NS if self._busy else _IDLE_WAIT_NS
        if self._rows >= _ROWS or t_ns - self._oldest_ns >= wait_ns:
            self.flush()

    def state(self, duration_ns: int, lost: int = 0, cost: Cost | None = None) -> None:
        """Say how things stand, for the case that the file is cut. Lost events are written down at once."""
        said = self._said
        if said is None or lost != said["lost"] or duration_ns - said["duration_ns"] >= _STATE_NS:
            self._said = _state(duration_ns, lost, cost)
            self._json(FrameKind.STATE, self._said)

    def flush(self) -> None:
        """Write what was collected."""
        samples, events = self._samples, self._events
        self._samples, self._events, self._rows, self._busy, self._oldest_ns = [], [], 0, False, None
        if samples:
            rows = np.zeros(len(samples), SAMPLE_DTYPE)
            rows["object"] = [sample[0] for sample in samples]
            rows["start_ns"] = [sample[1] for sample in samples]
            rows["stop_ns"] = [sample[2] for sample in samples]
            rows["runs"] = [len(sample[3]) for sample in samples]
            touched = [sample[3] for sample in samples if len(sample[3])]
            runs = np.concatenate(touched) if touched else np.zeros(0, RUN_DTYPE)
            self._frame(FrameKind.SAMPLES, pack_samples(rows, runs))
        if events:
            self._frame(FrameKind.EVENTS, pack_events(np.concatenate(events)))

    def close(self, duration_ns: int, lost: int = 0, cost: Cost | None = None) -> None:
        """Write the rest and say that the trace is whole. Once is enough."""
        if self._closed:
            return
        try:
            self.flush()
            self._json(FrameKind.END, _state(duration_ns, lost, cost))
        finally:
            self._release()

    def abandon(self) -> None:
        """Close the file as it is: the trace stays incomplete. Once is enough."""
        if not self._closed:
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._samples, self._events = [], []
        if self._owned:
            self._file.close()

    def _json(self, kind: FrameKind, what: dict[str, Any]) -> None:
        self._frame(kind, json.dumps(what, separators=(",", ":"), ensure_ascii=False).encode())

    def _frame(self, kind: FrameKind, payload: bytes | bytearray) -> None:
        self._write(frame(kind, payload))

    def _write(self, data: bytes) -> None:
        if self._closed:
            raise ClosedError("this trace was closed: start another recording")
        if os.getpid() != self._owner:
            return
        if self._failed is not None:  # behind half a frame nothing could be read
            raise self._failed
        rest = memoryview(data)
        try:
            while rest:
                done = self._file.write(rest)
                rest = rest[len(rest) if done is None else done :]
        except OSError as error:
            self._failed = error
            raise
        self.nbytes += len(data)


def _state(duration_ns: int, lost: int, cost: Cost | None) -> dict[str, Any]:
    return {"duration_ns": duration_ns, "lost": lost, "cost": asdict(cost or Cost())}


def write_trace(trace: Trace, to: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write a trace that is in memory to a file, which is replaced if it exists."""
    writer = TraceWriter(to, started_ns=trace.started_ns, about=trace.about)
    try:
        for thing in trace.objects:
            writer.add_object(thing)
        # In slices, because each becomes a frame.
        firsts, counts = trace.samples["first"].astype(np.int64), trace.samples["runs"].astype(np.int64)
        begin = 0
        while begin < len(trace.samples):
            within = np.cumsum(counts[begin : begin + _ROWS])
            end = begin + max(1, int(np.searchsorted(within, _ROWS, side="right")))
            rows = trace.samples[begin:end]
            index = np.repeat(
                firsts[begin:end] - np.cumsum(counts[begin:end]) + counts[begin:end], counts[begin:end]
            )
            runs = trace.runs[index + np.arange(len(index))]
            writer._frame(FrameKind.SAMPLES, pack_samples(rows, runs))
            begin = end
        for begin in range(0, len(trace.events), _ROWS):
            writer._frame(
                FrameKind.EVENTS, pack_events(trace.events[begin : begin + _ROWS].astype(EVENT_DTYPE))
            )
        if trace.complete:
            writer.close(trace.duration_ns, trace.lost, trace.cost)
        else:
            writer.state(trace.duration_ns, trace.lost, trace.cost)
    finally:
        writer.abandon()
