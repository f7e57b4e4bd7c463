"""Working-set replay: how long the first result of a second run takes, against a first run and against no replay.

The program is a look-up of scattered records in an array whose source answers late, as an object store does. It needs
a twentieth of the array, in an order that no readahead can guess.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most
from userfault.sources import PageSource

BLOCK = 64 * 1024
LATENCY_S = 0.005
"""What an object store takes to answer, within one data centre."""


class Late(PageSource):
    """Blocks that begin with their number, counted from 1, and take their time; 16 of them at once."""

    block = BLOCK
    concurrency = 16

    def __init__(self, blocks: int, latency_s: float) -> None:
        self._blocks = blocks
        self._latency_s = latency_s

    @property
    def nbytes(self) -> int:
        return self._blocks * self.block

    def read_into(self, offset: int, buffer: memoryview) -> None:
        time.sleep(self._latency_s)
        for at in range(0, len(buffer), self.block):
            number = (offset + at) // self.block + 1
            buffer[at : at + self.block] = number.to_bytes(8, "little").ljust(self.block, b"\0")


def comparisons(scale: Scale) -> Iterator[Comparison]:
    blocks = 1000 if scale.quick else 8000
    arguments = {"blocks": blocks, "latency_s": LATENCY_S}
    yield Comparison(
        name="first-result",
        unit="ms",
        ours=Side("benchmarks.replay:second_run", arguments),
        references=(
            # REAP's figure for virtual machines: 3.7 times as fast.
            Reference("no-replay", Side("benchmarks.replay:without", arguments), at_most(1 / 3.7)),
            Reference("cold-run", Side("benchmarks.replay:first_run", arguments), at_most(1 / 3.7)),
        ),
        source=f"{blocks // 20} records scattered over {blocks * BLOCK >> 20} MiB of a source that takes "
        f"{LATENCY_S * 1e3:g} ms to answer, 16 requests at once; from open() to the sum; cold-run: it is recorded",
    )


def _run(blocks: int, latency_s: float, **options: Any) -> tuple[Any, Any]:
    """The program: opens the array and adds up its records. The workers run already, as in a service."""
    import numpy as np

    import userfault

    array = userfault.open(
        Late(blocks, latency_s),
        dtype="<u8",
        shape=(blocks, BLOCK // 8),
        name="records",
        memory="1 GiB",
        **options,
    )
    wanted = np.random.default_rng(7).permutation(blocks)[: blocks // 20]
    return array, wanted


def _sum(array: Any, wanted: Any) -> float:
    total = 0
    for record in wanted.tolist():  # one depends on the other, as a walk through an index does
        total += int(array[record, 0])
    return float(total)


def _record(blocks: int, latency_s: float, path: str) -> float:
    from userfault.track import Recorder

    array, wanted = _run(blocks, latency_s)
    with Recorder([array], to=path):
        return _sum(array, wanted)


def _warm() -> Any:
    """An open memory keeps the workers running from one repetition to the next."""
    import userfault

    return userfault.open(Late(1, 0.0), dtype="<u8", shape=(1, BLOCK // 8))


@contextmanager
def second_run(blocks: int, latency_s: float) -> Iterator[Measure]:
    kept = _warm()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "first.uft")
        _record(blocks, latency_s, path)

        def measure(_repetition: int) -> Sample:
            start = time.perf_counter()
            array, wanted = _run(blocks, latency_s, replay=path)
            check = _sum(array, wanted)
            return Sample((time.perf_counter() - start) * 1e3, check)

        yield measure
    del kept


@contextmanager
def without(blocks: int, latency_s: float) -> Iterator[Measure]:
    kept = _warm()

    def measure(_repetition: int) -> Sample:
        start = time.perf_counter()
        check = _sum(*_run(blocks, latency_s))
        return Sample((time.perf_counter() - start) * 1e3, check)

    yield measure
    del kept


@contextmanager
def first_run(blocks: int, latency_s: float) -> Iterator[Measure]:
    kept = _warm()
    with tempfile.TemporaryDirectory() as folder:

        def measure(repetition: int) -> Sample:
            start = time.perf_counter()
            check = _record(blocks, latency_s, os.path.join(folder, f"{repetition}.uft"))
            return Sample((time.perf_counter() - start) * 1e3, check)

        yield measure
    del kept
