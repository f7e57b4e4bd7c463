"""The conformance suite finds stores that are wrong, each in its own way."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from userfault.sources import PageStore
from userfault.sources._abc import check_range
from userfault.testing import PageStoreTests

CONTENT = random.Random(0).randbytes(50_000)
numbers = itertools.count()


class Right(PageStore):
    """Bytes in a file."""

    full = False

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(CONTENT)

    @property
    def nbytes(self) -> int:
        return len(CONTENT)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.readinto(buffer)

    def write_from(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        if Right.full:
            raise OSError(28, "No space left on device")
        self.put(offset, bytes(buffer))

    def put(self, offset: int, content: bytes) -> None:
        with self.path.open("rb+", buffering=0) as file:
            file.seek(offset)
            file.write(content)


class ReadOnly(Right):
    writable = False


class LeavesSomeOut(Right):
    def put(self, offset: int, content: bytes) -> None:
        super().put(offset, content[:-1])


class WritesWholePages(Right):
    def put(self, offset: int, content: bytes) -> None:
        content += bytes(-len(content) % 512)
        super().put(offset, content[: len(CONTENT) - offset])


class Grows(Right):
    def write_from(self, offset: int, buffer: memoryview) -> None:
        self.put(max(0, offset), bytes(buffer))


class Adds(Right):
    """A write is not the same twice."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen: set[tuple[int, bytes]] = set()

    def put(self, offset: int, content: bytes) -> None:
        if content and (offset, content) in self.seen:
            content = bytes(byte ^ 1 for byte in content)
        self.seen.add((offset, content))
        super().put(offset, content)


class ForgetsZeros(Right):
    def put(self, offset: int, content: bytes) -> None:
        if content.strip(b"\x00"):
            super().put(offset, content)


class KeepsTheBuffer(Right):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.waiting: list[tuple[int, memoryview]] = []

    def write_from(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        self.waiting.append((offset, buffer))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for at, kept in self.waiting:
            self.put(at, bytes(kept))
        self.waiting.clear()
        super().read_into(offset, buffer)


class KeepsItToItself(Right):
    """Only this object knows what was written, until it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.mine = bytearray(CONTENT)

    def put(self, offset: int, content: bytes) -> None:
        self.mine[offset : offset + len(content)] = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, len(buffer))
        buffer[:] = self.mine[offset : offset + len(buffer)]


class ShowsOldBytes(Right):
    """Has a cache, and forgets to change what it has in it."""

    cached: tuple[int, bytes] = (0, b"")
    keeps = False

    def set_cache(self, nbytes: int) -> None:
        self.keeps = nbytes > 1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.keeps and self.cached[0] == offset and len(self.cached[1]) == len(buffer):
            buffer[:] = self.cached[1]
            return
        super().read_into(offset, buffer)
        self.cached = (offset, bytes(buffer))


class LosesNeighbours(Right):
    """Says that it is thread-safe, and reads, changes and writes whole pages without a lock."""

    concurrency = 4

    def put(self, offset: int, content: bytes) -> None:
        start = offset // 4096 * 4096
        stop = min(len(CONTENT), -(-(offset + len(content)) // 4096) * 4096)
        page = bytearray(stop - start)
        self.read_into(start, memoryview(page))
        page[offset - start : offset - start + len(content)] = content
        # Let another thread come in between.
        threading.Event().wait(0.0001)
        super().put(start, bytes(page))


class TakesHalf(Right):
    """When it fails, it has spoilt what was there."""

    def write_from(self, offset: int, buffer: memoryview) -> None:
        try:
            super().write_from(offset, buffer)
        except OSError:
            self.put(offset, b"\xee" * len(buffer))
            raise


class SaysNothing(Right):
    """A failure stays unknown."""

    def write_from(self, offset: int, buffer: memoryview) -> None:
        with contextlib.suppress(OSError):
            super().write_from(offset, buffer)


def suite_of(cls: Any, folder: Path) -> PageStoreTests:
    class Suite(PageStoreTests):
        reads = 40

        def store(self) -> PageStore:
            store: PageStore = cls(folder / str(next(numbers)))
            return store

        def expected(self) -> bytes:
            return CONTENT

        @contextlib.contextmanager
        def failing(self, store: PageStore) -> Iterator[None]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Right, "full", True)
                yield

    return Suite()


@pytest.mark.parametrize(
    ("cls", "test"),
    [
        (ReadOnly, "test_store_description"),
        (LeavesSomeOut, "test_write_whole"),
        (LeavesSomeOut, "test_write_ends"),
        (WritesWholePages, "test_write_random_ranges"),
        (WritesWholePages, "test_write_ends"),
        (Grows, "test_write_out_of_range"),
        (Adds, "test_write_twice"),
        (ForgetsZeros, "test_write_zeros"),
        (KeepsTheBuffer, "test_buffer_is_not_kept"),
        (KeepsItToItself, "test_killed_after_a_write"),
        (ShowsOldBytes, "test_write_cache_sizes"),
        (LosesNeighbours, "test_write_threads"),
        (TakesHalf, "test_failed_write"),
        (SaysNothing, "test_failed_write"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, cls: Any, test: str) -> None:
    if test != "test_write_threads":
        getattr(suite_of(Right, tmp_path), test)()
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        getattr(suite_of(cls, tmp_path), test)()
    assert not isinstance(caught.value, pytest.skip.Exception)


class TestRight(PageStoreTests):
    reads = 40

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.at = tmp_path

    def store(self) -> PageStore:
        return Right(self.at / str(next(numbers)))

    def expected(self) -> bytes:
        return CONTENT


def test_a_suite_without_a_store_says_what_to_write() -> None:
    with pytest.raises(TypeError, match="must have a method store"):
        PageStoreTests().test_write_whole()
