"""The view of `userfault watch`, as the text that people see."""

from __future__ import annotations

import io
from dataclasses import fields
from typing import Any

import pytest
from rich.console import Console, RenderableType

from userfault.reports.watching import Activity, processes_table, watch_view
from userfault.stats import MemoryStats

MIB = 1 << 20
SECOND = 1_000_000_000
COUNTERS = {field.name for field in fields(MemoryStats)} - {"errors", "latency"}


def text(view: RenderableType, width: int = 80) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(view)
    return output.getvalue()


def latency(count: int, bucket: int = 80) -> dict[str, Any]:
    return {"sum_ns": 1000 * count, "buckets": [[bucket, count]] if count else []}


def memory(name: str = "t2m", **values: Any) -> dict[str, Any]:
    """A memory that did nothing, with these values."""
    counters = dict.fromkeys(COUNTERS, 0)
    stages = {stage: latency(0) for stage in ("queue", "source", "install", "fault", "write")}
    place = {"name": name, "id": "", "nbytes": 512 * MIB, "block": 65536, "mode": "r", "budget": 64 * MIB}
    return {**counters, **place, "errors": [], "latency": stages, **values}


def document(*memories: dict[str, Any], seconds: float = 0.0, **pager: int) -> dict[str, Any]:
    totals = {
        "limit": 256 * MIB,
        "resident_bytes": sum(memory["resident_bytes"] for memory in memories),
        "reserved_bytes": 0,
        "workers_alive": 0,
        "workers_lost": 0,
    }
    time_ns = 5 * SECOND + int(seconds * SECOND)
    return {"pid": 4321, "time_ns": time_ns, "pager": {**totals, **pager}, "memories": list(memories)}


def test_one_look_shows_what_was_since_the_opening() -> None:
    latencies = {**memory()["latency"], "fault": latency(10)}
    busy = memory(faults=1234, bytes_read=3 * MIB, resident_bytes=32 * MIB, latency=latencies)
    printed = text(watch_view([document(busy)], command="python train.py", width=80))
    for expected in (
        "4321  python train.py",
        "32 of 256 MiB resident",
        "t2m",
        "512 MiB",
        "32 of 64 MiB",
        "since opened",
        "1,234 faults",
        "3 MiB read",
        "0 B written",
        "fault   2.36 ms / 2.62 ms",
    ):
        assert expected in printed
    assert "a second" not in printed
    # Half of its budget, an eighth of all.
    assert printed.count("━") == 10 + 2
    assert "No memory" not in printed


def test_two_looks_show_rates_and_what_was_lately() -> None:
    slow = {**memory()["latency"], "source": latency(100, bucket=100)}
    first = memory(faults=1000, bytes_read=10 * MIB, latency=slow)
    both = {**slow, "source": {"sum_ns": 1, "buckets": [[60, 50], [100, 100]]}}
    second = memory(faults=1500, upgrades=100, bytes_read=30 * MIB, bytes_written=2 * MIB, latency=both)
    views = [document(first), document(second, seconds=2.0)]
    printed = text(watch_view(views, command="", width=80))
    assert "a second" in printed
    assert "300 faults" in printed
    assert "10 MiB read" in printed
    assert "1 MiB written" in printed
    # Only the fast ones are new.
    (line,) = (line for line in printed.splitlines() if "source" in line)
    assert "µs" in line
    assert "ms" not in line
    assert "since opened" not in printed
    wide = text(watch_view(views, command="", width=140), width=140)
    assert "since opened" in wide
    assert "1,600 faults" in wide
    assert "queue" in wide


@pytest.mark.parametrize("width", [80, 100, 110, 125, 140, 200])
@pytest.mark.parametrize("looks", [1, 2])
def test_nothing_is_cut_off_but_names(width: int, looks: int) -> None:
    widest = {stage: {"sum_ns": 1, "buckets": [[60, 98], [147, 2]]} for stage in memory()["latency"]}
    full = memory(
        name="an/array/with/a/long/path/in/its/name" * 4,
        faults=123_456_789, upgrades=1, bytes_read=1023 * MIB, bytes_written=1023 * MIB, nbytes=1023 << 30,
        resident_bytes=1023 * MIB, budget=1023 * MIB, dirty_bytes=100 * MIB, scratch_bytes=999 * MIB, latency=widest,
    )  # fmt: skip
    views = [document(memory(name=full["name"], nbytes=full["nbytes"])), document(full, seconds=1.0)]
    printed = text(watch_view(views[-looks:], command="c" * 300, width=width), width)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= width
    for expected in (
        "123 M faults",
        "1023 MiB read",
        "1023 MiB written",
        "100 MiB dirty",
        "1023 of 1023 MiB",
    ):
        assert expected in printed
    (fault,) = (line for line in lines if "fault  " in line)
    assert fault.split("fault  ")[1].strip().count(" / ") == (
        2 if width >= 120 or (looks, width) == (1, 110) else 1
    )
    # Of the name and of nothing else.
    (cut,) = (line for line in lines[3:] if "…" in line)
    assert cut.startswith("an/array/with")
    assert cut.count("…") == 1
    assert len(cut.partition("…")[0]) >= 12


def test_troubles_are_said() -> None:
    error = {"time_ns": 1, "offset": 4096, "length": 4096, "detail": "the disk is on fire", "write": False}
    later = {**error, "time_ns": 2, "detail": "the disk is full", "write": True}
    views = [
        document(
            memory("a", error_count=1, errors=[error]),
            memory("b", write_errors=2, errors=[later], dirty_bytes=4096, scratch_bytes=8192, mode="r+"),
            memory("c", poisoned_blocks=3, error_count=3),
            memory("d", retries=7, id="2"),
            workers_alive=2,
            workers_lost=1,
        )
    ]
    printed = text(watch_view(views, command="", width=120), 120)
    for expected in (
        "1 error",
        "2 errors",
        "3 bad blocks",
        "7 tried again",
        "#2 d",
        "512 MiB, r+",
        "4 KiB dirty, 8 KiB spilled",
        "2 workers, 1 lost",
        "a: read of bytes [4096, 8192) failed: the disk is on fire",
        "b: write of bytes [4096, 8192) failed: the disk is full",
    ):
        assert expected in printed
    assert printed.index("on fire") < printed.index("is full")


def test_a_busy_process_is_called_busy() -> None:
    printed = text(watch_view([document(memory())], command="", width=80, busy_seconds=7.2))
    assert "busy for 7 s" in printed
    assert "busy" not in text(watch_view([document(memory())], command="", width=80))


@pytest.mark.parametrize("height", [8, 14, 24, 50])
def test_it_fits_the_terminal(height: int) -> None:
    error = {"time_ns": 1, "offset": 0, "length": 1, "detail": "no", "write": False}
    memories = [memory(f"m{i}", resident_bytes=i * MIB, errors=[error]) for i in range(10)]
    views = [document(*memories), document(*memories, seconds=1.0)]
    view = watch_view(views, command="", width=80, height=height, busy_seconds=3.0)
    printed = text(view)
    assert len(printed.splitlines()) <= max(height, 14)
    shown = [name for name in (f"m{i}" for i in range(10)) if f"{name} " in printed.partition("failed")[0]]
    assert shown
    # The largest ones, in the order in which they are listed.
    assert shown[-1] == "m9"
    if height < 50:
        assert f"and {10 - len(shown)} smaller ones" in printed
    else:
        assert len(shown) == 10


def test_no_memory_and_no_pager() -> None:
    empty: dict[str, Any] = {"pid": 1, "time_ns": 0, "pager": None, "memories": []}
    printed = text(watch_view([empty], command="python", width=80))
    assert "No memory is open." in printed


def test_a_memory_that_was_opened_since_has_no_rate() -> None:
    views = [document(memory("old")), document(memory("old"), memory("new", faults=5), seconds=1.0)]
    printed = text(watch_view(views, command="", width=80))
    assert "– faults" in printed


def test_another_memory_in_the_same_place_starts_anew() -> None:
    activity = Activity.between(memory(faults=5), memory(faults=9), 1.0)
    assert activity.faults == 5
    assert activity.per_second(activity.faults) is None


def test_the_list_of_processes() -> None:
    printed = text(
        processes_table(
            [(12, "python a.py", document(memory(resident_bytes=MIB))), (3456, "python b.py", None)]
        )
    )
    first, second = printed.splitlines()[1:]
    assert first.split() == ["12", "1", "1", "MiB", "python", "a.py"]
    assert second.split() == ["3456", "busy", "python", "b.py"]
