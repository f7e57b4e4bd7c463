"""Reading a trace file."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from userfault._trace._frames import FrameKind, damaged, frames_of
from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE, SAMPLE_DTYPE, Cost, Trace, TracedObject
from userfault._trace._tables import unpack_events, unpack_samples
from userfault.errors import TraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_trace"]

_OBJECT_FIELDS = {field.name for field in fields(TracedObject)}
_COST_FIELDS = {field.name for field in fields(Cost)}


def read_trace(path: str | os.PathLike[str] | IO[bytes] | bytes, *, salvage: bool = False) -> Trace:
    """Read a trace.

    A file that ends in the middle, because the program died or still writes to it, gives what was written by then; its
    `complete` is False.

    Args:
        path: The file, one open for reading, or its bytes.
        salvage: Of a damaged file, return what stands before the damage instead of raising.

    Raises:
        TraceError: It is no trace, damaged, or of a newer version.
        OSError: It cannot be read.
    """
    if isinstance(path, (str, os.PathLike)):
        name, data = str(path), Path(path).read_bytes()
    elif isinstance(path, bytes):
        name, data = "the trace", path
    else:
        name, data = getattr(path, "name", "the trace"), path.read()
    reading = _Reading(name)
    frames = frames_of(memoryview(data), name)
    while True:
        try:
            found = next(frames, None)
            if found is None:
                break
            reading.take(*found)
        except TraceError:
            if not salvage or not reading.begun:
                raise
            break
    return reading.trace()


class _Reading:
    def __init__(self, name: str) -> None:
        self.name = name
        self.begun = False
        self._objects: dict[int, TracedObject] = {}
        self._samples: list[NDArray[Any]] = []
        self._runs: list[NDArray[Any]] = []
        self._nruns = 0
        self._events: list[NDArray[Any]] = []
        self._about: dict[str, Any] = {}
        self._started_ns = 0
        self._state: dict[str, Any] = {}
        self._complete = False

    def take(self, offset: int, kind: int, payload: memoryview) -> None:
        self.begun = True
        try:
            self._take(kind, payload)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise damaged(self.name, offset, f"a frame of kind {kind} makes no sense ({error})") from None

    def _take(self, kind: int, payload: memoryview) -> None:
        if kind == FrameKind.SAMPLES:
            samples, runs = unpack_samples(payload)
            self._check_known(samples)
            samples["first"] += self._nruns
            self._samples.append(samples)
            self._runs.append(runs)
            self._nruns += len(runs)
        elif kind == FrameKind.EVENTS:
            events = unpack_events(payload)
            self._check_known(events)
            self._events.append(events)
        elif kind == FrameKind.ABOUT:
            said = json.loads(bytes(payload))
            self._started_ns = int(said.get("started_ns", self._started_ns))
            self._about.update(said["about"])
        elif kind == FrameKind.OBJECT:
            said = json.loads(bytes(payload))
            known = {key: value for key, value in said.items() if key in _OBJECT_FIELDS}
            known["shape"] = tuple(known.get("shape", ()))
            self._objects[int(said["id"])] = TracedObject(**known)
        elif kind == FrameKind.OBJECT_END:
            said = json.loads(bytes(payload))
            self._objects[said["id"]] = replace(
                self._objects[said["id"]], died_ns=said["died_ns"], latency=said.get("latency", {})
            )
        elif kind in (FrameKind.STATE, FrameKind.END):
            self._state = json.loads(bytes(payload))
            self._complete = kind == FrameKind.END

    def _check_known(self, rows: NDArray[Any]) -> None:
        for number in np.unique(rows["object"]).tolist():
            if number not in self._objects:
                raise ValueError(f"object {number} is not there")

    def trace(self) -> Trace:
        samples = _by_time(_joined(self._samples, SAMPLE_DTYPE), "stop_ns")
        events = _by_time(_joined(self._events, EVENT_DTYPE), "t_ns")
        cost = {key: value for key, value in self._state.get("cost", {}).items() if key in _COST_FIELDS}
        duration = int(self._state.get("duration_ns", 0))
        if not self._complete:
            ends = [int(table[-1]) for table in (samples["stop_ns"], events["t_ns"]) if len(table)]
            duration = max([duration, *ends])
        return Trace(
            objects=tuple(self._objects[number] for number in sorted(self._objects)),
            samples=samples,
            runs=_joined(self._runs, RUN_DTYPE),
            events=events,
            duration_ns=duration,
            started_ns=self._started_ns,
            lost=int(self._state.get("lost", 0)),
            cost=Cost(**cost),
            about=self._about,
            complete=self._complete,
        )


def _joined(parts: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _by_time(rows: NDArray[Any], column: str) -> NDArray[Any]:
    times = rows[column]
    return rows if np.all(times[:-1] <= times[1:]) else rows[np.argsort(times, kind="stable")]
