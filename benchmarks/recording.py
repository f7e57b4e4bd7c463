"""What a recorder costs that looks ten times a second, while the program goes over its memory.

The figure is the recorder's own share of a core; what its page faults cost the program is in the second line, as the
share of its speed that is left, and how often it looked within its budget.
"""

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks import native
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, figure_at_most
from benchmarks.machine import available_memory

if TYPE_CHECKING:
    from userfault.kernel import Mapping

PAGE = mmap.PAGESIZE
MIB = 1 << 20
EVERY = 0.1
BUDGET = 0.03
STEP = 0.01  # of the program: it goes over this share of 1 s in ...
SHARE = 0.1  # ... this share of the memory


def comparisons(scale: Scale) -> Iterator[Comparison]:
    if not _can_track():
        return
    most = available_memory() // 3 // MIB
    nbytes = (64 if scale.quick else min(4096, most)) * MIB
    seconds = 0.5 if scale.quick else 5.0
    library = str(native.build("scan", scale.data, shared=True))
    for name, what, huge in (
        ("writes-huge-pages", "writes", True),
        ("writes-small-pages", "writes", False),
        ("accesses", "accesses", False),
    ):
        arguments = {"nbytes": nbytes, "seconds": seconds, "huge": huge, "what": what}
        bare = Side("benchmarks.recording:bare_scans", {**arguments, "library": library})
        yield Comparison(
            name=name,
            unit="% of a core",
            ours=Side("benchmarks.recording:recorder", arguments),
            references=(Reference("bare-scans", bare, figure_at_most(3, "%") if huge else None),),
            source=f"{nbytes // MIB} MiB, {'transparent huge pages' if huge else f'pages of {PAGE} bytes'}, of which "
            f"{SHARE:.0%} are {'written' if what == 'writes' else 'read'} a second, in order; Recorder(what={what!r}, "
            f"every={EVERY}, budget={BUDGET}), against ten scans a second in C that reset nothing",
        )


def _can_track() -> bool:
    """Whether the kernel has WP_ASYNC and PAGEMAP_SCAN (both 6.7)."""
    from userfault.kernel import probe
    from userfault.kernel.abi import Feature

    return Feature.WP_ASYNC in probe().features


@contextmanager
def _memory(nbytes: int, huge: bool, what: str) -> Iterator["Mapping"]:
    from userfault.kernel import Mapping
    from userfault.kernel.mapping import Advice

    # Private memory for writes; for accesses of the kind that userfault.track.shared_array gives.
    made = Mapping.anonymous(nbytes, align=2 * MIB) if what == "writes" else Mapping.memfd(nbytes)
    with made as memory:
        if what == "writes":
            memory.madvise(Advice.HUGEPAGE if huge else Advice.NOHUGEPAGE)
        memory.madvise(Advice.POPULATE_WRITE)
        yield memory


def _program(memory: "Mapping", what: str, seconds: float) -> float:
    """Go over the memory piece by piece at a steady pace; return the seconds that its accesses took."""
    length = int(memory.length * SHARE * STEP) // PAGE * PAGE or PAGE
    buffer = ctypes.create_string_buffer(length)
    place, busy, end = 0, 0.0, time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        address = memory.address + place
        if what == "writes":
            ctypes.memset(address, 1, length)
        else:
            ctypes.memmove(buffer, address, length)
        spent = time.perf_counter() - now
        busy += spent
        place = (place + length) % (memory.length - length)
        time.sleep(max(0.0, STEP - spent))
    return busy


@contextmanager
def recorder(nbytes: int, seconds: float, huge: bool, what: str) -> Iterator[Measure]:
    from userfault.track import Recorder

    with _memory(nbytes, huge, what) as memory:

        def measure(repetition: int) -> Sample:
            with Recorder(memory=memory, every=EVERY, what=what, budget=BUDGET) as recording:
                before = recording.cost  # of arming it all, which is done once
                busy = _program(memory, what, seconds)
                cost = recording.cost
            lasted_ns = cost.wall_ns - before.wall_ns
            extra = {
                "looks/s": cost.samples / lasted_ns * 1e9,
                "program busy %": busy / seconds * 100,
                "faults/s": cost.traps / lasted_ns * 1e9,
                "arming ms": before.cpu_ns * 1e-6,
            }
            return Sample((cost.cpu_ns - before.cpu_ns) / lasted_ns * 100, extra=extra)

        yield measure


@contextmanager
def bare_scans(nbytes: int, seconds: float, huge: bool, what: str, library: str) -> Iterator[Measure]:
    from userfault.kernel import Feature, RegisterMode, Userfaultfd, pagemap

    scan = ctypes.CDLL(library).scan_written
    scan.argtypes = (
        ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int,
        ctypes.c_void_p,
    )  # fmt: skip
    scan.restype = ctypes.c_int64
    regions = nbytes // PAGE + 1
    vector = ctypes.create_string_buffer(24 * regions)
    took = (ctypes.c_double * 1)()
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        with Userfaultfd(Feature.WP_ASYNC) as uffd, _memory(nbytes, huge, what) as memory:
            uffd.register(memory, mode=RegisterMode.WP)

            def look() -> None:
                if scan(descriptor, memory.address, nbytes, vector, regions, 1, took) < 0:
                    raise OSError("PAGEMAP_SCAN failed")

            def measure(repetition: int) -> Sample:
                began = time.thread_time()
                pagemap.write_protect(memory)
                armed = time.thread_time() - began
                cpu_s, looks, busy = _beside(look, lambda: _program(memory, what, seconds))
                extra = {
                    "looks/s": looks / seconds,
                    "program busy %": busy / seconds * 100,
                    "faults/s": 0.0,
                    "arming ms": armed * 1e3,
                }
                return Sample(cpu_s / seconds * 100, extra=extra)

            yield measure
    finally:
        os.close(descriptor)


def _beside(look: Callable[[], None], program: Callable[[], float]) -> tuple[float, int, float]:
    """Run a program with a thread that looks; return the thread's CPU time, how often it looked, and the result."""
    end = threading.Event()
    spent: list[float] = [0.0]
    looks = 0

    def loop() -> None:
        nonlocal looks
        began = time.thread_time()
        while not end.wait(EVERY):
            look()
            looks += 1
        spent[0] = time.thread_time() - began

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        result = program()
    finally:
        end.set()
        thread.join()
    return spent[0], looks, result
