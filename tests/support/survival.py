"""What the tests of survival share: arrays of every kind, readers that hold no lock, a process that may hang or die.

What is read is always the same pattern, so that any thread or process can tell right bytes from wrong ones.
"""

from __future__ import annotations

import ctypes
import random
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import userfault
from support.page_sources import PERIOD, PatternSource, pattern
from support.processes import Finished, run_python
from support.soak import patience_s

__all__ = [
    "KILLS",
    "NBYTES",
    "WAYS",
    "WRITABLE",
    "WRITTEN_BACK",
    "Readers",
    "Writers",
    "expected",
    "open_way",
    "readers",
    "same",
    "stored",
    "survive",
    "writers",
]

NBYTES = (1 << 20) + 5000
# Writable memories are filled with the pattern by writing it: their blocks are dirty, or were written back.
WRITTEN_BACK = ("r+", "direct")
WRITABLE = ("empty", "c", *WRITTEN_BACK)
WAYS = ("memory", "raw", "source", *WRITABLE)
PAGE = 4096

# Without the GIL.
_memcmp, _memmove = ctypes.CDLL(None).memcmp, ctypes.CDLL(None).memmove
_memcmp.argtypes = _memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def expected(nbytes: int = NBYTES) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return what every array here holds."""
    return np.frombuffer(pattern(0, nbytes), np.uint8)


def open_way(
    way: str, folder: Path, nbytes: int = NBYTES, **options: Any
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Open an array with the pattern, in one of the `WAYS`, on a file in `folder` where it needs one."""
    right = expected(nbytes)
    path = folder / "file.raw"
    array: np.ndarray[Any, Any]
    if way in ("memory", "source"):
        array = userfault.open(right.copy() if way == "memory" else PatternSource(nbytes), **options)
        return array
    if way == "empty":
        options.pop("readahead", None)
        array = userfault.empty(nbytes, np.uint8, **options)
        array[:] = right
        return array
    # Of what is written, half differs from what was in the file.
    content = right.copy()
    if way in ("c", *WRITTEN_BACK):
        content[: nbytes // 2] ^= 0xFF
    content.tofile(path)
    if way == "direct":
        options.update(mode="r+", delivery="direct")
    elif way != "raw":
        options["mode"] = way
    array = userfault.open(path, dtype="u1", **options)
    if way in ("c", *WRITTEN_BACK):
        array[: nbytes // 2] = right[: nbytes // 2]
    return array


def stored(folder: Path) -> bytes:
    """Return what is in the file of an array that is written back."""
    return (folder / "file.raw").read_bytes()


def same(array: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    """Compare all of it, without the GIL: other threads run while this one waits in a fault."""
    assert array.nbytes == right.nbytes
    different: int = _memcmp(array.ctypes.data, right.ctypes.data, right.nbytes)
    return different == 0


class _Threads:
    """Threads that run until they are told to stop."""

    def __init__(self, count: int) -> None:
        self._stop = threading.Event()
        self.wrong: list[int] = []
        self.passes = [0] * count
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]

    def _run(self, number: int) -> None:
        raise NotImplementedError

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stop them; a thread that hangs is an error, and so is a wrong byte."""
        self._stop.set()
        for thread in self._threads:
            thread.join(patience_s() / 2)
        assert not any(thread.is_alive() for thread in self._threads), "a thread hangs"
        assert self.wrong == []


class Readers(_Threads):
    """Threads that compare arrays with what they should hold, over and over, without the GIL."""

    def __init__(
        self, arrays: list[np.ndarray[Any, Any]], rights: list[np.ndarray[Any, Any]], count: int
    ) -> None:
        super().__init__(count)
        self._pairs = [(a.ctypes.data, r.ctypes.data, r.nbytes) for a, r in zip(arrays, rights, strict=True)]

    def _run(self, number: int) -> None:
        step = 400_000 + 77_777 * number  # many faults in each call: between calls a thread waits for the GIL
        while not self._stop.is_set():
            for address, right, nbytes in self._pairs:
                for at in range(0, nbytes, step):
                    if self._stop.is_set():
                        return
                    if _memcmp(address + at, right + at, min(step, nbytes - at)):
                        self.wrong.append(at)
            self.passes[number] += 1


class Writers(_Threads):
    """Threads that write pages of an array, each its own, and compare what they wrote before. Without the GIL.

    Attributes:
        want: What the array holds, but for the pages that are written at this moment.
        current: For each thread the page that it is writing. Nothing else changes while one holds the GIL.
    """

    def __init__(self, array: np.ndarray[Any, Any], count: int) -> None:
        super().__init__(count)
        self._array = array
        self.want = array.copy()
        self.current = list(range(count))

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        mine = range(number, self.want.nbytes // PAGE, len(self.current))
        fresh = expected(2 * PERIOD).ctypes.data
        array, want = self._array.ctypes.data, self.want.ctypes.data
        while not self._stop.is_set():
            self.current[number] = page = rng.choice(mine)
            new = fresh + rng.randrange(PERIOD)
            _memmove(want + page * PAGE, new, PAGE)
            _memmove(array + page * PAGE, new, PAGE)
            for page in rng.choices(mine, k=3):
                if _memcmp(array + page * PAGE, want + page * PAGE, PAGE):
                    self.wrong.append(page)
            self.passes[number] += 1

    def wrong_pages(self) -> list[int]:
        """Return which pages are wrong, but for those that were written when the GIL was taken: also in a child."""
        pages = [self._array[at : at + PAGE] for at in range(0, self.want.nbytes, PAGE)]
        return [
            i
            for i, page in enumerate(pages)
            if i not in self.current and not np.array_equal(page, self.want[i * PAGE : (i + 1) * PAGE])
        ]


@contextmanager
def readers(
    arrays: list[np.ndarray[Any, Any]], rights: list[np.ndarray[Any, Any]], count: int = 3
) -> Iterator[Readers]:
    """Have threads read the arrays until the end of the block."""
    some = Readers(arrays, rights, count)
    some.start()
    try:
        yield some
    finally:
        some.end()


@contextmanager
def writers(array: np.ndarray[Any, Any], count: int = 2) -> Iterator[Writers]:
    """Have threads write to the array until the end of the block; then all of it is as they wrote it."""
    some = Writers(array, count)
    some.start()
    try:
        yield some
    finally:
        some.end()
    assert same(array, some.want)


PRELUDE = """
import ctypes, gc, os, signal, sys, threading, time, warnings
from functools import partial
from pathlib import Path
import numpy as np, userfault
from support.page_sources import PatternSource, Trouble, TroubleSource, pattern
from support.pagers import SECOND, own_pager
from support.survival import NBYTES, WRITTEN_BACK, expected, open_way, readers, same, stored, writers
from support.waiting import wait_until
# From Python 3.12 on, forking a process with threads gives a warning. This one always has some.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
folder = Path(os.environ["SURVIVAL_FOLDER"])
right = expected()
"""


# For tests that kill workers (`sys.argv[1]` of them).
# Bytes are checked as they come. "Bounded" is generous: what is bounded is what a hang would not be.
KILLS = """
import psutil
from support.kill_points import KilledSource
from userfault import pager
BOUND_S = 30.0
kills, block = int(sys.argv[1]), 4096

def checked(array, at, length):
    began = time.monotonic()
    assert array[at : at + length].tobytes() == pattern(at, length), at
    took = time.monotonic() - began
    assert took < BOUND_S, took

def workers():
    return [child.pid for child in psutil.Process().children()]

def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was ended before

def lost():
    return userfault.pager_stats().workers_lost
"""


def survive(code: str, *arguments: str, **options: Any) -> Finished:
    """Run code, after what it needs was imported, in a process of its own, which may hang or die.

    It has an empty `folder`, which goes when it has ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "SURVIVAL_FOLDER": folder,
            **options.pop("env", {}),
        }
        return run_python(
            PRELUDE + textwrap.dedent(code), patience_s(), arguments=arguments, env=env, **options
        )
