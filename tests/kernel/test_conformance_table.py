"""Every unit scenario of the kernel's own has its test, on every kind of memory that it is about."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from support.kernel import KINDS
from userfault.kernel.mapping import MemoryKind

ALL = frozenset(KINDS)
ANONYMOUS = frozenset({MemoryKind.ANONYMOUS})
SHMEM = frozenset({MemoryKind.SHMEM})
SHARED = frozenset({MemoryKind.SHMEM, MemoryKind.HUGETLB})
# By number: the kernel's name, and on which memory it runs (the first two are about none).
SCENARIOS: dict[int, tuple[str, frozenset[MemoryKind]]] = {
    1: ("api-syscall", frozenset()),
    2: ("api-dev", frozenset()),
    3: ("register-ioctls", ALL),
    4: ("zeropage", ALL),
    5: ("move", ANONYMOUS),
    6: ("move-pmd", ANONYMOUS),
    7: ("move-pmd-split", ANONYMOUS),
    8: ("wp-fork", ALL),
    9: ("wp-fork-with-event", ALL),
    10: ("wp-fork-pin", ALL),
    11: ("wp-fork-pin-with-event", ALL),
    12: ("wp-unpopulated", ANONYMOUS),
    13: ("minor", SHARED),
    14: ("minor-wp", SHARED),
    15: ("minor-collapse", SHMEM),
    16: ("rwp-async", ALL),
    17: ("rwp-sync", ALL),
    18: ("rwp-pagemap", ALL),
    19: ("rwp-mprotect", ALL),
    20: ("rwp-gup", ALL),
    21: ("rwp-async-toggle", ALL),
    22: ("rwp-close", ALL),
    23: ("rwp-fork", ALL),
    24: ("rwp-fork-pin", ANONYMOUS),
    25: ("rwp-swap-cow", ANONYMOUS),
    26: ("rwp-wp-exclusive", ALL),
    27: ("sigbus", ALL),
    28: ("sigbus-wp", ALL),
    29: ("events", ALL),
    30: ("events-wp", ALL),
    31: ("poison", ALL),
    32: ("mmap-changing", SHMEM),
}


def _tests_of(path: Path) -> Iterator[FunctionType]:
    """The tests that a file defines, with their marks."""
    name = f"scenarios_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for their module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    for member, value in vars(module).items():
        if member.startswith("test_") and isinstance(value, FunctionType):
            yield value


def _marks(test: FunctionType) -> list[pytest.Mark]:
    return getattr(test, "pytestmark", [])


def _kinds(test: FunctionType) -> set[Any]:
    """Which kinds of memory a test runs on: those of its parameter `kind`, without one anonymous memory."""
    for mark in _marks(test):
        if mark.name == "parametrize" and mark.args[0] == "kind":
            return set(mark.args[1])
    return {MemoryKind.ANONYMOUS}


@pytest.fixture(scope="module")
def covered() -> dict[int, set[Any]]:
    """By number of the scenario: on which kinds of memory its tests run."""
    found: dict[int, set[Any]] = defaultdict(set)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path == Path(__file__) or "mark.scenario(" not in path.read_text():
            continue
        for test in _tests_of(path):
            for mark in _marks(test):
                if mark.name == "scenario":
                    found[mark.args[0]] |= _kinds(test)
    return found


def test_every_scenario_has_a_test(covered: dict[int, set[Any]]) -> None:
    assert sorted(SCENARIOS) == list(range(1, 33))
    missing = {number: SCENARIOS[number][0] for number in SCENARIOS if number not in covered}
    assert not missing
    assert set(covered) <= set(SCENARIOS), "a test is marked with a number that no scenario has"


def test_every_scenario_runs_on_its_memory(covered: dict[int, set[Any]]) -> None:
    missing = {
        f"{number} {name}": sorted(kinds - covered[number])
        for number, (name, kinds) in SCENARIOS.items()
        if kinds - covered[number]
    }
    assert not missing
