"""The conformance suite finds sources that are wrong, each in its own way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from userfault.sources import PageSource
from userfault.testing import PageSourceTests

CONTENT = bytes(range(256)) * 500


class Right(PageSource):
    def __init__(self) -> None:
        self.limit = 1 << 40

    @property
    def nbytes(self) -> int:
        return len(CONTENT)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.nbytes:
            raise ValueError("beyond the end")
        buffer[:] = self.content(offset, len(buffer))

    def content(self, offset: int, length: int) -> bytes:
        return CONTENT[offset : offset + length]


class WrongLength(Right):
    @property
    def nbytes(self) -> int:
        return len(CONTENT) + 1


class OffByOne(Right):
    def content(self, offset: int, length: int) -> bytes:
        return CONTENT[(offset + 1) % 256 :][:length] if offset % 7 == 6 else super().content(offset, length)


class LeavesSomeOut(Right):
    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer[:-1])


class TakesAnything(Right):
    def read_into(self, offset: int, buffer: memoryview) -> None:
        part = CONTENT[max(offset, 0) : max(offset, 0) + len(buffer)]
        buffer[: len(part)] = part


class ForgetsWithoutACache(Right):
    def set_cache(self, nbytes: int) -> None:
        self.limit = nbytes or 1

    def content(self, offset: int, length: int) -> bytes:
        return bytes(length) if self.limit == 1 else super().content(offset, length)


class SharesABuffer(Right):
    """Says that it is thread-safe, and is not."""

    concurrency = 4

    def __init__(self) -> None:
        super().__init__()
        self.wanted = (0, 0)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.wanted = (offset, len(buffer))
        # Let another thread come in between.
        threading.Event().wait(0.0001)
        offset, length = self.wanted
        buffer[:] = CONTENT[offset : offset + length]


class HoldsALock(Right):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def suite_of(cls: Callable[[], PageSource]) -> PageSourceTests:
    class Suite(PageSourceTests):
        def source(self) -> PageSource:
            return cls()

        def expected(self) -> bytes:
            return CONTENT

    return Suite()


@pytest.mark.parametrize(
    ("cls", "test"),
    [
        (WrongLength, "test_description"),
        (OffByOne, "test_random_ranges"),
        (LeavesSomeOut, "test_whole"),
        (LeavesSomeOut, "test_ends"),
        (TakesAnything, "test_out_of_range"),
        (ForgetsWithoutACache, "test_cache_sizes"),
        (SharesABuffer, "test_threads"),
        (HoldsALock, "test_pickled"),
        (HoldsALock, "test_in_another_process"),
    ],
)
def test_what_is_wrong_is_found(cls: Any, test: str) -> None:
    getattr(suite_of(Right), test)() if test != "test_threads" else None
    with pytest.raises((Exception, pytest.fail.Exception)):
        getattr(suite_of(cls), test)()


def test_a_suite_without_a_source_says_what_to_write() -> None:
    with pytest.raises(TypeError, match="must have a method source"):
        PageSourceTests().test_whole()
