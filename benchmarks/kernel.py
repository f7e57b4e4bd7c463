"""`userfault.kernel` against the same in C: a scan of pages, and a handler process."""

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks import handler, native
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most

if TYPE_CHECKING:
    from userfault.kernel import Mapping

PAGE = mmap.PAGESIZE
MIB = 1 << 20
ROUNDS = 21  # scans of one repetition; their median counts
# Every how many pages one was written; 0 for none.
DENSITIES = {"none": 0, "alternate": 2, "all": 1}


def comparisons(scale: Scale) -> Iterator[Comparison]:
    yield handler.comparison(scale)
    if not _can_track():
        return
    nbytes = (16 if scale.quick else 1024) * MIB
    library = str(native.build("scan", scale.data, shared=True))
    for name, every in DENSITIES.items():
        arguments = {"nbytes": nbytes, "every": every}
        bare = Side("benchmarks.kernel:bare_scan", {**arguments, "library": library})
        yield Comparison(
            name=f"scan-{name}",
            unit="ms/scan",
            ours=Side("benchmarks.kernel:python_scan", arguments),
            references=(Reference("bare-ioctl", bare, at_most(1.1)),),
            source=f"pagemap.scan for written pages, {nbytes // MIB} MiB of anonymous memory, write-tracked, "
            f"pages of {PAGE} bytes, {name} written; medians",
            one_cpu=True,
            rounds=2,
        )


def _can_track() -> bool:
    """Whether the kernel has WP_ASYNC and PAGEMAP_SCAN (both 6.7)."""
    from userfault.kernel import probe
    from userfault.kernel.abi import Feature

    return Feature.WP_ASYNC in probe().features


@contextmanager
def _tracked(nbytes: int, every: int) -> Iterator["Mapping"]:
    """Memory in small pages, all present, of which every so many were written since tracking began."""
    from userfault.kernel import Feature, Mapping, RegisterMode, Userfaultfd, pagemap
    from userfault.kernel.mapping import Advice

    with Userfaultfd(Feature.WP_ASYNC) as uffd, Mapping.anonymous(nbytes, align=2 * MIB) as memory:
        memory.madvise(Advice.NOHUGEPAGE)
        memory.madvise(Advice.POPULATE_WRITE)
        uffd.register(memory, mode=RegisterMode.WP)
        pagemap.write_protect(memory)
        if every:
            with memory.view() as view:
                view[:: every * PAGE] = bytes(len(range(0, nbytes, every * PAGE)))
        yield memory


@contextmanager
def python_scan(nbytes: int, every: int) -> Iterator[Measure]:
    from userfault.kernel import pagemap

    with _tracked(nbytes, every) as memory:

        def measure(repetition: int) -> Sample:
            times = []
            for _ in range(ROUNDS):
                began = time.perf_counter_ns()
                found = pagemap.scan(memory, mask=pagemap.PageCategory.WRITTEN)
                times.append(time.perf_counter_ns() - began)
            return Sample(statistics.median(times) * 1e-6, check=found.pages * PAGE)

        yield measure


@contextmanager
def bare_scan(nbytes: int, every: int, library: str) -> Iterator[Measure]:
    scan = ctypes.CDLL(library).scan_written
    scan.argtypes = (
        ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int,
        ctypes.c_void_p,
    )  # fmt: skip
    scan.restype = ctypes.c_int64
    regions = nbytes // PAGE + 1
    vector = ctypes.create_string_buffer(24 * regions)
    times = (ctypes.c_double * ROUNDS)()
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        with _tracked(nbytes, every) as memory:

            def measure(repetition: int) -> Sample:
                found = scan(pagemap, memory.address, nbytes, vector, regions, ROUNDS, times)
                if found < 0:
                    raise OSError("PAGEMAP_SCAN failed")
                return Sample(statistics.median(times) * 1e-6, check=found)

            yield measure
    finally:
        os.close(pagemap)
