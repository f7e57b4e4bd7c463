"""Waiting for a condition: with an end, and without a fixed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["wait_until"]

DEADLINE_S = 30.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once `condition()` is true; fail the test if that does not come.

    For what other threads and processes do and tell nobody of.
    """
    end = time.monotonic() + DEADLINE_S
    never = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        never.wait(0.002)
