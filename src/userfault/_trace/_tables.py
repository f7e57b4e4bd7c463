"""The tables of a trace as columns: samples with their runs, and events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from userfault._trace._columns import append_column, append_number, read_column, read_number
from userfault._trace._model import EVENT_DTYPE, RUN_DTYPE, SAMPLE_DTYPE

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["pack_events", "pack_samples", "unpack_events", "unpack_samples"]


def pack_samples(samples: NDArray[Any], runs: NDArray[Any]) -> bytearray:
    """Return samples, by the time of their stop, and the runs of all of them one after the other."""
    out = bytearray()
    append_number(out, len(samples))
    append_number(out, len(runs))
    base = int(samples["start_ns"][0])
    append_number(out, base)
    append_column(out, samples["object"])
    append_column(out, samples["stop_ns"])
    append_column(out, samples["start_ns"] - _previous_stops(samples["object"], samples["stop_ns"], base))
    counts = samples["runs"].astype(np.int64)
    append_column(out, counts)
    page, count = runs["page"].astype(np.int64), runs["count"].astype(np.int64)
    gaps = page.copy()
    gaps[1:] -= page[:-1] + count[:-1]
    begins = (np.cumsum(counts) - counts)[counts > 0]
    gaps[begins] = page[begins]
    append_column(out, gaps)
    append_column(out, count)
    append_column(out, runs["written"])
    return out


def unpack_samples(data: memoryview) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return samples and runs; IndexError, ValueError or OverflowError for what are none."""
    n, at = read_number(data, 0)
    m, at = read_number(data, at)
    base, at = read_number(data, at)
    if n < 0 or m < 0:
        raise ValueError(f"{n} samples with {m} runs")
    number, at = read_column(data, at, n)
    stop, at = read_column(data, at, n)
    wait, at = read_column(data, at, n)
    counts, at = read_column(data, at, n)
    gaps, at = read_column(data, at, m)
    count, at = read_column(data, at, m)
    written, at = read_column(data, at, m)
    if counts.min(initial=0) < 0 or counts.sum() != m:
        raise ValueError(f"{m} runs, where the samples have {counts.sum()}")
    samples = np.zeros(n, SAMPLE_DTYPE)
    first = np.cumsum(counts) - counts
    samples["object"], samples["stop_ns"] = number, stop
    samples["start_ns"] = wait + _previous_stops(number, stop, base)
    samples["first"], samples["runs"] = first, counts
    runs = np.zeros(m, RUN_DTYPE)
    ends = np.concatenate(([0], np.cumsum(gaps + count)))
    runs["page"] = ends[1:] - count - np.repeat(ends[first], counts)
    runs["count"], runs["written"] = count, written
    return samples, runs


def _previous_stops(number: NDArray[Any], stop: NDArray[Any], base: int) -> NDArray[np.int64]:
    """For each sample, when the one before it of the same object ended; `base` for the first of each."""
    order = np.argsort(number, kind="stable")
    previous = np.empty(len(number), np.int64)
    previous[order[1:]] = stop[order[:-1]]
    begins = np.concatenate(([True], number[order[1:]] != number[order[:-1]]))
    previous[order[begins]] = base
    return previous


_EVENT_COLUMNS = ("object", "t_ns", "took_ns", "block", "kind")


def pack_events(events: NDArray[Any]) -> bytearray:
    """Return events as columns."""
    out = bytearray()
    append_number(out, len(events))
    for name in _EVENT_COLUMNS:
        append_column(out, events[name])
    return out


def unpack_events(data: memoryview) -> NDArray[Any]:
    """Return events; IndexError, ValueError or OverflowError for what are none."""
    n, at = read_number(data, 0)
    if n < 0:
        raise ValueError(f"{n} events")
    events = np.zeros(n, EVENT_DTYPE)
    for name in _EVENT_COLUMNS:
        events[name], at = read_column(data, at, n)
    return events
