"""What happens between a scan and the drop: nothing is lost, nothing is invented, whatever comes in between."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from support.accesses import DROPPED, Case, Tracked, tracked
from support.kernel import HUGE, PAGE
from userfault.kernel import Mapping, _mman, _syscalls, pagemap
from userfault.kernel.errors import UffdError
from userfault.kernel.mapping import Advice
from userfault.kernel.pagemap import PageCategory
from userfault.track._method_drop import Drop, drop

pytestmark = pytest.mark.needs_feature("WP_ASYNC")
every_dropped = pytest.mark.parametrize("case", DROPPED)
in_many = pytest.mark.parametrize("many", [True, False], ids=["one-call", "call-by-call"])


@contextlib.contextmanager
def _between(run: Callable[[], object]) -> Iterator[None]:
    """Have a function run once, between the next scan and its drop."""
    original = Drop._drop
    todo = [run]

    def first(self: Drop, runs: Any) -> None:
        if todo:
            todo.pop()()
        original(self, runs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drop, "_drop", first)
        yield
    assert not todo


def _all(*steps: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


@every_dropped
def test_a_page_that_was_not_reported_is_reported_next_time(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:
        it.read(1)
        with _between(_all(lambda: it.read(5), lambda: it.write(6))):
            it.check(w.take(), {1}, set())
        it.check(w.take(), {5}, {6})
        it.check(w.take(), set(), set())
        w.stop()
        assert it.intact()


@every_dropped
def test_a_read_of_a_reported_page_belongs_to_the_interval_that_ends(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:
        it.read(1)
        it.write(2)
        with _between(_all(lambda: it.read(1), lambda: it.read(2))):
            it.check(w.take(), {1}, {2})
        it.check(w.take(), set(), set())
        it.read(2)
        it.check(w.take(), {2}, set())


@every_dropped
def test_a_write_of_a_reported_page_is_reported_next_time(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:
        it.read(1)
        it.write(2)
        with _between(_all(lambda: it.write(1, 8), lambda: it.write(2, 9))):
            it.check(w.take(), {1}, {2})
        it.check(w.peek(), set(), {1, 2})
        it.read(1)
        it.check(w.peek(), set(), {1, 2})
        it.check(w.take(), set(), {1, 2})
        it.check(w.take(), set(), set())
        it.read(1)
        it.check(w.take(), {1}, set())
        w.stop()
        assert it.intact()


@every_dropped
def test_a_page_that_is_written_in_every_gap(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:
        it.write(3)
        for value in range(20):
            with _between(functools.partial(it.write, 3, value)):
                it.check(w.take(), set(), {3})
        it.check(w.take(), set(), {3})
        it.check(w.take(), set(), set())
        w.stop()
        assert it.intact()


@pytest.fixture
def huge() -> Iterator[Tracked]:
    """Shared memory that is mapped as two huge pages."""
    mapping = Mapping.memfd(2 * HUGE, align=HUGE)
    array = np.frombuffer(mapping.view(), np.uint8)
    array[:] = np.random.default_rng(1).integers(0, 200, len(array), np.uint8)
    try:
        mapping.madvise(Advice.COLLAPSE)
    except UffdError:
        pytest.skip("needs huge pages of shared memory (MADV_COLLAPSE, Linux 6.1)")
    del mapping
    assert _mapped_whole(array)
    it = Tracked(array, PAGE, "drop", array.copy())
    del array
    yield it
    it.array = np.empty(0, np.uint8)


def _mapped_whole(array: Any) -> bool:
    found = pagemap.scan(array, mask=PageCategory.HUGE, returns=PageCategory.HUGE)
    return bool(found.pages * PAGE == len(array))


def test_of_a_huge_page_each_small_page_is_told_apart(huge: Tracked) -> None:
    with huge.tracker() as w:
        huge.read(3)
        huge.write(huge.units - 1)
        huge.check(w.take(), {3}, {huge.units - 1})
        huge.read(0)
        huge.check(w.take(), {0}, set())
    assert huge.intact()


def test_a_whole_table_that_is_written_in_the_gap(huge: Tracked) -> None:
    """No mark is left of it, so the kernel gives the table back and may map a huge page at the next touch."""
    half = HUGE // PAGE
    with huge.tracker() as w:

        def write() -> None:
            for unit in range(half):
                huge.write(unit, unit % 200)

        for unit in range(half):
            huge.read(unit)
        with _between(write):
            huge.check(w.take(), set(range(half)), set())
        huge.read(7)
        everything = set(range(half))
        huge.check(w.peek(), set(), everything)
        huge.check(w.take(), set(), everything)
        huge.check(w.take(), set(), set())
        huge.read(9)
        huge.write(11)
        huge.check(w.take(), {9}, {11})
    assert huge.intact()


@in_many
def test_many_single_pages(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than one system call takes, with one long run between them."""
    units = 6000
    mapping = Mapping.memfd(units * PAGE)
    array = np.frombuffer(mapping.view(), np.uint8)
    array[:] = np.random.default_rng(1).integers(0, 200, len(array), np.uint8)
    it = Tracked(array, PAGE, "drop", array.copy())
    touched = set(range(0, units, 2)) | set(range(3000, 3600))
    with it.tracker() as w:
        monkeypatch.setattr(drop, "_many", many)
        for _ in range(2):
            array[[unit * PAGE for unit in touched]].max()
            it.write(77)
            it.check(w.take(), touched, {77})
            it.check(w.take(), set(), set())
    assert it.intact()


@pytest.mark.parametrize("failing", [0, 1, 700])
def test_a_call_for_many_that_stops_halfway_goes_on(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does nothing twice: a page that is touched after its drop must not be dropped again."""
    units = 2000
    mapping = Mapping.memfd(units * PAGE)
    array = np.frombuffer(mapping.view(), np.uint8)
    it = Tracked(array, PAGE, "drop", array.copy())
    dropped: list[int] = []
    advise = _syscalls.process_madvise

    def stops(pidfd: int, vector: int, count: int, advice: int) -> int:
        if count <= failing or dropped:
            return advise(pidfd, vector, count, advice)
        ranges = np.frombuffer((ctypes.c_uint64 * (2 * failing)).from_address(vector), np.uint64).tolist()
        dropped.append(failing)
        for address, length in zip(ranges[::2], ranges[1::2], strict=True):
            _mman.madvise(address, length, advice)
        it.read(0)  # the first that was dropped, or that is yet to be
        return sum(ranges[1::2])

    touched = set(range(0, units, 2))
    with it.tracker() as w:
        array[[unit * PAGE for unit in touched]].max()
        monkeypatch.setattr(drop, "_many", True)  # an older kernel has told us that it has no such call
        monkeypatch.setattr(_syscalls, "process_madvise", stops)
        it.check(w.take(), touched, set())
        assert dropped
        it.check(w.take(), {0} if failing else set(), set())
