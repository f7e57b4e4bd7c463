"""Accesses by read-write protection (Linux 7.3): what it is taken for, and that it tells what the others tell."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from support.accesses import NAMED, Case, Tracked, copy, read_file_into, tracked, write_to_file
from support.kernel import HUGE, PAGE, in_child
from userfault.errors import TrackError, UntrackableError
from userfault.kernel import Mapping, pagemap
from userfault.kernel.mapping import Advice
from userfault.kernel.pagemap import PageCategory
from userfault.track import methods, track_accesses, track_writes
from userfault.track._method_rwp import ReadWriteProtection

pytestmark = pytest.mark.needs_feature("RWP", "RWP_ASYNC")
_MINE = [case for name, case in NAMED.items() if name.endswith("rwp-async")]
every_kind = pytest.mark.parametrize("case", _MINE, ids=[case.memory for case in _MINE])


def test_it_is_there() -> None:
    (found,) = (method for method in methods() if method.name == "rwp-async")
    assert found.available


@every_kind
def test_it_is_taken_where_writes_need_not_be_told(case: Case) -> None:
    with tracked(case) as it, track_accesses(it=it.array, writes=False) as w:
        assert w.method() == "rwp-async"
        it.read(1)
        it.write(2)
        it.check(w, {1}, {2})
        for kind in ("written", "read_only"):
            with pytest.raises(UntrackableError, match="'rwp-async' cannot tell reads from writes"):
                w.ranges(kind=kind)


@pytest.mark.parametrize("name", ["hugetlb-rwp-async", "private-memfd-rwp-async"])
def test_it_is_taken_where_nothing_else_is_for_the_memory(name: str) -> None:
    with tracked(NAMED[name]) as it, track_accesses(it=it.array) as w:
        assert w.method() == "rwp-async"
        assert w.granularity() == it.unit
        it.write(3)
        it.check(w, set(), {3})
        with pytest.raises(UntrackableError, match="cannot tell reads from writes"):
            w.ranges(kind="written")


def test_shared_memory_is_dropped_where_writes_are_to_be_told() -> None:
    with tracked(NAMED["memfd-rwp-async"]) as it, track_accesses(it=it.array) as w:
        assert w.method() == "drop"


def _stencil(it: Tracked) -> None:
    """Each page from its two neighbours, in a part of the array."""
    for unit in range(8, it.units - 8, 3):
        it.read(unit - 1)
        it.read(unit + 1)
        it.write(unit, unit)


def _scattered(it: Tracked) -> None:
    rng = np.random.default_rng(4)
    for unit in rng.integers(0, it.units, 20).tolist():
        it.read(unit, int(rng.integers(it.unit)))
    for unit in rng.integers(0, it.units, 6).tolist():
        it.write(unit, 5)


def _in_threads(it: Tracked) -> None:
    def run(first: int) -> None:
        for unit in range(first, it.units, 9):
            it.read(unit)
            if unit % 2:
                it.write(unit)

    threads = [threading.Thread(target=run, args=(first,)) for first in (1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _system_calls(it: Tracked) -> None:
    unit = it.unit
    write_to_file(it.array[unit : 2 * unit])
    read_file_into(it.array[4 * unit + 5 : 4 * unit + 105], bytes(100))
    copy(it.array[6 * unit : 6 * unit + 50], it.array[3 * unit : 3 * unit + 50])


@pytest.mark.parametrize("program", [_stencil, _scattered, _in_threads, _system_calls])
@pytest.mark.parametrize(
    ("name", "fallback"),
    [
        ("memfd-rwp-async", "memfd-drop"),
        ("anonymous-rwp-async", "anonymous-stash"),
        ("anonymous-rwp-async", "memfd-drop"),
    ],
)
def test_it_tells_what_the_fallback_tells(
    name: str, fallback: str, program: Callable[[Tracked], None]
) -> None:
    told = []
    for case in (NAMED[name], NAMED[fallback]):
        with tracked(case) as it, it.tracker() as w:
            intervals = []
            for _ in range(3):
                program(it)
                intervals.append(w.take().ranges("it", "accessed"))
            told.append(intervals)
    assert told[0] == told[1]
    assert told[0][0]


@contextlib.contextmanager
def _between(run: Callable[[], None]) -> Iterator[None]:
    """Have a function run once, between the next scan and the protection of what it found."""
    protect = ReadWriteProtection._protect
    todo = [run]

    def first(self: ReadWriteProtection, runs: object) -> object:
        if todo:
            todo.pop()()
        return protect(self, runs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadWriteProtection, "_protect", first)
        yield
    assert not todo


@every_kind
def test_between_a_scan_and_the_protection_nothing_is_lost(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:

        def touch() -> None:
            it.read(1)
            it.write(2)
            it.read(5)
            it.write(6)

        it.read(1)
        it.write(2)
        with _between(touch):
            it.check(w.take(), {1}, {2})
        it.check(w.take(), {5}, {6})
        it.check(w.take(), set(), set())
        w.stop()
        assert it.intact()


@every_kind
def test_a_forked_child_tells_its_own_accesses(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:
        it.read(1)

        def in_it() -> set[int]:
            it.check(w, set(), set())
            it.read(3)
            it.write(4)
            return it.units_of(w.take())

        assert in_child(in_it) == {3, 4}
        it.check(w.take(), {1}, set())
        it.read(2)
        it.check(w.take(), {2}, set())


@every_kind
def test_trackers_in_each_other(case: Case) -> None:
    with tracked(case) as it, it.tracker() as outer:
        it.read(1)
        with it.tracker() as inner:
            it.write(2)
            it.check(inner.take(), set(), {2})
            it.read(2)
            it.check(inner.take(), {2}, set())
        it.check(outer.take(), {1}, {2})
        with pytest.raises(
            TrackError, match=r"needs to know of writes, but track_accesses\(it\) tracks the same"
        ):
            track_writes(it=it.array).start()


def test_a_file_of_a_file_system_is_not_for_it() -> None:
    with tracked(NAMED["file-drop"]) as it, track_accesses(it=it.array, writes=False) as w:
        # The tests' folder may be in memory itself.
        assert w.method() in ("drop", "rwp-async")
        it.read(3)
        it.check(w, {3}, set())


def test_of_transparent_huge_pages_each_small_page_is_told_apart() -> None:
    mapping = Mapping.anonymous(2 * HUGE, align=HUGE)
    mapping.madvise(Advice.HUGEPAGE)
    array = np.frombuffer(mapping.view(), np.uint8)
    del mapping
    array[:] = 3
    if not pagemap.scan(array, mask=PageCategory.HUGE).pages:
        pytest.skip("needs transparent huge pages")
    it = Tracked(array, PAGE, "rwp-async", array.copy())
    with it.tracker() as w:
        it.read(3)
        it.write(700)
        it.check(w.take(), {3}, {700})
        it.read(4)
        it.check(w.take(), {4}, set())
    assert it.intact()


def test_fresh_memory_that_comes_huge_is_told_apart_from_the_second_interval_on() -> None:
    mapping = Mapping.anonymous(2 * HUGE, align=HUGE)
    mapping.madvise(Advice.HUGEPAGE)
    array = np.frombuffer(mapping.view(), np.uint8)
    del mapping
    it = Tracked(array, PAGE, "rwp-async", np.zeros(len(array), np.uint8))
    with it.tracker() as w:
        it.write(3)
        first = it.units_of(w.take())
        assert first in ({3}, set(range(HUGE // PAGE)))  # whole, where the kernel gave a huge page
        it.read(5)
        it.check(w.take(), {5}, set())
