"""A handler process written with `userfault.kernel`, against the same in C."""

import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks import native, touching
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most

if TYPE_CHECKING:
    from userfault.kernel import Userfaultfd

PAGE = mmap.PAGESIZE
_GOLDEN = 0x9E3779B97F4A7C15


def comparison(scale: Scale) -> Comparison:
    pages = 1024 if scale.quick else 16384
    faults = str(native.build("faults", scale.data))
    touch = str(native.build("touch", scale.data, shared=True))

    def bare(wait: str) -> Side:
        command = (faults, str(pages), "{seed}", wait, "process")
        return Side("benchmarks.faults:bare", {"command": command, "scale_by": 1e-3})

    return Comparison(
        name="python-handler",
        unit="µs/fault",
        ours=Side("benchmarks.handler:python_handler", {"pages": pages, "library": touch}),
        references=(
            Reference("bare-read", bare("read"), at_most(1.5)),
            Reference("bare-poll", bare("poll")),
        ),
        source=f"a forked handler process, {pages} random faults of one page of {PAGE} bytes; medians",
        one_cpu=True,
        rounds=3,
    )


def _serve(uffd: "Userfaultfd", start: int, source: int) -> None:
    """The loop that a user of the API would write."""
    delta = source - start
    while True:
        for event in uffd.read_events(timeout_s=None):
            uffd.copy(event.address, event.address + delta, PAGE)


@contextmanager
def python_handler(pages: int, library: str) -> Iterator[Measure]:
    """Touches every page once, in random order, by the same C loop as the bare program."""
    from userfault.kernel import Mapping, Userfaultfd

    words = [(index + 1) * _GOLDEN % 2**64 for index in range(pages)]
    expected = sum(words) % 2**64

    def measure(repetition: int) -> Sample:
        with (
            Mapping.anonymous(pages * PAGE) as source,
            Mapping.anonymous(pages * PAGE) as memory,
            Userfaultfd(nonblocking=False) as uffd,
        ):
            for index, word in enumerate(words):
                source.write(index * PAGE, word.to_bytes(8, "little"))
            uffd.register(memory)
            pid = os.fork()
            if pid == 0:
                _serve(uffd, memory.address, source.address)
            try:
                result = touching.touch(library, memory.address, pages, PAGE, repetition + 1)
            finally:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        touching.check_sum(result.checksum, expected)
        return result.sample()

    yield measure
