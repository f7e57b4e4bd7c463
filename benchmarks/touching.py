"""The touching loops of `bare/`, called from Python: both sides of a row fault by the same C code.

ctypes gives the interpreter lock away while they run.
"""

import ctypes
import mmap
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.child import Sample

PAGE = mmap.PAGESIZE
_GOLDEN = 0x9E3779B97F4A7C15


class Touched(ctypes.Structure):
    """`struct touch_result` of `bare/touch.h`."""

    _fields_ = (
        ("mean_ns", ctypes.c_double),
        ("p50_ns", ctypes.c_double),
        ("p99_ns", ctypes.c_double),
        ("checksum", ctypes.c_uint64),
    )

    def sample(self) -> Sample:
        """The median in µs. The mean also counts whatever else the machine ran on this CPU meanwhile."""
        return Sample(self.p50_ns * 1e-3, extra={"mean": self.mean_ns * 1e-3, "p99": self.p99_ns * 1e-3})


class _Plan(ctypes.Structure):
    """`struct threads_plan` of `bare/threads.h`."""

    _fields_ = (
        ("threads", ctypes.c_uint32),
        ("memories", ctypes.c_uint32),
        ("bases", ctypes.POINTER(ctypes.c_void_p)),
        ("pages", ctypes.c_uint64),
        ("page_size", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("cpus", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("log", ctypes.c_void_p),
    )


class _Finished(ctypes.Structure):
    """`struct threads_result` of `bare/threads.h`."""

    _fields_ = (("elapsed_ns", ctypes.c_uint64), ("checksum", ctypes.c_uint64))


def touch(
    library: str, address: int, pages: int, page_size: int, seed: int, *, write: bool = False
) -> Touched:
    """Touches each of `pages` pages once, in random order."""
    result = Touched()
    function = ctypes.CDLL(library).touch
    function.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p
    )  # fmt: skip
    if function(address, pages, page_size, seed, write, ctypes.byref(result)):
        raise MemoryError("no memory for the times of the faults")
    return result


def touch_by_threads(
    library: str,
    addresses: Sequence[int],
    threads: int,
    pages: int,
    page_size: int,
    seed: int,
    *,
    cpus: int = 0,
    log: Any = None,
) -> tuple[float, int]:
    """Reads each of `pages` pages of each memory once, by `threads` threads in all.

    Args:
        library: The compiled `bare/touch.c`.
        addresses: Where the memories begin.
        threads: A multiple of the number of memories.
        pages: Pages of one memory.
        page_size: Bytes of one.
        seed: What the order depends on.
        cpus: Thread i is pinned to CPU i modulo this; 0 pins none.
        log: An array of uint64 of shape (pages of all memories, 2) for beginning and end of each read, or None.

    Returns:
        Seconds from the common start to the end of the last thread, and the sum of the first words.
    """
    bases = (ctypes.c_void_p * len(addresses))(*addresses)
    plan = _Plan(
        threads=threads,
        memories=len(addresses),
        bases=bases,
        pages=pages,
        page_size=page_size,
        seed=seed,
        cpus=cpus,
        log=None if log is None else log.ctypes.data,
    )
    result = _Finished()
    if ctypes.CDLL(library).touch_threads(ctypes.byref(plan), ctypes.byref(result)):
        raise MemoryError("no memory for the threads")
    return result.elapsed_ns * 1e-9, int(result.checksum)


def counting(words: int) -> Any:
    """64-bit words that all differ."""
    import numpy as np

    return (np.arange(words, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)


def small_pages(nbytes: int) -> Any:
    """Anonymous memory in small pages, like the source of the bare programs, as 64-bit words.

    Not `np.empty`: NumPy asks for huge pages, which are faster to copy from.
    """
    import numpy as np

    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint64)


def numbered(pages: int, page_size: int = PAGE) -> tuple[Any, int]:
    """Memory whose pages begin with words that all differ, and the sum of those."""
    source = small_pages(pages * page_size)
    source[:: page_size // 8] = counting(pages)
    return source, int(source[:: page_size // 8].sum())


def check_sum(found: int, expected: int) -> None:
    if found != expected % 2**64:
        raise AssertionError("wrong bytes: checksum differs")


def fastest(samples: Sequence[float]) -> Sample:
    """The best of several short runs, since whatever else runs on the CPUs only slows down; and their median."""
    return Sample(max(samples), extra={"median": statistics.median(samples)})
