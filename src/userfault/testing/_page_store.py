"""The conformance suite of page stores."""

from __future__ import annotations

import contextlib
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from userfault.sources._abc import PageSource, PageStore, Recipe, describe
from userfault.sources._own import SourceRecipe
from userfault.sources._pickle import dumps
from userfault.testing._page_source import PageSourceTests
from userfault.testing._threads import run_threads

__all__ = ["PageStoreTests"]

_LONGEST_WRITE = 1 << 20
# Not a multiple of anything: stripes of this size share blocks and chunks with their neighbours.
_STRIPE = 1009

# Writes what it is told to, says so, and waits to be killed.
_WRITE = """
import pickle, signal, sys
recipe, offset, content, flush = pickle.loads(sys.stdin.buffer.read())
store = pickle.loads(recipe).load()
store.write_from(offset, memoryview(content))
if flush:
    store.flush()
print("written", flush=True)
signal.pause()
"""


class PageStoreTests(PageSourceTests):
    """Every corner of the `PageStore` interface, and of `PageSource`. Subclass it, give `store` and `expected`.

    What is written is random bytes. A store that gives back anything else than it took (lossy compression) cannot pass.

    Example:
        ```python
        from userfault.testing import PageStoreTests

        class TestPlates(PageStoreTests):
            @pytest.fixture(autouse=True)
            def folder(self, tmp_path):
                self.folder = tmp_path

            def store(self):
                return Plates.create(tempfile.mkdtemp(dir=self.folder), self.expected())

            def expected(self):
                return random.Random(1).randbytes(100_000)
        ```
    """

    def store(self) -> PageStore:
        """Return a store in a new place of its own, with the bytes of `expected`. It is closed when the test ends."""
        raise TypeError(f"{type(self).__name__} must have a method store() that returns a PageStore")

    def reopened(self, store: PageStore) -> Recipe:
        """Return what another process is sent to open the place of `store`: itself, unless you say otherwise."""
        return SourceRecipe(store)

    def failing(self, store: PageStore) -> AbstractContextManager[object] | None:
        """Return a context in which all writes to the place of `store` fail, None if you have no way to do that."""
        return None

    def source(self) -> PageSource:
        """Return a new store."""
        return self.store()

    def recipe(self) -> Recipe:
        """Return what is sent to a worker process."""
        store = self.store()
        try:
            # As it is now: once it is closed it may not be fit to be pickled.
            recipe: Recipe = pickle.loads(dumps(self.reopened(store)))
        finally:
            store.close()
        return recipe

    @contextmanager
    def opened_store(self) -> Iterator[tuple[PageStore, bytearray]]:
        """Return a new store and what it should have; close it at the end."""
        store = self.store()
        try:
            yield store, bytearray(self.expected())
        finally:
            store.close()

    def test_store_description(self) -> None:
        """It says that it can be written, and how."""
        with self.opened_store() as (store, _):
            assert store.writable is True
            assert type(store.transactional) is bool
            assert store.write_unit is None or store.write_unit > 0
            description = describe(store)
            assert description.writable
            assert pickle.loads(pickle.dumps(description)) == description

    def test_write_whole(self) -> None:
        """One write of everything."""
        with self.opened_store() as (store, model):
            self._write(store, model, 0, random.Random(1).randbytes(len(model)))
            self._check(store, model)

    def test_write_blocks_in_order(self) -> None:
        """A scan in blocks of several sizes, the last one cut short."""
        with self.opened_store() as (store, model):
            rng = random.Random(2)
            for block in (4 << 10, 64 << 10, 1 << 20, 1000):
                for offset in range(0, min(len(model), 40 * block), block):
                    self._write(store, model, offset, rng.randbytes(min(block, len(model) - offset)))
                self._check(store, model)

    def test_write_ends(self) -> None:
        """Single bytes and short ranges at both ends: what is beside them stays."""
        with self.opened_store() as (store, model):
            size, rng = len(model), random.Random(3)
            for length in sorted({1, min(2, size), min(4096, size)}):
                for offset in (0, size - length):
                    self._write(store, model, offset, rng.randbytes(length))
                    self._check(store, model)

    def test_write_random_ranges(self) -> None:
        """Ranges that begin and end anywhere, in no order, with reads between them."""
        with self.opened_store() as (store, model):
            rng = random.Random(4)
            for _ in range(self.reads):
                offset, length = _random_range(rng, len(model))
                self._write(store, model, offset, rng.randbytes(length))
                offset, length = _random_range(rng, len(model))
                self._check(store, model, offset, length)
            self._check(store, model)

    def test_write_cache_sizes(self) -> None:
        """A read after a write sees it, whatever may be kept."""
        with self.opened_store() as (store, model):
            rng = random.Random(5)
            for nbytes in (0, 1, 1 << 20, 1 << 30, 0):
                store.set_cache(nbytes)
                for _ in range(self.reads // 5):
                    offset, length = _random_range(rng, len(model))
                    # What is read before may be kept, and is old afterwards.
                    self._check(store, model, offset, length)
                    self._write(store, model, offset, rng.randbytes(length))
                    self._check(store, model, offset, length)
            self._check(store, model)

    def test_write_empty(self) -> None:
        """A write of no bytes is no error, also at the end, and changes nothing."""
        with self.opened_store() as (store, model):
            for offset in (0, len(model)):
                store.write_from(offset, memoryview(b""))
            self._check(store, model)

    def test_write_out_of_range(self) -> None:
        """A write beyond an end raises, and writes no part of it."""
        with self.opened_store() as (store, model):
            for offset, length in ((len(model), 1), (len(model) - 1, 2), (-1, 2), (1 << 62, 1)):
                with pytest.raises(Exception):  # noqa: B017, PT011 - any exception is a refusal
                    store.write_from(offset, memoryview(b"\xa5" * length))
            self._check(store, model)
            assert store.nbytes == len(model)

    def test_write_twice(self) -> None:
        """The same write again, as after a worker was killed, changes nothing more."""
        with self.opened_store() as (store, model):
            rng = random.Random(6)
            for _ in range(self.reads // 5):
                offset, length = _random_range(rng, len(model))
                content = rng.randbytes(length)
                self._write(store, model, offset, content)
                self._write(store, model, offset, content)
                self._check(store, model, offset, length)
            self._check(store, model)

    def test_write_zeros(self) -> None:
        """Zeros are bytes like any others, though they may be stored in a way of their own."""
        with self.opened_store() as (store, model):
            self._write(store, model, 0, bytes(len(model)))
            self._check(store, model)
            middle = len(model) // 2
            self._write(store, model, middle, b"\x01")
            self._check(store, model)
            self._write(store, model, middle, b"\x00")
            self._check(store, model)

    def test_buffer_is_not_kept(self) -> None:
        """The buffer is only lent: what becomes of it after the write does not matter."""
        with self.opened_store() as (store, model):
            length = min(len(model), 64 << 10)
            buffer = bytearray(random.Random(7).randbytes(length))
            model[:length] = buffer
            store.write_from(0, memoryview(buffer).toreadonly())
            buffer[:] = bytes(length)
            self._check(store, model)

    def test_flush(self) -> None:
        """After a flush another process sees what was written; a flush of nothing is no error."""
        with self.opened_store() as (store, model):
            rng = random.Random(8)
            store.flush()
            for _ in range(3):
                offset, length = _random_range(rng, len(model))
                self._write(store, model, offset, rng.randbytes(length))
                store.flush()
                self._check_reopened(store, model)
            store.flush()
            self._check(store, model)

    def test_write_threads(self) -> None:
        """As many reads and writes at once as it says it can do, of neighbours that share blocks."""
        with self.opened_store() as (store, model):

            def write(mine: int, threads: int) -> None:
                rng = random.Random(mine)
                for _ in range(self.reads // 5):
                    for start in range(mine * _STRIPE, min(len(model), 40 * _STRIPE), threads * _STRIPE):
                        content = rng.randbytes(min(_STRIPE, len(model) - start))
                        self._write(store, model, start, content)
                        if not store.transactional:
                            self._check(store, model, start, len(content))

            run_threads(store.concurrency, write)
            self._check(store, model)
            store.flush()
            self._check_reopened(store, model)

    def test_killed_after_a_write(self) -> None:
        """What a process wrote is there after it was killed; of a transactional store, what it flushed."""
        with self.opened_store() as (store, model):
            rng = random.Random(9)
            recipe = dumps(self.reopened(store))
            for flush in (False, True):
                offset, length = _random_range(rng, len(model))
                content = rng.randbytes(length)
                self._write_and_die(recipe, offset, content, flush=flush)
                if flush or not store.transactional:
                    model[offset : offset + length] = content
                self._check_reopened(store, model)

    def test_failed_write(self) -> None:
        """A write that fails leaves the old bytes or the new ones of each element, and succeeds when it comes again."""
        with self.opened_store() as (store, model):
            failing = self.failing(store)
            if failing is None:
                pytest.skip("this suite has no way to make writes fail")
            before = bytes(model)
            content = random.Random(10).randbytes(len(model))
            with failing:
                with pytest.raises(Exception):  # noqa: B017, PT011 - any exception is a refusal
                    self._write_and_flush(store, content)
                # And once more: nothing is taken for done that is not.
                with pytest.raises(Exception):  # noqa: B017, PT011
                    self._write_and_flush(store, content)
            for position, byte in enumerate(_read(store, 0, len(model))):
                assert byte in (before[position], content[position]), (
                    f"byte {position} is neither old nor new"
                )
            self._write(store, model, 0, content)
            store.flush()
            self._check(store, model)
            self._check_reopened(store, model)

    def _write_and_flush(self, store: PageStore, content: bytes) -> None:
        store.write_from(0, memoryview(content))
        store.flush()

    def _write(self, store: PageStore, model: bytearray, offset: int, content: bytes) -> None:
        model[offset : offset + len(content)] = content
        # In the middle of something larger, and elsewhere each time.
        around = b"\xa5" * 8 + content + b"\xa5" * 8
        store.write_from(offset, memoryview(around)[8:-8])

    def _check(self, store: PageStore, model: bytearray, offset: int = 0, length: int | None = None) -> None:
        if store.transactional:
            # Only then may it be seen.
            store.flush()
        length = len(model) - offset if length is None else length
        got, right = _read(store, offset, length), model[offset : offset + length]
        assert got == right, f"{length} bytes at {offset} differ, the first one at {_first(got, right)}"

    def _check_reopened(self, store: PageStore, model: bytearray) -> None:
        other = pickle.loads(dumps(self.reopened(store))).load()
        try:
            got = _read(other, 0, len(model))
            assert got == model, f"opened again, bytes differ, the first one at {_first(got, model)}"
        finally:
            other.close()

    def _write_and_die(self, recipe: bytes, offset: int, content: bytes, *, flush: bool) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}\n{_WRITE}"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        # Also if it hangs: nothing here waits longer than this.
        watchdog = threading.Timer(self.deadline_s, process.kill)
        watchdog.start()
        try:
            with process, contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                assert process.stdout is not None
                assert process.stderr is not None
                process.stdin.write(pickle.dumps((recipe, offset, content, flush)))
                process.stdin.close()
                lines = []
                # A library may print something of its own.
                while (line := process.stdout.readline()) and line != b"written\n":
                    lines.append(line)
                process.kill()
                assert line == b"written\n", process.stderr.read().decode(errors="replace")
            assert process.returncode == -signal.SIGKILL
        finally:
            watchdog.cancel()
            watchdog.join()


def _read(source: PageSource, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\x5a" * length)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def _first(got: bytes, right: bytes | bytearray) -> int:
    return next(at for at, pair in enumerate(zip(got, right, strict=True)) if pair[0] != pair[1])


def _random_range(rng: random.Random, size: int) -> tuple[int, int]:
    # Many short ranges, some long ones.
    length = min(size, int(2 ** rng.uniform(0, _LONGEST_WRITE.bit_length())))
    return rng.randrange(size - length + 1), length
