"""Threads of the conformance suites."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

__all__ = ["run_threads"]

_MOST = 8


def run_threads(concurrency: int, work: Callable[[int, int], None]) -> None:
    """Run `work(number, threads)` in as many threads at once as a source allows, and raise what one of them raised."""
    threads = min(concurrency, _MOST)
    if threads == 1:
        pytest.skip("this source is used by one thread at a time")
    errors: list[BaseException] = []
    begin = threading.Barrier(threads)

    def run(number: int) -> None:
        try:
            begin.wait()
            work(number, threads)
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
