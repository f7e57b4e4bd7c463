"""Nothing is lost while threads write and others take: with the same rigour as a transactional memory's tests."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from support.soak import rounds
from support.tracking import PAGE, memory_of, poke
from userfault.track import track_writes
from userfault.track._writes import WriteTracker

pytestmark = pytest.mark.needs_feature("WP_ASYNC")

COUNT = 96  # pages
WRITERS = 6


class Watcher:
    """Takes in rounds, and checks that each change is reported in the round in which it happened, or the next.

    It looks at a stamp in each page just before each take. A page whose stamp has changed since the look before was
    written after that: before the take that followed it, or after that and before this one.
    """

    def __init__(self, array: np.ndarray, tracker: WriteTracker) -> None:
        self._stamps = array.reshape(-1, PAGE)[:, ::512]
        self._tracker = tracker
        self._seen = self._stamps.copy()
        self._reported = np.zeros(len(self._stamps), np.bool_)
        self.changes = 0

    def round(self) -> None:
        now = self._stamps.copy()
        reported = self._tracker.take().mask()
        changed = (now != self._seen).any(axis=1)
        lost = np.flatnonzero(changed & ~(reported | self._reported))
        assert not len(lost), f"written, and never reported: pages {lost.tolist()}"
        self.changes += int(changed.sum())
        self._seen, self._reported = now, reported


@contextmanager
def writers(array: np.ndarray, write: Callable[[np.ndarray, random.Random, int], None]) -> Iterator[None]:
    """Have threads write without end; the interpreter changes between threads as often as it can."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        turn = number
        try:
            while not stop.is_set():
                write(array, chance, turn)
                turn += WRITERS
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(WRITERS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert failures == []


def stretches(array: np.ndarray, chance: random.Random, turn: int) -> None:
    """Write many neighbouring pages in one call, without the GIL: most of the time is spent in faults."""
    first = chance.randrange(COUNT - 8)
    poke(array, first * PAGE, chance.randrange(1, 8) * PAGE, 1 + turn % 250)


def single_bytes(array: np.ndarray, chance: random.Random, turn: int) -> None:
    """Write one stamp in one page."""
    poke(array, chance.randrange(COUNT) * PAGE + chance.randrange(8) * 512, 1, 1 + turn % 250)


@pytest.mark.parametrize("write", [stretches, single_bytes])
@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_six_threads_write_while_one_takes(
    kind: str, write: Callable[[np.ndarray, random.Random, int], None]
) -> None:
    with memory_of(kind, COUNT) as array, track_writes(array) as w:
        watcher = Watcher(array, w)
        with writers(array, write):
            for _ in range(rounds(1000, 50_000)):
                watcher.round()
        watcher.round()
        watcher.round()
        assert watcher.changes > 100  # it did overlap
        assert w.ranges() == []


def test_several_take_while_others_write() -> None:
    """Each tracker has every write, whoever else takes in between, and trackers come and go."""
    with memory_of("anonymous", COUNT) as array, track_writes(array) as w:
        watchers = [Watcher(array, w)]
        others = [track_writes(array).start() for _ in range(2)]
        watchers += [Watcher(array, other) for other in others]
        failures: list[BaseException] = []

        def watch(watcher: Watcher) -> None:
            try:
                for _ in range(rounds(150, 10_000)):
                    watcher.round()
            except BaseException as error:
                failures.append(error)

        def come_and_go() -> None:
            try:
                for first in range(rounds(100, 10_000)):
                    part = array[first % 40 * PAGE : (first % 40 + 50) * PAGE]
                    with track_writes(part) as inner:
                        poke(array, (first % 40 + 7) * PAGE)
                    assert inner.mask()[7]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=watch, args=(watcher,)) for watcher in watchers]
        threads.append(threading.Thread(target=come_and_go))
        with writers(array, stretches):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert failures == []
        for other in others:
            other.stop()
