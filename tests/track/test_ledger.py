"""The book of what is tracked, with a method in Python: who gets to know of what, and what is begun and ended."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from support import run_python
from support.kernel import in_child
from support.tracking import PAGE, memory_of
from userfault.errors import TrackError, UntrackableError
from userfault.track import _runs
from userfault.track._ledger import Collected, Ledger, Method, Subscription
from userfault.track._targets import Target, targets_of
from userfault.track._touched import Found


class Notebook:
    """A method that is told by hand what was touched."""

    def __init__(self, name: str = "notebook", reads: bool = True, writes: bool = True) -> None:
        self.name, self.tells_reads, self.tells_writes = name, reads, writes
        self.held: set[int] = set()  # pages
        self.read: set[int] = set()
        self.wrote: set[int] = set()
        self.calls: list[str] = []
        self.failing: str | None = None

    def granularity(self, start: int) -> int:
        return PAGE

    def begin(self, runs: _runs.Runs) -> None:
        self._note("begin", runs)
        assert not self.held & _pages(runs), "begun twice"
        self.held |= _pages(runs)

    def collect(self, runs: _runs.Runs, rearm: bool) -> Collected:
        self._note("collect", runs)
        inside = _pages(runs)
        assert inside <= self.held, "collected where nothing was begun"
        read, wrote = self.read & inside, self.wrote & inside
        if rearm:
            self.read -= inside
            self.wrote -= inside
        return Collected(
            _of(read | wrote) if self.tells_reads else None,
            _of(wrote) if self.tells_writes else None,
            _runs.EMPTY,
        )

    def end(self, runs: _runs.Runs) -> None:
        self._note("end", runs)
        assert _pages(runs) <= self.held, "ended what was not begun"
        self.held -= _pages(runs)

    def forked(self, runs: _runs.Runs) -> None:
        self._note("forked", runs)
        assert _pages(runs) == self.held
        self.read.clear()
        self.wrote.clear()

    def _note(self, what: str, runs: _runs.Runs) -> None:
        self.calls.append(what)
        if self.failing == what:
            raise UntrackableError("not today")

    def write(self, array: np.ndarray, *which: int) -> None:
        self.wrote |= {array.ctypes.data // PAGE + page for page in which} & self.held

    def look(self, array: np.ndarray, *which: int) -> None:
        self.read |= {array.ctypes.data // PAGE + page for page in which} & self.held


def _pages(runs: _runs.Runs) -> set[int]:
    return {page for low, high in runs.tolist() for page in range(low // PAGE, high // PAGE)}


def _of(numbers: set[int]) -> _runs.Runs:
    return _runs.runs_of([(n * PAGE, (n + 1) * PAGE) for n in numbers])


@pytest.fixture
def memory() -> Iterator[np.ndarray]:
    with memory_of("anonymous", 16) as array:
        yield array


@pytest.fixture
def book() -> Ledger:
    return Ledger()


def subscribe(book: Ledger, method: Method, *objects: object, **options: bool | str) -> Subscription:
    return book.subscribe(targets_of(objects, {}), lambda target: method, **options)  # type: ignore[arg-type]


def wrote(found: Found, array: np.ndarray) -> list[int]:
    assert found.written is not None
    return sorted(page - array.ctypes.data // PAGE for page in _pages(found.written))


def test_what_is_touched_is_told_once(book: Ledger, memory: np.ndarray) -> None:
    method = Notebook()
    one = subscribe(book, method, memory, reads=True)
    method.write(memory, 3)
    method.look(memory, 5)
    for _ in range(2):
        (found,) = one.peek()
        assert wrote(found, memory) == [3]
    (found,) = one.take()
    assert found.accessed is not None
    assert _pages(found.accessed) == {memory.ctypes.data // PAGE + n for n in (3, 5)}
    (found,) = one.take()
    assert wrote(found, memory) == []
    one.close()
    assert method.held == set()


def test_nested_and_overlapping_subscriptions_lose_nothing_to_each_other(
    book: Ledger, memory: np.ndarray
) -> None:
    method = Notebook()
    outer = subscribe(book, method, memory[: 10 * PAGE])
    method.write(memory, 1, 6)
    inner = subscribe(book, method, memory[5 * PAGE : 14 * PAGE])
    assert wrote(inner.peek()[0], memory) == [], "what was before it is none of its"
    method.write(memory, 2, 7, 12)
    assert wrote(inner.take()[0], memory) == [7, 12]
    assert wrote(outer.peek()[0], memory) == [1, 2, 6, 7]
    method.write(memory, 7, 8)
    assert wrote(outer.take()[0], memory) == [1, 2, 6, 7, 8]
    assert wrote(inner.take()[0], memory) == [7, 8]
    outer.close()
    assert method.held == {memory.ctypes.data // PAGE + n for n in range(5, 14)}
    method.write(memory, 7, 13)
    assert wrote(inner.peek()[0], memory) == [7, 13]
    inner.close()
    assert book.areas == []
    assert method.held == set()


def test_memory_is_begun_once_and_ended_with_its_last_subscription(book: Ledger, memory: np.ndarray) -> None:
    method = Notebook()
    several = [subscribe(book, method, memory) for _ in range(3)]
    assert method.calls.count("begin") == 1
    assert [(method_name, count) for _, _, method_name, count in book.areas] == [("notebook", 3)]
    for subscription in several:
        assert "end" not in method.calls
        subscription.close()
        subscription.close()
    assert method.calls.count("end") == 1


def test_objects_of_one_subscription_may_overlap(book: Ledger, memory: np.ndarray) -> None:
    method = Notebook()
    both = subscribe(book, method, memory[: 4 * PAGE], memory[2 * PAGE : 8 * PAGE])
    method.write(memory, 3, 5)
    first, second = both.take()
    assert wrote(first, memory) == [3]
    assert wrote(second, memory) == [3, 5]
    both.close()
    assert method.held == set()


def test_a_method_that_tells_too_little_is_named_with_both_trackers(book: Ledger, memory: np.ndarray) -> None:
    few = Notebook("few", reads=False)
    first = subscribe(book, few, memory, who="track_writes(a)")
    with pytest.raises(
        TrackError, match=r"track_accesses\(b\) needs to know of reads.*track_writes\(a\).*'few'"
    ):
        subscribe(book, Notebook(), memory[PAGE:], who="track_accesses(b)", reads=True)
    assert few.held == {memory.ctypes.data // PAGE + n for n in range(16)}, "the first is not disturbed"
    first.close()


def test_who_asks_for_less_joins_a_method_that_tells_more(book: Ledger, memory: np.ndarray) -> None:
    method = Notebook()
    full = subscribe(book, method, memory, reads=True)
    writes = book.subscribe(targets_of([memory], {}), lambda target: pytest.fail("nothing to choose"))
    method.look(memory, 1)
    method.write(memory, 2)
    (found,) = writes.take()
    assert found.accessed is None
    assert wrote(found, memory) == [2]
    assert full.peek()[0].accessed is not None
    full.close()
    writes.close()


def test_all_objects_or_none(book: Ledger, memory: np.ndarray) -> None:
    good, bad = Notebook("good"), Notebook("bad")
    bad.failing = "begin"
    with memory_of("anonymous", 2) as other:
        targets = targets_of([], {"left": memory, "right": other})
        with pytest.raises(UntrackableError, match=r"^right: not today"):
            book.subscribe(targets, lambda target: good if target.name == "left" else bad)
        del targets
    assert good.held == set()
    assert book.areas == []


def test_what_one_method_told_is_kept_when_another_fails(book: Ledger, memory: np.ndarray) -> None:
    good, bad = Notebook("good"), Notebook("bad")
    with memory_of("anonymous", 2) as other:
        targets = targets_of([], {"left": memory, "right": other})
        both = book.subscribe(targets, lambda target: good if target.name == "left" else bad)
        good.write(memory, 3)
        bad.write(other, 1)
        bad.failing = "collect"
        for ask in (both.take, both.peek, both.take):
            with pytest.raises(UntrackableError, match="not today"):
                ask()
        bad.failing = None
        left, right = both.take()
        assert wrote(left, memory) == [3]
        assert wrote(right, other) == [1]
        both.close()
        del targets


def test_a_subscription_that_is_abandoned_ends_when_the_book_is_opened_next(
    book: Ledger, memory: np.ndarray
) -> None:
    method = Notebook()
    subscription = subscribe(book, method, memory)
    with book._entered():  # as if the garbage collector came in the middle of something
        subscription.abandon()
        assert method.held, "not now"
    assert book.areas == []
    assert method.held == set()


def test_a_closed_one_says_so(book: Ledger, memory: np.ndarray) -> None:
    subscription = subscribe(book, Notebook(), memory, who="track_writes(x)")
    subscription.close()
    with pytest.raises(TrackError, match=r"track_writes\(x\) has ended"):
        subscription.take()


def test_blind_places_count_as_touched(book: Ledger, memory: np.ndarray) -> None:
    class Blind(Notebook):
        def collect(self, runs: _runs.Runs, rearm: bool) -> Collected:
            return Collected(_runs.EMPTY, _runs.EMPTY, _runs.clip(runs, 0, int(runs[0, 0]) + PAGE))

    subscription = subscribe(book, Blind(), memory)
    (found,) = subscription.take()
    assert wrote(found, memory) == [0]
    assert len(found.blind) == 1
    subscription.close()


def test_threads_share_the_book(book: Ledger, memory: np.ndarray) -> None:
    method = Notebook()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(100):
                part = memory[number * PAGE : (number + 9) * PAGE]
                subscription = subscribe(book, method, part)
                subscription.take()
                subscription.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert book.areas == []
    assert method.held == set()


def _fork(book: Ledger) -> None:
    """What `os.fork` does for the book of the process."""
    book._before_fork()
    book._in_child()


def test_a_child_begins_anew(book: Ledger, memory: np.ndarray) -> None:
    method = Notebook()
    subscription = subscribe(book, method, memory)
    method.write(memory, 1)

    def child() -> tuple[list[int], list[int]]:
        _fork(book)
        before = wrote(subscription.peek()[0], memory)
        method.write(memory, 4)
        return before, wrote(subscription.take()[0], memory)

    assert in_child(child) == ([], [4])
    assert wrote(subscription.take()[0], memory) == [1]
    subscription.close()


def test_a_child_in_which_a_method_cannot_go_on_says_why(book: Ledger, memory: np.ndarray) -> None:
    method = Notebook()
    subscription = subscribe(book, method, memory)
    method.failing = "forked"

    def child() -> str:
        _fork(book)
        assert book.areas == []
        with pytest.raises(TrackError) as caught:
            subscription.take()
        subscription.close()
        return str(caught.value)

    assert "not today" in in_child(child)
    assert "end" not in method.calls
    subscription.close()


def test_a_fork_without_hooks_is_noticed() -> None:
    run_python(
        """
        import ctypes, gc, os
        import numpy as np
        from userfault.errors import ForkedError
        from userfault.track import track_writes
        from userfault.track._ledger import ledger

        a = np.zeros(1 << 20, np.uint8)
        with track_writes(a=a) as w:
            with ledger._lock:  # a thread of the parent may hold it
                pid = ctypes.PyDLL(None).fork()
            if pid == 0:
                try:
                    w.take()
                except ForkedError as error:
                    assert "track_writes(a)" in str(error), error
                else:
                    os._exit(1)
                with track_writes(a=a) as own:
                    a[5000] = 1
                    assert own.nbytes["a"] == 4096, own.nbytes
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            a[9000] = 1
            assert w.nbytes["a"] == 4096, w.nbytes
        """
    ).check()


def test_the_book_of_the_process_is_locked_while_it_forks() -> None:
    from userfault.track._ledger import ledger

    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with ledger._entered():
            inside.set()
            go_on.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(10)
    forked = threading.Event()

    def fork() -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads, from Python 3.12 on
            pid = os.fork()
        if pid == 0:
            os._exit(0 if go_on.is_set() else 1)
        forked.set()
        status.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    status: list[int] = []
    forker = threading.Thread(target=fork)
    forker.start()
    assert not forked.wait(0.05)
    go_on.set()
    holder.join()
    forker.join()
    assert status == [0]


def test_targets_are_kept_alive_no_longer_than_tracked(book: Ledger) -> None:
    import weakref

    class Buffer(np.ndarray):
        pass

    array = np.zeros(10 * PAGE, np.uint8).view(Buffer)
    reference = weakref.ref(array)
    subscription = subscribe(book, Notebook(), array)
    del array
    gc.collect()
    assert reference() is not None
    subscription.close()
    del subscription
    gc.collect()
    assert reference() is None


def test_target_is_named_in_what_the_kernel_refuses(book: Ledger, memory: np.ndarray) -> None:
    from userfault.kernel.errors import RangeBusyError

    class Busy(Notebook):
        def begin(self, runs: _runs.Runs) -> None:
            raise RangeBusyError("it is busy")

    target: Target
    (target,) = targets_of([], {"mine": memory})
    with pytest.raises(UntrackableError, match=r"^mine: it is busy"):
        book.subscribe([target], lambda target: Busy())
