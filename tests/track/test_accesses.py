"""What is read and written is told exactly, by every method, whoever does it."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import privileges
from support.accesses import (
    CASES,
    EMPTIED,
    NAMED,
    Case,
    copy,
    read_file_into,
    tracked,
    write_to_file,
)
from support.kernel import PAGE, in_child
from userfault.kernel import _mman
from userfault.track import AccessTracker, WriteTracker, track_accesses, track_writes

every_case = pytest.mark.parametrize("case", CASES)
every_telling = pytest.mark.parametrize("case", [case for case in CASES if "rwp" not in str(case.id)])
every_unpaged = pytest.mark.parametrize("case", [case for case in CASES if "paged" not in str(case.id)])


@every_case
@pytest.mark.parametrize(("every_read", "every_written"), [(2, 7), (3, 5), (64, 64)])
def test_every_so_many_pages(case: Case, every_read: int, every_written: int) -> None:
    with tracked(case) as it:
        read = set(range(1, it.units, every_read))
        written = set(range(0, it.units, every_written))
        with it.tracker() as w:
            assert w.ranges() == []
            for unit in sorted(read):
                it.read(unit)
            for unit in sorted(written):
                it.write(unit)
            it.check(w, read, written)
        it.check(w, read, written)
        assert w.method() == case.method
        assert w.granularity() == it.unit
        assert it.intact()


@every_case
def test_random_pages_in_intervals(case: Case) -> None:
    rng = np.random.default_rng(5)
    with tracked(case) as it, it.tracker() as w:
        for _ in range(20):
            read = set(rng.integers(0, it.units, rng.integers(0, 9)).tolist())
            written = set(rng.integers(0, it.units, rng.integers(0, 9)).tolist())
            for unit in rng.permutation(sorted(read)).astype(int).tolist():
                it.read(unit, int(rng.integers(it.unit)))
            for unit in rng.permutation(sorted(written)).astype(int).tolist():
                it.write(unit, int(rng.integers(200)), int(rng.integers(it.unit)))
            it.check(w.peek(), read, written)
            it.check(w.take(), read, written)
            it.check(w, set(), set())
        w.stop()
        assert it.intact()


@every_case
def test_first_and_last_byte_of_a_page(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:
        it.read(1, it.unit - 1)
        it.write(3, offset=0)
        it.check(w, {1}, {3})


@every_case
def test_threads(case: Case) -> None:
    with tracked(case) as it:

        def run(first: int) -> None:
            for unit in range(first, it.units, 8):
                it.read(unit)
                if unit % 3 == 0:
                    it.write(unit)

        with it.tracker() as w:
            threads = [threading.Thread(target=run, args=(first,)) for first in (0, 2, 5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        touched = {unit for unit in range(it.units) if unit % 8 in (0, 2, 5)}
        it.check(w, touched, {unit for unit in touched if unit % 3 == 0})
        assert it.intact()


@every_case
def test_system_calls(case: Case) -> None:
    lacking = privileges.kernel_faults_missing()
    if case.method == "blocks" and lacking:  # its pages are not there, so that they trap
        pytest.skip(f"needs kernel-mode page faults: {lacking}")
    with tracked(case) as it:
        unit = it.unit
        with it.tracker() as w:
            told = write_to_file(it.array[unit : 2 * unit])
            read_file_into(it.array[4 * unit + 5 : 4 * unit + 105], bytes(100))
            it.check(w, {1}, {4})
        assert told == it.expected[unit : 2 * unit].tobytes()
        it.expected[4 * unit + 5 : 4 * unit + 105] = 0
        assert it.intact()


@every_case
def test_copies_within(case: Case) -> None:
    with tracked(case) as it:
        unit = it.unit
        with it.tracker() as w:
            copy(it.array[5 * unit : 7 * unit], it.array[unit : 3 * unit])
        it.check(w, {1, 2}, {5, 6})
        it.expected[5 * unit : 7 * unit] = it.expected[unit : 3 * unit]
        assert it.intact()


@pytest.mark.parametrize("case", EMPTIED)
def test_pages_that_were_not_there_are_untouched_until_they_are_touched(case: Case) -> None:
    with tracked(case) as it:
        # A hole in the file, or nothing at all: zeros when they are touched. The private one's file was never written.
        advice = (
            _mman.Advice.DONTNEED if case.memory in ("anonymous", "private-memfd") else _mman.Advice.REMOVE
        )
        _mman.madvise(it.array.ctypes.data, len(it.array) // 2, advice)
        it.expected[: len(it.array) // 2] = 0
        with it.tracker() as w:
            assert w.ranges() == []
            it.read(3)
            it.write(7)
            it.check(w.take(), {3}, {7})
            it.write(3)
            it.check(w, set(), {3})
        assert it.intact()


@every_unpaged
def test_a_forked_child_tells_its_own_accesses(case: Case) -> None:
    with tracked(case) as it, it.tracker() as w:
        it.read(1)
        it.write(2)

        def in_it() -> set[int]:
            it.check(w, set(), set())
            it.read(5)
            it.write(6, 77)
            it.check(w, {5}, {6})
            it.read(7)
            found = w.take()
            it.check(found, {5, 7}, {6})
            assert it.intact()
            return it.units_of(found)

        assert in_child(in_it) == {5, 6, 7}
        if case.memory == "numpy" and case.method == "stash":
            # Small arrays lie in the heap: it must be whole while it is copied, since malloc looks at it in the child.
            assert it.units_of(w) >= {1, 2}
            w.take()
            it.read(1)
            it.write(2)
        it.check(w, {1}, {2})
        if case.memory not in ("anonymous", "private-memfd", "numpy"):  # what the child wrote is here
            it.expected[6 * it.unit + 90] = 77
        it.read(6, 90)
        it.check(w.take(), {1, 6}, {2})
        it.write(7)
        it.check(w.take(), set(), {7})
        w.stop()
        assert it.intact()


@every_telling
def test_trackers_in_each_other_lose_nothing_to_each_other(case: Case) -> None:
    with tracked(case) as it, it.tracker() as outer:
        it.read(1)
        it.write(2)
        with track_writes(it=it.array) as writes, it.tracker() as inner:
            it.check(inner, set(), set())
            it.read(3)
            it.write(4)
            assert it.units_of(writes.take(), "written") == {4}
            it.check(inner.take(), {3}, {4})
            it.read(4)
            it.write(3)
            assert it.units_of(writes, "written") == {3}
            it.check(inner, {4}, {3})
            assert writes.method() == case.method
        it.check(outer.take(), {1}, {2, 3, 4})
        it.read(9)
        it.check(outer, {9}, set())
        outer.stop()
        assert it.intact()


@pytest.mark.parametrize("case", [case for case in CASES if str(case.id).endswith(("drop", "stash"))])
def test_two_parts_of_one_memory(case: Case) -> None:
    with tracked(case) as it:
        unit = it.unit
        left, right = it.array[: 40 * unit], it.array[20 * unit :]
        with it.tracker(left=left) as a, it.tracker(right=right) as b:
            it.read(10)
            it.write(30)
            it.read(50)
            assert a.take().ranges("left") == [(10 * unit, 11 * unit), (30 * unit, 31 * unit)]
            it.read(31)
            assert b.ranges("right") == [(10 * unit, 12 * unit), (30 * unit, 31 * unit)]
            assert b.ranges("right", "written") == [(10 * unit, 11 * unit)]
        assert it.intact()


@pytest.mark.needs_feature("WP_ASYNC")
def test_an_object_that_shares_its_pages_says_so() -> None:
    with tracked(NAMED["memfd-drop"]) as it:
        part = it.array[PAGE + 100 : 4 * PAGE + 50]
        with track_accesses(part) as w:
            it.read(1, 10)  # of the neighbour's
            it.read(2)
            it.write(4, offset=2000)
            assert w.ranges() == [(0, 2 * PAGE - 100), (3 * PAGE - 100, 3 * PAGE - 50)]
            assert w.shared() == [(0, PAGE - 100), (3 * PAGE - 100, 3 * PAGE - 50)]
            assert w.shared(kind="written") == [(3 * PAGE - 100, 3 * PAGE - 50)]


@every_case
def test_it_can_begin_again(case: Case) -> None:
    with tracked(case) as it:
        w = it.tracker()
        for unit in (1, 5):
            with w:
                it.read(unit)
            it.check(w, {unit}, set())
        it.write(3)
        it.check(w, {5}, set())
        assert it.intact()


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "write"] * 3 + ["take", "peek", "nest", "nest writes", "end"]),
        st.integers(0, 15),
    ),
    max_size=40,
)


@every_case
@settings(deadline=None)
@given(data=st.data())
def test_it_does_what_a_model_does(case: Case, data: st.DataObject) -> None:
    """Any accesses and questions, with trackers in trackers: each knows what was touched since it looked."""
    with tracked(case, 16) as it, contextlib.ExitStack() as stack:
        model: list[tuple[AccessTracker | WriteTracker, set[int], set[int]]] = []

        def begin(tracker: AccessTracker | WriteTracker) -> None:
            stack.enter_context(tracker)
            model.append((tracker, set(), set()))

        def compare(index: int, *, take: bool) -> None:
            tracker, read, written = model[index]
            found = tracker.take() if take else tracker.peek()
            if isinstance(tracker, WriteTracker):
                assert it.units_of(found, "written") == written
            else:
                it.check(found, read, written)
            if take:
                read.clear()
                written.clear()

        begin(it.tracker())
        for step, place in data.draw(_STEPS):
            unit = place % it.units
            if step == "read":
                it.read(unit)
            elif step == "write":
                it.write(unit, place)
            elif step == "nest" and len(model) < 4:
                begin(it.tracker())
            elif step == "nest writes" and len(model) < 4 and it.tells_writes:
                begin(track_writes(it=it.array))
            elif step == "end" and len(model) > 1:
                tracker, _, _ = model.pop(place % len(model))
                tracker.stop()
            elif step in ("take", "peek"):
                compare(place % len(model), take=step == "take")
            for _, read, written in model:
                if step == "read":
                    read.add(unit)
                elif step == "write":
                    written.add(unit)
        for index in range(len(model)):
            compare(index, take=True)
        stack.close()
        assert it.intact()
