"""Direct delivery: faults that the faulting thread resolves itself, in the handler of SIGBUS; and many threads.

Rows on several threads give the best of some short runs: what other programs do meanwhile can only slow them down.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks import native, touching
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_least, at_most
from benchmarks.touching import PAGE

NOT_SLOWER = at_least(0.98)  # two runs of the same thing differ by as much
RUNS = 5


def comparisons(scale: Scale) -> Iterator[Comparison]:
    pages = 1024 if scale.quick else 16384
    touch = str(native.build("touch", scale.data, shared=True))
    yield _random_page(scale, pages, touch)
    yield _two_memories(scale, pages // 4, touch)  # short runs, of which the best counts
    sigbus = str(native.build("sigbus", scale.data))
    bare = [
        Reference(f"bare-{name}", _bare(sigbus, pages, threads, "one"))
        for name, threads in (("sixteen", 16), ("four", 4))
    ]
    for delivery in ("direct", "thread"):
        arguments = {"delivery": delivery, "memories": 1, "pages": pages, "library": touch}
        yield Comparison(
            name=f"threads-{delivery}",
            unit="faults/µs",
            ours=Side("benchmarks.delivery:throughput", {**arguments, "threads": 16}),
            references=(
                Reference(
                    "four", Side("benchmarks.delivery:throughput", {**arguments, "threads": 4}), NOT_SLOWER
                ),
                Reference("one", Side("benchmarks.delivery:throughput", {**arguments, "threads": 1})),
                *(bare if delivery == "direct" else ()),
            ),
            source=f"memory source, {pages} random faults of one page of {PAGE} bytes by sixteen threads on one memory "
            f"against fewer, delivery {delivery!r}; best of {RUNS} runs",
            rounds=2,
        )


def _bare(sigbus: str, pages: int, threads: int, *share: str) -> Side:
    command = [sigbus, str(pages), "{seed}", str(threads), *share]
    return Side("benchmarks.delivery:bare_throughput", {"command": command})


def _random_page(scale: Scale, pages: int, touch: str) -> Comparison:
    handler, sigbus = (str(native.build(name, scale.data)) for name in ("faults", "sigbus"))

    def bare(*command: str) -> Side:
        return Side("benchmarks.faults:bare", {"command": command, "scale_by": 1e-3})

    references = [
        Reference("bare-sigbus", bare(sigbus, str(pages), "{seed}"), at_most(1.15)),
        # 1.4 times faster.
        Reference("bare-thread", bare(handler, str(pages), "{seed}", "read"), at_most(0.714)),
    ]
    if len(os.sched_getaffinity(0)) > 1:
        elsewhere = bare(handler, str(pages), "{seed}", "read", "elsewhere")
        # 8 times faster.
        references.append(
            Reference("bare-elsewhere", elsewhere, at_most(0.125), "its handler on another CPU")
        )
    return Comparison(
        name="random-page",
        unit="µs/fault",
        ours=Side(
            "benchmarks.faults:random_faults", {"pages": pages, "library": touch, "delivery": "direct"}
        ),
        references=tuple(references),
        source=f"memory source, {pages} random faults of one page of {PAGE} bytes, direct delivery; medians",
        one_cpu=True,
        rounds=3,
    )


def _two_memories(scale: Scale, pages: int, touch: str) -> Comparison:
    arguments = {"delivery": "direct", "pages": pages, "library": touch, "pinned": True}
    sigbus = str(native.build("sigbus", scale.data))

    return Comparison(
        name="two-memories",
        unit="faults/µs",
        ours=Side("benchmarks.delivery:throughput", {**arguments, "threads": 2, "memories": 2}),
        references=(
            Reference(
                "one-memory",
                Side("benchmarks.delivery:throughput", {**arguments, "threads": 1, "memories": 1}),
                at_least(1.7),
            ),
            Reference("bare-two", _bare(sigbus, pages, 2)),
            Reference("bare-one", _bare(sigbus, pages, 1)),
        ),
        source=f"memory source, {pages} random faults of one page of {PAGE} bytes by each of two threads, each on a "
        f"memory of its own, direct delivery; best of {RUNS} runs",
        rounds=2,
        placement="each thread on a CPU of its own",
    )


@contextmanager
def throughput(
    delivery: Any, threads: int, memories: int, pages: int, library: str, pinned: bool = False
) -> Iterator[Measure]:
    """Faults per µs of all threads together."""
    import userfault

    source, expected = touching.numbered(pages)

    def once(seed: int) -> float:
        with ExitStack() as stack:
            addresses = []
            for _ in range(memories):
                array = userfault.open(source, block=PAGE, memory=2 * pages * PAGE, delivery=delivery)
                stack.enter_context(userfault.memory_of(array)).advise("random")
                addresses.append(array.ctypes.data)
                del array
            cpus = (os.cpu_count() or 1) if pinned else 0
            elapsed, found = touching.touch_by_threads(
                library, addresses, threads, pages, PAGE, seed, cpus=cpus
            )
        touching.check_sum(found, expected * memories)
        return pages * memories / elapsed * 1e-6

    def measure(repetition: int) -> Sample:
        return touching.fastest([once(repetition * RUNS + run) for run in range(RUNS)])

    yield measure


@contextmanager
def bare_throughput(command: list[str]) -> Iterator[Measure]:
    """The same of the bare program."""
    from benchmarks.faults import bare

    with bare(command, 1.0) as once:

        def measure(repetition: int) -> Sample:
            return touching.fastest([once(repetition * RUNS + run).value for run in range(RUNS)])

        yield measure
