"""The counters of the process for Prometheus, read from the engine when it scrapes.

```python
from prometheus_client import start_http_server
from userfault.observe.prometheus import Collector

Collector().register()
start_http_server(9000)
```

Needs `prometheus_client` (the extra `prometheus`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from userfault.errors import MissingExtraError
from userfault.observe._open_memories import current_pager, open_memories

try:
    from prometheus_client import REGISTRY
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector as _Collector
except ImportError as error:
    raise MissingExtraError.for_module(
        "prometheus_client", "prometheus", "the Prometheus collector"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import CollectorRegistry

    from userfault.observe._open_memories import OpenMemory
    from userfault.stats import Histogram, MemoryStats

__all__ = ["Collector"]


class _Metric(NamedTuple):
    """One metric of `MemoryStats` or `PagerStats`: the attribute, the name without `userfault_`, and its help."""

    attribute: str
    name: str
    help: str


_MEMORY_COUNTERS: Final = (
    _Metric("faults", "faults", "Page faults on blocks that were absent."),
    _Metric(
        "duplicate_faults", "duplicate_faults", "Page faults on blocks that were loading or there already."
    ),
    _Metric("upgrades", "write_protect_faults", "First writes to clean blocks."),
    _Metric("bytes_read", "read_bytes", "Bytes read from the source."),
    _Metric("bytes_extent", "read_extent_bytes", "Of these, bytes that came as 2 MiB extents (huge pages)."),
    _Metric("replays_dropped", "dropped_replays", "Replay plans that the program did not follow."),
    _Metric("retries", "read_retries", "Reads that failed and were tried again."),
    _Metric("error_count", "read_errors", "Reads that failed for good."),
    _Metric("evictions", "evicted_blocks", "Blocks evicted."),
    _Metric("blocks_written", "written_blocks", "Blocks written back, to the source or to scratch."),
    _Metric("bytes_written", "written_bytes", "Bytes written back, before compression."),
    _Metric("write_errors", "write_errors", "Writes that failed for good."),
    _Metric("reinstalled", "reinstalled_blocks", "Blocks that were touched while they were written back."),
)
_MEMORY_GAUGES: Final = (
    _Metric("resident_bytes", "resident_bytes", "Bytes resident now."),
    _Metric("resident_peak", "resident_peak_bytes", "The most bytes that were resident."),
    _Metric("budget", "budget_bytes", "Most bytes that may be resident."),
    _Metric("dirty_bytes", "dirty_bytes", "Bytes written to that are not yet where they belong."),
    _Metric("scratch_bytes", "scratch_bytes", "Bytes of scratch in use, after compression."),
    _Metric("poisoned_blocks", "poisoned_blocks", "Blocks whose source failed while a fault waited."),
)
# One metric, by reason: their sum is `blocks_read`.
_LOADS: Final = {how: f"blocks_{how}" for how in ("demand", "readahead", "prefetch", "replay")}
_PAGER_COUNTERS: Final = (
    _Metric("workers_started", "pager_workers_started", "Worker processes started."),
    _Metric("workers_lost", "pager_workers_lost", "Worker processes that ended unasked."),
    _Metric("requests", "pager_requests", "Requests that were given to workers."),
    _Metric("requests_reissued", "pager_requests_reissued", "Requests given again: their worker was lost."),
)
_PAGER_GAUGES: Final = (
    _Metric("limit", "pager_limit_bytes", "Bytes that all memories may keep resident together."),
    _Metric("resident_bytes", "pager_resident_bytes", "Bytes that all memories keep resident now."),
    _Metric("resident_peak", "pager_resident_peak_bytes", "The most bytes that they kept resident."),
    _Metric(
        "reserved_bytes", "pager_reserved_bytes", "Bytes of the limit that sources use for decoded chunks."
    ),
    _Metric("memories", "pager_memories", "Open memories."),
    _Metric("workers_alive", "pager_workers", "Worker processes that run."),
    _Metric("running", "pager_running", "Whether the fault thread runs."),
)
_LABELS: Final = ("memory", "id")

# The engine counts in four buckets an octave of nanoseconds (160 of them). One bound an octave, from 1 µs to 34 s, is
# exact, since it is a bound of the engine's too, and keeps the series of a memory to a bearable number.
_BUCKETS_PER_OCTAVE: Final = 4
_OCTAVES: Final = range(10, 36)


class Collector(_Collector):
    """Gives `prometheus_client` the counters of all open memories and of the pager, as they are when it asks.

    Metrics of a memory have the labels `memory`, its name, and `id`: empty, or a number where another memory of that
    name was open when it was first seen. They end when it is closed. Latencies are histograms in seconds, with the
    label `stage`. The metrics of the pager begin with the first memory.
    """

    def register(self, registry: CollectorRegistry | None = None) -> None:
        """Have `registry`, by default that of `prometheus_client`, ask this collector.

        Raises:
            ValueError: It asks another collector for these metrics already.
        """
        (REGISTRY if registry is None else registry).register(self)

    def unregister(self, registry: CollectorRegistry | None = None) -> None:
        """End that.

        Raises:
            KeyError: It was not registered there.
        """
        (REGISTRY if registry is None else registry).unregister(self)

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples, for the registry to know their names: nothing is read."""
        return [*_memory_metrics([]), *_pager_metrics(None)]

    def collect(self) -> Iterator[Metric]:
        """Read the counters."""
        # Those of a memory that is closed between these two lines are still there.
        memories = [(entry, entry.memory.stats()) for entry in open_memories()]
        yield from _memory_metrics(memories)
        if current_pager() is not None:
            from userfault.pager import pager_stats

            yield from _pager_metrics(pager_stats())


def _memory_metrics(memories: list[tuple[OpenMemory, MemoryStats]]) -> Iterator[Metric]:
    labelled = [([entry.memory.name, entry.id], entry, stats) for entry, stats in memories]
    for metric in _MEMORY_COUNTERS:
        counter = CounterMetricFamily(f"userfault_{metric.name}", metric.help, labels=_LABELS)
        for labels, _, stats in labelled:
            counter.add_metric(labels, getattr(stats, metric.attribute))
        yield counter
    for metric in _MEMORY_GAUGES:
        gauge = GaugeMetricFamily(f"userfault_{metric.name}", metric.help, labels=_LABELS)
        for labels, _, stats in labelled:
            gauge.add_metric(labels, getattr(stats, metric.attribute))
        yield gauge
    size = GaugeMetricFamily("userfault_size_bytes", "Length of the memory.", labels=_LABELS)
    loads = CounterMetricFamily(
        "userfault_loaded_blocks", "Blocks loaded, by what asked for them.", labels=[*_LABELS, "reason"]
    )
    latency = HistogramMetricFamily(
        "userfault_latency_seconds",
        "Time by stage of a fault, a read or a write.",
        labels=[*_LABELS, "stage"],
    )
    for labels, entry, stats in labelled:
        size.add_metric(labels, entry.memory.nbytes)
        for reason, attribute in _LOADS.items():
            loads.add_metric([*labels, reason], getattr(stats, attribute))
        for stage, histogram in stats.latency.items():
            latency.add_metric([*labels, stage], _cumulative(histogram), histogram.sum_ns / 1e9)
    yield from (size, loads, latency)


def _pager_metrics(stats: object | None) -> Iterator[Metric]:
    for metric in _PAGER_COUNTERS:
        value = None if stats is None else getattr(stats, metric.attribute)
        yield CounterMetricFamily(f"userfault_{metric.name}", metric.help, value=value)
    for metric in _PAGER_GAUGES:
        value = None if stats is None else getattr(stats, metric.attribute)
        yield GaugeMetricFamily(f"userfault_{metric.name}", metric.help, value=value)


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Return how many latencies stay below each bound, as pairs of the bound in seconds and the number."""
    # Counted here rather than taken from `count`: a fault may be counted between the reading of the two.
    bounds, seen, bucket = [], 0, 0
    for octave in _OCTAVES:
        end = (octave - 1) * _BUCKETS_PER_OCTAVE
        seen += sum(histogram.buckets[bucket:end])
        bucket = end
        bounds.append((repr(2.0**octave / 1e9), float(seen)))
    return [*bounds, ("+Inf", float(seen + sum(histogram.buckets[bucket:])))]
