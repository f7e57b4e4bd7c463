"""Access tracking: dropping and scanning against the same calls in C, its price, and read-write protection."""

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks import native
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from userfault.track import AccessTracker, WriteTracker

PAGE = mmap.PAGESIZE
MIB = 1 << 20
ROUNDS = 7  # intervals of one repetition; their median counts
# Every how many pages one is touched; 0 for none. One in 64 is random-like: no two lie together.
DENSITIES = {"none": 0, "sparse": 64, "alternate": 2, "all": 1}


def comparisons(scale: Scale) -> Iterator[Comparison]:
    from userfault.track import methods

    needs = {method.name: method.needs for method in methods()}
    nbytes = (16 if scale.quick else 1024) * MIB
    library = "" if needs["drop"] else str(native.build("accesses", scale.data, shared=True))
    words = f"{nbytes // MIB} MiB of a memfd, all there, pages of {PAGE} bytes"
    bare = {"nbytes": nbytes, "library": library}
    yield Comparison(
        name="arm",
        unit="ms",
        ours=Side("benchmarks.tracking_accesses:start", {"nbytes": nbytes}),
        references=(
            Reference("bare-calls", Side("benchmarks.tracking_accesses:bare_arm", bare), at_most(1.2)),
        ),
        source=f"track_accesses(...).start(), {words}; bare: register, MADV_DONTNEED, UFFDIO_WRITEPROTECT; medians",
        one_cpu=True,
        not_run=needs["drop"],
    )
    for name, every in DENSITIES.items():
        yield Comparison(
            name=f"take-{name}",
            unit="ms/take",
            ours=Side("benchmarks.tracking_accesses:takes", {"nbytes": nbytes, "every": every}),
            references=(
                Reference(
                    "bare-calls",
                    Side("benchmarks.tracking_accesses:bare_takes", {**bare, "every": every}),
                    at_most(1.2),
                ),
            ),
            source=f"take() of track_accesses, {words}, {name} read; bare: PAGEMAP_SCAN, process_madvise for short "
            "ranges, madvise for long ones; medians",
            one_cpu=True,
            rounds=2,
            not_run=needs["drop"],
        )
    for name in ("sparse", "alternate", "all"):
        arguments = {"nbytes": nbytes, "every": DENSITIES[name]}
        ours = {**arguments, "tracker": "drop"}
        yield Comparison(
            name=f"interval-{name}",
            unit="ms",
            ours=Side("benchmarks.tracking_accesses:intervals", ours),
            references=tuple(
                Reference(
                    label, Side("benchmarks.tracking_accesses:intervals", {**arguments, "tracker": tracker})
                )
                for label, tracker in (("writes-only", "writes"), ("untracked", ""))
            ),
            source=f"{words}, {name} written, and take(); track_writes, and no tracker, of the same; medians",
            one_cpu=True,
            not_run=needs["drop"],
        )
        yield Comparison(
            name=f"rwp-interval-{name}",
            unit="ms",
            ours=Side("benchmarks.tracking_accesses:intervals", {**arguments, "tracker": "rwp-async"}),
            references=(Reference("drop", Side("benchmarks.tracking_accesses:intervals", ours)),),
            source=f"{words}, {name} written, and take(): by read-write protection, by dropping; medians",
            one_cpu=True,
            not_run=needs["rwp-async"],
        )


@contextmanager
def _memory(nbytes: int) -> Iterator["NDArray[np.uint8]"]:
    """Shared memory, all of it there, mapped in small pages.

    Anew for each repetition: how the pages lie in physical memory, which is luck, makes dropping them a third faster or
    slower.
    """
    import numpy as np

    from userfault.kernel import Mapping

    mapping = Mapping.memfd(nbytes, align=2 * MIB)
    array = np.frombuffer(mapping.view(), np.uint8)
    array[::PAGE] = 1
    yield array


def _read(array: "NDArray[np.uint8]", every: int) -> None:
    if every:
        array[:: every * PAGE].sum()


def _median_ms(times: list[float]) -> float:
    return statistics.median(times) * 1e-6


@contextmanager
def start(nbytes: int) -> Iterator[Measure]:
    from userfault.track import track_accesses

    def measure(repetition: int) -> Sample:
        times: list[float] = []
        with _memory(nbytes) as array:
            for _ in range(ROUNDS):
                _read(array, 1)
                began = time.perf_counter_ns()
                tracker = track_accesses(array, method="drop").start()
                times.append(time.perf_counter_ns() - began)
                tracker.stop()
        return Sample(_median_ms(times))

    yield measure


@contextmanager
def bare_arm(nbytes: int, library: str) -> Iterator[Measure]:
    arm = ctypes.CDLL(library).arm
    arm.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(ctypes.c_double))

    def measure(repetition: int) -> Sample:
        times, took = [], ctypes.c_double()
        with _memory(nbytes) as array:
            for _ in range(ROUNDS):
                _read(array, 1)
                os.close(arm(array.ctypes.data, nbytes, took))
                times.append(took.value)
        return Sample(_median_ms(times))

    yield measure


@contextmanager
def takes(nbytes: int, every: int) -> Iterator[Measure]:
    from userfault.track import track_accesses

    def measure(repetition: int) -> Sample:
        times: list[float] = []
        with _memory(nbytes) as array, track_accesses(array, method="drop") as tracker:
            for _ in range(ROUNDS):
                _read(array, every)
                began = time.perf_counter_ns()
                found = tracker.take()
                times.append(time.perf_counter_ns() - began)
        return Sample(_median_ms(times), check=found.nbytes["0"])

    yield measure


@contextmanager
def bare_takes(nbytes: int, every: int, library: str) -> Iterator[Measure]:
    loaded = ctypes.CDLL(library)
    number = ctypes.c_uint64
    loaded.arm.argtypes = (number, number, ctypes.POINTER(ctypes.c_double))
    loaded.take.argtypes = (
        ctypes.c_int, ctypes.c_int, number, number, ctypes.c_void_p, number, ctypes.POINTER(ctypes.c_double)
    )  # fmt: skip
    loaded.take.restype = ctypes.c_int64
    regions = nbytes // PAGE + 1
    vector = ctypes.create_string_buffer(24 * regions)
    pagemap, pidfd = os.open("/proc/self/pagemap", os.O_RDONLY), os.pidfd_open(os.getpid())
    took = ctypes.c_double()

    def measure(repetition: int) -> Sample:
        times, found = [], 0
        with _memory(nbytes) as array:
            uffd = loaded.arm(array.ctypes.data, nbytes, took)
            for _ in range(ROUNDS):
                _read(array, every)
                found = loaded.take(pagemap, pidfd, array.ctypes.data, nbytes, vector, regions, took)
                if found < 0:
                    raise OSError("PAGEMAP_SCAN or madvise failed")
                times.append(took.value)
            os.close(uffd)
        return Sample(_median_ms(times), check=found)

    try:
        yield measure
    finally:
        os.close(pagemap)
        os.close(pidfd)


@contextmanager
def intervals(nbytes: int, every: int, tracker: str) -> Iterator[Measure]:
    """Write some pages, and ask which."""
    from userfault.track import track_accesses, track_writes

    def measure(repetition: int) -> Sample:
        times: list[float] = []
        found = len(range(0, nbytes, every * PAGE)) * PAGE
        with _memory(nbytes) as array, ExitStack() as stack:
            used: AccessTracker | WriteTracker | None = None
            if tracker:
                used = track_writes(array) if tracker == "writes" else track_accesses(array, method=tracker)
                stack.enter_context(used)
            for number in range(ROUNDS):
                began = time.perf_counter_ns()
                array[:: every * PAGE] = number
                if used is not None:
                    touched: Any = used.take()
                    found = touched.nbytes["0"]
                times.append(time.perf_counter_ns() - began)
        return Sample(_median_ms(times), check=found)

    yield measure
