"""Threads that read and write while another takes and resets: nothing is lost, and nothing is told that was not."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from support.accesses import CASES, Case, Tracked, tracked
from userfault.track import Touched

ROUNDS = 1000 if not os.environ.get("UF_TEST_SLOW") else 20
THREADS = 6
UNITS = 48
# How accesses are told in a log, one row each: unit, whether it was a write, when it began and ended.
_UNIT, _WRITE, _BEGAN, _ENDED = range(4)


@pytest.fixture(autouse=True)
def threads_take_turns_quickly() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(50e-6)
    yield
    sys.setswitchinterval(before)


def _work(it: Tracked, number: int, stop: threading.Event, log: list[tuple[int, bool, int, int]]) -> None:
    """Read any pages, and write those that are this thread's; by the interpreter, or by C without its lock."""
    rng = np.random.default_rng(number)
    start, unit = it.array.ctypes.data, it.unit
    bare = ctypes.create_string_buffer(8)
    value = 0
    while not stop.is_set():
        for place, write in zip(rng.integers(0, it.units, 16).tolist(), rng.random(16) < 0.3, strict=True):
            write = bool(write) and place % THREADS == number
            at = place * unit + 8 * number
            began = time.monotonic_ns()
            if write:
                value += 1
                if number % 2:
                    ctypes.memset(start + at, value % 200, 8)
                else:
                    it.array[at : at + 8] = value % 200
                it.expected[at : at + 8] = value % 200
            elif number % 2:
                ctypes.memmove(bare, start + at, 8)
            else:
                it.array[at].item()
            log.append((place, write, began, time.monotonic_ns()))
        time.sleep(0.0002)


class _Takes:
    """Which intervals there were, and what each had, by unit."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.ended: list[int] = []
        self.accessed: list[NDArray[np.bool_]] = []
        self.written: list[NDArray[np.bool_]] = []

    def add(self, it: Tracked, began: int, found: Touched) -> None:
        self.ended.append(time.monotonic_ns())
        self.began.append(began)
        self.accessed.append(found.mask("it", "accessed"))
        self.written.append(found.mask("it", "written") if it.tells_writes else np.zeros(it.units, np.bool_))

    def check(self, log: NDArray[np.int64], kind: list[NDArray[np.bool_]]) -> None:
        """Each access is in an interval that it may be in, and each report has an access that it may be of.

        An interval ends somewhere between the beginning and the end of its `take`.
        """
        began, ended = np.array(self.began), np.array(self.ended)
        told = np.array(kind)
        # The intervals an access may be in: from the first whose take had not ended when it began, to the first whose
        # take began after it had ended.
        first = np.searchsorted(ended, log[:, _BEGAN], side="right")
        last = np.searchsorted(began, log[:, _ENDED], side="left")
        assert (last < len(began)).all()
        justified = np.zeros_like(told)
        for unit in range(told.shape[1]):
            mine = log[:, _UNIT] == unit
            before = np.concatenate(([0], np.cumsum(told[:, unit])))
            lost = before[last[mine] + 1] == before[first[mine]]
            assert not lost.any(), f"unit {unit}: lost {log[mine][lost].tolist()[:3]}"
            for low, high in zip(first[mine].tolist(), last[mine].tolist(), strict=True):
                justified[low : high + 1, unit] = True
        assert not (told & ~justified).any(), "told, and there was no access"


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost_while_threads_go_on(case: Case) -> None:
    with tracked(case, UNITS) as it:
        stop = threading.Event()
        logs: list[list[tuple[int, bool, int, int]]] = [[] for _ in range(THREADS)]
        threads = [
            threading.Thread(target=_work, args=(it, number, stop, logs[number])) for number in range(THREADS)
        ]
        takes = _Takes()
        with it.tracker() as w:
            for thread in threads:
                thread.start()
            try:
                for _ in range(ROUNDS):
                    began = time.monotonic_ns()
                    takes.add(it, began, w.take())
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            for _ in range(2):  # what came after the last; after that there is nothing
                began = time.monotonic_ns()
                takes.add(it, began, w.take())
        assert not takes.accessed[-1].any()
        assert it.intact()
        log = np.array([row for rows in logs for row in rows], np.int64)
        assert len(log) > ROUNDS
        takes.check(log, takes.accessed)
        if it.tells_writes:
            takes.check(log[log[:, _WRITE] == 1], takes.written)
