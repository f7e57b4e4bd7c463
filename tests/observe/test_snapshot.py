"""What a process tells of itself, and that telling it disturbs nothing."""

from __future__ import annotations

import json
import threading

import numpy as np

import userfault
from support import run_python
from userfault import observe
from userfault.observe._open_memories import open_memories


def names() -> list[tuple[str, str]]:
    return [(entry.memory.name, entry.id) for entry in open_memories()]


def test_memories_of_one_name_have_numbers_that_stay() -> None:
    first = userfault.open(np.zeros(1000), name="a")
    assert names() == [("a", "")]
    second = userfault.open(np.zeros(1000), name="a")
    other = userfault.open(np.zeros(1000), name="b")
    assert names() == [("a", ""), ("a", "2"), ("b", "")]
    numbers = {entry.memory.address: entry.id for entry in open_memories()}
    assert numbers[userfault.memory_of(first).address] == ""
    del first
    assert names() == [("a", "2"), ("b", "")]
    third = userfault.open(np.zeros(1000), name="a")
    assert names() == [("a", ""), ("a", "2"), ("b", "")]
    numbers = {entry.memory.address: entry.id for entry in open_memories()}
    assert numbers[userfault.memory_of(third).address] == ""
    del second, third, other
    assert names() == []


def test_a_closed_memory_is_not_told_of() -> None:
    array = userfault.open(np.zeros(1000), name="a")
    memory = userfault.memory_of(array)
    del array
    memory.close()
    assert observe.snapshot()["memories"] == []


def test_the_document_is_json_and_complete() -> None:
    array = userfault.open(np.arange(100_000.0), name="a")
    assert array[-1] == 99_999.0
    document = json.loads(json.dumps(observe.snapshot()))
    (told,) = document["memories"]
    stats = userfault.memory_of(array).stats()
    plain = stats.as_dict()
    assert plain.keys() <= told.keys()
    assert told["resident_bytes"] == stats.resident_bytes > 0
    assert set(told["latency"]) == set(stats.latency)
    assert document["pager"]["memories"] == 1
    assert told["mode"] == "r"


def test_looking_makes_no_pager() -> None:
    code = """
        import sys
        from userfault import observe
        document = observe.snapshot()
        assert document["memories"] == [] and document["pager"] is None, document
        assert "userfault._engine" not in sys.modules and "numpy" not in sys.modules
    """
    run_python(code).check()


def test_memories_open_and_close_while_they_are_looked_at() -> None:
    over = threading.Event()
    failures: list[BaseException] = []
    seen = 0

    def look() -> None:
        nonlocal seen
        try:
            while not over.is_set():
                document = observe.snapshot()
                seen += len(document["memories"])
                for memory in document["memories"]:
                    assert memory["nbytes"] == 80_000
        except BaseException as error:
            failures.append(error)

    watchers = [threading.Thread(target=look) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    for _ in range(60):
        array = userfault.open(np.arange(10_000.0))
        assert array[5] == 5.0
        with_close = userfault.memory_of(array)
        del array
        with_close.close()
    over.set()
    for watcher in watchers:
        watcher.join()
    assert failures == []
    assert seen > 0
