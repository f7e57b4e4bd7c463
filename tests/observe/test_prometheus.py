"""The Prometheus collector: every counter once, under names by the conventions, exact, and read on scrape only."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import pytest

import userfault
from support import run_python
from support.waiting import wait_until
from userfault.stats import Histogram, MemoryStats, _bucket_bounds

pytest.importorskip(
    "prometheus_client", reason="prometheus_client is not installed: pip install 'userfault[prometheus]'"
)

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from userfault.observe import prometheus
from userfault.observe._open_memories import open_memories

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    prometheus.Collector().register(registry)
    return registry


def scrape(registry: CollectorRegistry) -> dict[str, Metric]:
    text = generate_latest(registry).decode()
    return {metric.name: metric for metric in text_string_to_metric_families(text)}


def settled(array: object, faults: int) -> MemoryStats:
    """The counters once the last fault's latency is in them: that is counted after its thread was woken."""
    memory = userfault.memory_of(array)
    wait_until(lambda: memory.stats().latency["fault"].count == faults, "the last fault is counted")
    return memory.stats()


def test_values_are_those_of_stats(registry: CollectorRegistry) -> None:
    array = userfault.open(np.arange(100_000.0), name="a", block=4096, readahead=False)
    assert array[::1000].sum() == np.arange(0, 100_000, 1000.0).sum()
    stats = settled(array, 100)
    labels = {"memory": "a", "id": ""}
    value = registry.get_sample_value
    assert value("userfault_faults_total", labels) == stats.faults > 0
    assert value("userfault_read_bytes_total", labels) == stats.bytes_read > 0
    assert value("userfault_resident_bytes", labels) == stats.resident_bytes > 0
    assert value("userfault_size_bytes", labels) == 800_000
    demand = value("userfault_loaded_blocks_total", {**labels, "reason": "demand"})
    assert demand == stats.blocks_demand > 0
    fault = {**labels, "stage": "fault"}
    assert value("userfault_latency_seconds_count", fault) == stats.latency["fault"].count
    total = value("userfault_latency_seconds_sum", fault)
    assert total == pytest.approx(stats.latency["fault"].sum_ns / 1e9)
    assert value("userfault_pager_memories") == 1


def test_nothing_that_is_counted_is_left_out() -> None:
    """A new counter of `MemoryStats` or `PagerStats` must get a metric."""
    metrics = [*prometheus._MEMORY_COUNTERS, *prometheus._MEMORY_GAUGES]
    exported = {metric.attribute for metric in metrics} | set(prometheus._LOADS.values())
    assert exported == {field.name for field in fields(MemoryStats)} - {"errors", "latency"}
    pager = {metric.attribute for metric in (*prometheus._PAGER_COUNTERS, *prometheus._PAGER_GAUGES)}
    assert pager == {field.name for field in fields(userfault.PagerStats)}


def test_names_follow_the_conventions(registry: CollectorRegistry) -> None:
    array = userfault.open(np.arange(1000.0))
    assert array[0] == 0.0
    metrics = scrape(registry)
    assert len(metrics) > 20
    for name, metric in metrics.items():
        assert name.startswith("userfault_")
        assert metric.documentation.endswith(".")
        for sample in metric.samples:
            assert sample.name.endswith("_total") == (metric.type == "counter"), sample.name
        assert "_ns" not in name
        assert "_ms" not in name


def test_memories_of_one_name_are_different_series(registry: CollectorRegistry) -> None:
    first = userfault.open(np.arange(1000.0), name="a")
    assert registry.get_sample_value("userfault_size_bytes", {"memory": "a", "id": ""}) == 8000
    second = userfault.open(np.arange(2000.0), name="a")
    assert registry.get_sample_value("userfault_size_bytes", {"memory": "a", "id": "2"}) == 16000
    del first
    assert registry.get_sample_value("userfault_size_bytes", {"memory": "a", "id": ""}) is None
    assert registry.get_sample_value("userfault_size_bytes", {"memory": "a", "id": "2"}) == 16000
    del second
    assert scrape(registry)["userfault_size_bytes"].samples == []


def test_buckets_are_exact() -> None:
    """A latency in the engine's bucket just below a bound counts there, one in the bucket at it does not."""
    for octave in (10, 20, 35):
        for bucket in range(160):
            low, high = _bucket_bounds(bucket)
            buckets = tuple(int(n == bucket) for n in range(160))
            counts = dict(prometheus._cumulative(Histogram(1, low, buckets)))
            bound = repr(2.0**octave / 1e9)
            assert counts[bound] == (high <= 1 << octave), (octave, bucket)
            assert (low >= 1 << octave) == (counts[bound] == 0)
            assert counts["+Inf"] == 1


def test_buckets_grow_and_end_with_all(registry: CollectorRegistry) -> None:
    array = userfault.open(np.arange(100_000.0), name="a", block=4096, readahead=False)
    assert array[::1000].sum() > 0
    faults = settled(array, 100).latency["fault"].count
    samples = [
        sample
        for sample in scrape(registry)["userfault_latency_seconds"].samples
        if sample.name.endswith("_bucket") and sample.labels["stage"] == "fault"
    ]
    bounds = [float(sample.labels["le"]) for sample in samples]
    counts = [sample.value for sample in samples]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(1e-6, rel=0.05)
    assert bounds[-1] == float("inf")
    assert counts == sorted(counts)
    assert counts[-1] == faults


def test_registering_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("read")

    monkeypatch.setattr(prometheus, "open_memories", refuse)
    monkeypatch.setattr(prometheus, "current_pager", refuse)
    registry = CollectorRegistry(auto_describe=True)
    collector = prometheus.Collector()
    collector.register(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        prometheus.Collector().register(registry)
    collector.unregister(registry)
    prometheus.Collector().register(registry)


def test_the_usual_registry_and_no_memory_yet() -> None:
    code = """
        import sys
        from prometheus_client import REGISTRY, generate_latest
        from userfault.observe.prometheus import Collector
        collector = Collector()
        collector.register()
        text = generate_latest(REGISTRY).decode()
        assert "# TYPE userfault_faults_total counter" in text
        assert "userfault_pager_limit_bytes" not in text
        assert "userfault._engine" not in sys.modules
        collector.unregister()
        assert "userfault" not in generate_latest(REGISTRY).decode()
    """
    run_python(code).check()


def test_a_memory_may_close_in_between(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    array = userfault.open(np.arange(1000.0), name="a")
    assert array[0] == 0.0
    memory = userfault.memory_of(array)
    del array
    entries = open_memories()

    def closed_since() -> object:
        memory.close()
        return entries

    monkeypatch.setattr(prometheus, "open_memories", closed_since)
    assert registry.get_sample_value("userfault_faults_total", {"memory": "a", "id": ""}) == 1


def test_without_prometheus_client_one_sentence_says_what_to_install() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import userfault.observe.prometheus"
    done = run_python(code)
    assert done.returncode == 1
    assert (
        "the Prometheus collector needs prometheus_client: pip install 'userfault[prometheus]'" in done.stderr
    )
