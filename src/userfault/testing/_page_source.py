"""The conformance suite of page sources."""

from __future__ import annotations

import hashlib
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest

from userfault.sources._abc import ArraySource, PageSource, Recipe, describe
from userfault.sources._own import SourceRecipe
from userfault.sources._pickle import dumps
from userfault.testing._threads import run_threads

__all__ = ["PageSourceTests"]

_GUARD = 64
_LONGEST_READ = 1 << 20

# What a worker process does, as far as a source can tell.
_READ_ALL = """
import hashlib, pickle, sys
source = pickle.loads(sys.stdin.buffer.read()).load()
digest = hashlib.sha256()
for offset in range(0, source.nbytes, 1 << 20):
    buffer = bytearray(min(1 << 20, source.nbytes - offset))
    source.read_into(offset, memoryview(buffer))
    digest.update(buffer)
source.close()
print(digest.hexdigest())
"""


class PageSourceTests:
    """Every corner of the `PageSource` interface. Subclass it, give `source` and `expected`, and run pytest.

    Attributes:
        reads: How many random ranges are read in each test that does so.
        deadline_s: How long reading everything in another process may take, in seconds.

    Example:
        ```python
        from userfault.testing import PageSourceTests

        class TestSquares(PageSourceTests):
            def source(self):
                return Squares(nbytes=100_000)

            def expected(self):
                return bytes(i * i % 256 for i in range(100_000))
        ```
    """

    reads: ClassVar[int] = 100
    deadline_s: ClassVar[float] = 60.0

    def source(self) -> PageSource:
        """Return a new source. It is closed at the end of the test."""
        raise TypeError(f"{type(self).__name__} must have a method source() that returns a PageSource")

    def expected(self) -> bytes:
        """Return all bytes of the source, at least one."""
        raise TypeError(f"{type(self).__name__} must have a method expected() that returns bytes")

    def recipe(self) -> Recipe:
        """Return what is sent to a worker process: the source itself, unless you say otherwise."""
        return SourceRecipe(self.source())

    @contextmanager
    def opened(self) -> Iterator[tuple[PageSource, bytes]]:
        """Return a new source and what it should have; close it at the end."""
        source = self.source()
        try:
            yield source, self.expected()
        finally:
            source.close()

    def test_description(self) -> None:
        """What it says of itself is of the right kind, and can be sent to another process."""
        with self.opened() as (source, expected):
            assert type(source.nbytes) is int
            assert source.nbytes == len(expected) > 0
            assert source.block is None or source.block > 0
            assert source.concurrency >= 1
            assert source.wants_cache >= 0
            description = describe(source)
            assert pickle.loads(pickle.dumps(description)) == description
            if isinstance(source, ArraySource):
                assert description.dtype is not None
                assert description.shape == tuple(source.shape)
                assert description.order in ("C", "F")

    def test_whole(self) -> None:
        """One read of everything."""
        with self.opened() as (source, expected):
            assert _read(source, 0, len(expected)) == expected

    def test_blocks_in_order(self) -> None:
        """A scan in blocks of several sizes, the last one cut short."""
        with self.opened() as (source, expected):
            for block in (4 << 10, 64 << 10, 1 << 20, 1000):
                # A few hundred reads of each size are a scan as good as any.
                for offset in range(0, min(len(expected), 300 * block), block):
                    part = expected[offset : offset + block]
                    assert _read(source, offset, len(part)) == part, f"{len(part)} bytes at {offset}"

    def test_ends(self) -> None:
        """Single bytes and short ranges at both ends."""
        with self.opened() as (source, expected):
            size = len(expected)
            for length in {1, min(2, size), min(4096, size)}:
                assert _read(source, 0, length) == expected[:length]
                assert _read(source, size - length, length) == expected[size - length :]

    def test_random_ranges(self) -> None:
        """Ranges that begin and end anywhere, in no order."""
        with self.opened() as (source, expected):
            rng = random.Random(1)
            for _ in range(self.reads):
                _check_random(source, expected, rng)

    def test_empty_read(self) -> None:
        """A read of no bytes is no error, also at the end."""
        with self.opened() as (source, expected):
            for offset in (0, len(expected)):
                source.read_into(offset, memoryview(bytearray()))

    def test_out_of_range(self) -> None:
        """A read beyond an end raises, rather than leave the buffer as it was."""
        with self.opened() as (source, expected):
            for offset, length in ((len(expected), 1), (len(expected) - 1, 2), (-1, 1), (1 << 62, 1)):
                with pytest.raises(Exception):  # noqa: B017, PT011 - any exception is a refusal
                    source.read_into(offset, memoryview(bytearray(length)))
            # And it still works.
            assert _read(source, 0, 1) == expected[:1]

    def test_cache_sizes(self) -> None:
        """Whatever may be kept, the bytes are the same."""
        with self.opened() as (source, expected):
            rng = random.Random(2)
            for nbytes in (0, 1, 1 << 20, 1 << 30, 0):
                source.set_cache(nbytes)
                for _ in range(self.reads // 5):
                    _check_random(source, expected, rng)

    def test_threads(self) -> None:
        """As many reads at once as it says it can do."""
        with self.opened() as (source, expected):

            def read(seed: int, threads: int) -> None:
                rng = random.Random(seed)
                for _ in range(self.reads):
                    _check_random(source, expected, rng)

            run_threads(source.concurrency, read)

    def test_pickled(self) -> None:
        """What comes out of a pickle reads the same."""
        source = pickle.loads(dumps(self.recipe())).load()
        expected = self.expected()
        try:
            rng = random.Random(3)
            for _ in range(self.reads):
                _check_random(source, expected, rng)
        finally:
            source.close()

    def test_in_another_process(self) -> None:
        """A worker process can load it, and reads the same."""
        code = f"import sys; sys.path[:] = {sys.path!r}\n{_READ_ALL}"
        process = subprocess.run(
            [sys.executable, "-c", code],
            input=dumps(self.recipe()),
            capture_output=True,
            timeout=self.deadline_s,
        )
        assert process.returncode == 0, process.stderr.decode(errors="replace")
        assert process.stdout.decode().strip() == hashlib.sha256(self.expected()).hexdigest()


def _read(source: PageSource, offset: int, length: int) -> bytes:
    """Read a range into the middle of a larger buffer, twice, and see that exactly the range was written."""
    results = []
    for fill in (0x55, 0xAA):
        buffer = bytearray([fill]) * (_GUARD + length + _GUARD)
        source.read_into(offset, memoryview(buffer)[_GUARD : _GUARD + length])
        assert buffer[:_GUARD] == bytes([fill]) * _GUARD, "it wrote before the buffer"
        assert buffer[_GUARD + length :] == bytes([fill]) * _GUARD, "it wrote behind the buffer"
        results.append(bytes(buffer[_GUARD : _GUARD + length]))
    # What was not written still has the fill, and so differs.
    assert results[0] == results[1], f"{length} bytes at {offset} differ between two reads"
    return results[0]


def _check_random(source: PageSource, expected: bytes, rng: random.Random) -> None:
    # Many short ranges, some long ones.
    length = min(len(expected), int(2 ** rng.uniform(0, _LONGEST_READ.bit_length())))
    offset = rng.randrange(len(expected) - length + 1)
    got = _read(source, offset, length)
    assert got == expected[offset : offset + length], f"{length} bytes at {offset}"
