"""Write tracking: against the same calls in C, against the ways that came before, and its share of a program's time."""

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import machine, native
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
MIB = 1 << 20
ROUNDS = 9  # intervals of one repetition; their median counts
# Every how many pages one is written; 0 for none.
DENSITIES = {"none": 0, "sparse": 64, "alternate": 2, "all": 1}
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
SOFT_DIRTY = 1 << 55  # of an entry of pagemap


def comparisons(scale: Scale) -> Iterator[Comparison]:
    lacks = _lacks()
    library = "" if lacks else str(native.build("writes", scale.data, shared=True))
    nbytes = (16 if scale.quick else 1024) * MIB
    words = f"{nbytes // MIB} MiB of anonymous memory, all there, pages of {PAGE} bytes"
    for name, factory, unit in (("arm", "arm", "ms"), ("touch", "touch", "ns/page")):
        arguments = {"nbytes": nbytes, "library": library}
        yield Comparison(
            name=name,
            unit=unit,
            ours=Side(f"benchmarks.tracking:{factory}", arguments),
            references=(
                Reference("bare-calls", Side(f"benchmarks.tracking:bare_{factory}", arguments), at_most(1.2)),
            ),
            source={
                "arm": f"track_writes(...).start(), {words}; bare: register, PAGEMAP_SCAN that protects; medians",
                "touch": f"the first write of each page while it is tracked, {words}; medians",
            }[name],
            one_cpu=True,
            rounds=2,
            not_run=lacks,
        )
    for name, every in DENSITIES.items():
        arguments = {"nbytes": nbytes, "every": every, "library": library}
        yield Comparison(
            name=f"take-{name}",
            unit="ms/take",
            ours=Side("benchmarks.tracking:takes", arguments),
            references=(
                Reference("bare-calls", Side("benchmarks.tracking:bare_takes", arguments), at_most(1.2)),
            ),
            source=f"take() of track_writes, {words}, {name} written; bare: PAGEMAP_SCAN that protects; medians",
            one_cpu=True,
            rounds=2,
            not_run=lacks,
        )
    for name in ("scattered", "contiguous"):
        yield from _intervals(name, nbytes, library, words, lacks)
    yield from _passes(scale, lacks)


def _intervals(name: str, nbytes: int, library: str, words: str, lacks: str) -> Iterator[Comparison]:
    def side(by: str) -> Side:
        return Side(
            "benchmarks.tracking:intervals", {"nbytes": nbytes, "where": name, "by": by, "library": library}
        )

    yield Comparison(
        name=f"interval-{name}",
        unit="ms",
        ours=side("userfault"),
        references=tuple(
            Reference(by, side(by)) for by in ("mprotect-sigsegv", "fork-and-compare", "untracked")
        ),
        source=f"1 % of the pages written, {name}, and which asked, {words}; medians",
        one_cpu=True,
        not_run=lacks,
    )
    yield Comparison(
        name=f"interval-{name}",
        unit="ms",
        ours=side("userfault"),
        references=(Reference("soft-dirty", side("soft-dirty")),),
        source=f"1 % of the pages written, {name}, and which asked, {words}; medians",
        one_cpu=True,
        not_run=lacks
        or ("" if _has_soft_dirty() else "soft-dirty bits (a kernel with CONFIG_MEM_SOFT_DIRTY)"),
    )


def _passes(scale: Scale, lacks: str) -> Iterator[Comparison]:
    # Both sides have the memory at the same time, and something is to be left for others.
    nbytes = 16 * MIB if scale.quick else 4096 * MIB
    while nbytes > 16 * MIB and 3 * nbytes > machine.available_memory():
        nbytes //= 2
    for pages, words, bound in (
        ("small", f"pages of {PAGE} bytes", None),
        ("transparent", "transparent huge pages", None),
        ("huge", f"pages of {HUGE} bytes (hugetlb)", 1.02),
    ):
        arguments = {"nbytes": nbytes, "pages": pages}
        needs = "root, to reserve huge pages" if pages == "huge" and not os.access(POOL, os.W_OK) else ""
        yield Comparison(
            name=f"pass-{pages}",
            unit="ms/pass",
            ours=Side("benchmarks.tracking:passes", {**arguments, "tracked": True}),
            references=(
                Reference(
                    "untracked",
                    Side("benchmarks.tracking:passes", {**arguments, "tracked": False}),
                    None if bound is None else at_most(bound),
                ),
            ),
            source=f"a pass over {nbytes // MIB} MiB in {words}: all summed, 1 % written in one piece, take();"
            " processor's time, medians",
            one_cpu=True,
            rounds=2,
            not_run=lacks or needs,
        )


def _lacks() -> str:
    from userfault.kernel import probe
    from userfault.kernel.abi import Feature

    return "" if Feature.WP_ASYNC in probe().features else "WP_ASYNC and PAGEMAP_SCAN (Linux 6.7)"


def _has_soft_dirty() -> bool:
    from userfault.kernel import Mapping, pagemap

    with Mapping.anonymous(PAGE) as memory:
        memory.write(0, b"x")  # a new page is dirty where the kernel has such a bit
        return bool(int(pagemap.entries(memory)[0]) & SOFT_DIRTY)


@contextmanager
def _memory(nbytes: int, pages: str = "small") -> Iterator["NDArray[np.uint8]"]:
    """Anonymous memory, all of it there."""
    import numpy as np

    from userfault.kernel import Mapping
    from userfault.kernel.mapping import Advice

    with ExitStack() as stack:
        if pages == "huge":
            stack.enter_context(_reserved(nbytes // HUGE))
            mapping = Mapping.anonymous(nbytes, huge_page_size=HUGE)
        else:
            mapping = Mapping.anonymous(nbytes, align=HUGE)
            mapping.madvise(Advice.NOHUGEPAGE if pages == "small" else Advice.HUGEPAGE)
        array = np.frombuffer(mapping.view(), np.uint8)
        array[::PAGE] = 1
        yield array


@contextmanager
def _reserved(count: int) -> Iterator[None]:
    before = int(POOL.read_text())
    POOL.write_text(str(before + count))
    try:
        if int(POOL.read_text()) < before + count:
            raise OSError(f"{count} huge pages cannot be had")
        yield
    finally:
        POOL.write_text(str(int(POOL.read_text()) - count))


def _library(path: str) -> Any:
    library = ctypes.CDLL(path)
    number, address, took = ctypes.c_uint64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_double)
    for name, arguments, result in (
        ("arm", (ctypes.c_int, number, number, took), ctypes.c_int),
        ("take", (ctypes.c_int, number, number, address, number, took), ctypes.c_int64),
        ("write_pages", (address, number, number, number, ctypes.c_int), ctypes.c_double),
        ("trap_arm", (address, number, number), ctypes.c_int),
        ("trap_take", (), ctypes.c_int64),
        ("soft_take", (ctypes.c_int, number, number, number), ctypes.c_int64),
        ("fork_take", (address, number, number), ctypes.c_int64),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


@contextmanager
def _bare(array: "NDArray[np.uint8]", library: Any) -> Iterator[Callable[[], tuple[int, float]]]:
    """Track with the bare calls; gives a function that returns the bytes written and the nanoseconds it took."""
    start, nbytes, took = array.ctypes.data, array.nbytes, ctypes.c_double()
    regions = nbytes // PAGE + 1
    vector = ctypes.create_string_buffer(24 * regions)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    uffd = library.arm(pagemap, start, nbytes, took)

    def take() -> tuple[int, float]:
        found = library.take(pagemap, start, nbytes, vector, regions, took)
        if found < 0:
            raise OSError("PAGEMAP_SCAN failed")
        return found, took.value

    try:
        yield take
    finally:
        os.close(uffd)
        os.close(pagemap)


def _median(measure: Callable[[int], float]) -> float:
    return statistics.median(measure(number) for number in range(ROUNDS))


@contextmanager
def arm(nbytes: int, library: str) -> Iterator[Measure]:
    from userfault.track import track_writes

    with _memory(nbytes) as array:

        def once(_: int) -> float:
            began = time.perf_counter_ns()
            tracker = track_writes(array).start()
            took = time.perf_counter_ns() - began
            tracker.stop()
            return took * 1e-6

        yield lambda _: Sample(_median(once))


@contextmanager
def bare_arm(nbytes: int, library: str) -> Iterator[Measure]:
    loaded = _library(library)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        with _memory(nbytes) as array:

            def once(_: int) -> float:
                took = ctypes.c_double()
                os.close(loaded.arm(pagemap, array.ctypes.data, nbytes, took))
                return took.value * 1e-6

            yield lambda _: Sample(_median(once))
    finally:
        os.close(pagemap)


@contextmanager
def touch(nbytes: int, library: str) -> Iterator[Measure]:
    from userfault.track import track_writes

    write = _library(library).write_pages
    with _memory(nbytes) as array, track_writes(array) as tracker:

        def once(number: int) -> float:
            tracker.take()
            took: float = write(array.ctypes.data, nbytes, PAGE, 1, number)
            return took / (nbytes // PAGE)

        yield lambda _: Sample(_median(once))


@contextmanager
def bare_touch(nbytes: int, library: str) -> Iterator[Measure]:
    loaded = _library(library)
    with _memory(nbytes) as array, _bare(array, loaded) as take:

        def once(number: int) -> float:
            take()
            took: float = loaded.write_pages(array.ctypes.data, nbytes, PAGE, 1, number)
            return took / (nbytes // PAGE)

        yield lambda _: Sample(_median(once))


@contextmanager
def takes(nbytes: int, every: int, library: str) -> Iterator[Measure]:
    from userfault.track import track_writes

    write = _library(library).write_pages
    with _memory(nbytes) as array, track_writes(array) as tracker:

        def measure(repetition: int) -> Sample:
            times = []
            for number in range(ROUNDS):
                if every:
                    write(array.ctypes.data, nbytes, PAGE, every, number)
                began = time.perf_counter_ns()
                found = tracker.take()
                times.append(time.perf_counter_ns() - began)
            return Sample(statistics.median(times) * 1e-6, check=found.nbytes["0"])

        yield measure


@contextmanager
def bare_takes(nbytes: int, every: int, library: str) -> Iterator[Measure]:
    loaded = _library(library)
    with _memory(nbytes) as array, _bare(array, loaded) as take:

        def measure(repetition: int) -> Sample:
            times = []
            for number in range(ROUNDS):
                if every:
                    loaded.write_pages(array.ctypes.data, nbytes, PAGE, every, number)
                found, took = take()
                times.append(took)
            return Sample(statistics.median(times) * 1e-6, check=found)

        yield measure


@contextmanager
def _tracked(by: str, array: "NDArray[np.uint8]", library: Any) -> Iterator[Callable[[], int]]:
    """Track in one of the ways; gives a function that returns the bytes written, and begins anew."""
    from userfault.track import track_writes

    start, nbytes = array.ctypes.data, array.nbytes
    if by == "userfault":
        with track_writes(array) as tracker:
            yield lambda: tracker.take().nbytes["0"]
    elif by == "mprotect-sigsegv":
        if library.trap_arm(start, nbytes, PAGE):
            raise OSError("mprotect failed")
        yield library.trap_take
        library.trap_end()
    elif by == "fork-and-compare":
        if library.fork_arm():
            raise OSError("fork failed")
        yield lambda: library.fork_take(start, nbytes, PAGE)
        library.fork_end()
    elif by == "soft-dirty":
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        if library.soft_arm():
            raise OSError("no soft-dirty bits")
        yield lambda: library.soft_take(pagemap, start, nbytes, PAGE)
        os.close(pagemap)
    else:
        yield lambda: nbytes // PAGE // 100 * PAGE


@contextmanager
def intervals(nbytes: int, where: str, by: str, library: str) -> Iterator[Measure]:
    """Write one page in a hundred, and ask which."""
    import numpy as np

    count = nbytes // PAGE // 100
    chance = np.random.default_rng(7)
    chosen = chance.permutation(nbytes // PAGE)[:count] if where == "scattered" else np.arange(count) + 100
    offsets = chosen * PAGE
    with _memory(nbytes) as array, _tracked(by, array, _library(library)) as take:

        def measure(repetition: int) -> Sample:
            times = []
            for number in range(ROUNDS):
                began = time.perf_counter_ns()
                array[offsets] = number + 100 * (repetition % 2)
                found = take()
                times.append(time.perf_counter_ns() - began)
            return Sample(statistics.median(times) * 1e-6, check=found)

        yield measure


@contextmanager
def passes(nbytes: int, pages: str, tracked: bool) -> Iterator[Measure]:
    """What a program does with its array: read all of it, and write a part, another one each time."""
    import numpy as np

    from userfault.track import track_writes

    with _memory(nbytes, pages) as array, ExitStack() as stack:
        words = array.view(np.uint64)
        part = -(-len(words) // 100 // (HUGE // 8)) * (HUGE // 8)
        tracker = stack.enter_context(track_writes(array)) if tracked else None
        turn = 0

        def once(_: int) -> float:
            nonlocal turn
            turn += 1
            first = turn * part % (len(words) - part) // (HUGE // 8) * (HUGE // 8)
            began = time.thread_time_ns()  # of the processor: what else runs here is no matter
            words.sum()
            words[first : first + part] = turn
            if tracker is not None:
                tracker.take()
            return (time.thread_time_ns() - began) * 1e-6

        yield lambda _: Sample(statistics.median(once(number) for number in range(3)))
