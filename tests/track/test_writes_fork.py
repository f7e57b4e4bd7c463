"""What a forked child knows: only what it writes itself, whatever the parent had not asked for yet."""

from __future__ import annotations

import os
import threading
import warnings

import pytest

from support.kernel import in_child
from support.tracking import PAGE, memory_of, pages, poke
from userfault.errors import TrackError
from userfault.kernel import Mapping
from userfault.kernel.mapping import Advice
from userfault.track import track_writes
from userfault.track._ledger import ledger

pytestmark = pytest.mark.needs_feature("WP_ASYNC")


def test_what_another_tracker_took_before_the_fork_is_the_parents() -> None:
    with memory_of("anonymous", 8) as array, track_writes(array) as outer, track_writes(array) as inner:
        poke(array, 3 * PAGE)
        inner.take()  # so it waits in the book for the outer one

        def child() -> tuple[list[int], list[int]]:
            before = outer.peek()
            poke(array, 5 * PAGE)
            taken = inner.take()
            assert min(taken.start_ns, before.start_ns) > started
            return pages(before.ranges()), pages(outer.take().ranges())

        started = inner.peek().start_ns
        assert in_child(child) == ([], [5])
        assert pages(outer.take().ranges()) == [3]


def test_a_child_ends_its_trackers_alone() -> None:
    with memory_of("anonymous", 8) as array, track_writes(array) as w:

        def child() -> bool:
            poke(array, 1 * PAGE)
            assert pages(w.stop().ranges()) == [1]
            return ledger.areas == []

        assert in_child(child)
        poke(array, 2 * PAGE)
        assert pages(w.ranges()) == [2]


def test_memory_that_a_child_does_not_inherit() -> None:
    memory = Mapping.anonymous(4 * PAGE)
    memory.madvise(Advice.DONTFORK)
    with memory_of("anonymous", 4) as array, track_writes(gone=memory) as w:

        def child() -> str:
            with pytest.raises(TrackError) as caught:
                w.take()
            with track_writes(array) as own:  # what it has is tracked all the same
                poke(array, PAGE)
            assert pages(own.ranges()) == [1]
            return str(caught.value)

        assert "forked child" in in_child(child)
        memory.write(PAGE, b"x")
        assert w.ranges() == [(PAGE, 2 * PAGE)]


def test_forks_while_threads_take() -> None:
    """A fork never finds the book half changed."""
    with memory_of("anonymous", 32) as array, track_writes(array) as w:
        stop = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not stop.is_set():
                    with track_writes(array[4 * PAGE : 9 * PAGE]) as inner:
                        inner.take()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for page in range(20):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # threads, from Python 3.12 on
                    pid = os.fork()
                if pid == 0:
                    status = 1
                    try:
                        poke(array, page * PAGE)
                        status = 0 if pages(w.take().ranges()) == [page] else 2
                    finally:
                        os._exit(status)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert w.ranges() == []
