"""From nothing to the first element of a 20 GiB Zarr array: in a fresh process, and in one that is warm."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import data
from benchmarks.child import Measure, Sample
from benchmarks.harness import Comparison, Reference, Scale, Side, at_most

USERFAULT = "import userfault; print(float(userfault.open({path!r})[{index}]), flush=True)"
ZARR = "import zarr; print(float(zarr.open_array({path!r}, mode='r')[{index}]), flush=True)"


def comparisons(scale: Scale) -> Iterator[Comparison]:
    path = str(data.zarr_huge(scale.data))
    source = "zstd Zarr v3, 20 GiB logical (sparse), chunks of (1, 512, 512) float32"
    yield Comparison(
        name="cold-process",
        unit="ms",
        ours=Side("benchmarks.startup:cold", {"program": USERFAULT, "path": path}),
        references=(
            Reference("zarr", Side("benchmarks.startup:cold", {"program": ZARR, "path": path}), at_most(1.5)),
        ),
        source=f"{source}; from starting the interpreter to the printed element",
    )
    opens = 3 if scale.quick else 20
    yield Comparison(
        name="warm",
        unit="ms",
        ours=Side("benchmarks.startup:warm_userfault", {"path": path, "opens": opens}),
        references=(
            Reference(
                "zarr", Side("benchmarks.startup:warm_zarr", {"path": path, "opens": opens}), at_most(3.0)
            ),
        ),
        source=f"{source}; open and one element, in a process whose pager and worker run already",
    )


@contextmanager
def cold(program: str, path: str) -> Iterator[Measure]:
    """Until the line is there, not until the interpreter has put itself away."""

    def measure(repetition: int) -> Sample:
        code = program.format(path=path, index=_index(repetition))
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            elapsed = time.perf_counter() - start
        if not line:
            raise RuntimeError(f"the process ended with status {child.returncode} before the first element")
        return Sample(elapsed * 1e3, check=float(line))

    yield measure


@contextmanager
def warm_userfault(path: str, opens: int) -> Iterator[Measure]:
    import userfault

    keep = userfault.open(path)
    float(keep[_index(0)])

    def open_one(index: tuple[int, ...]) -> tuple[float, Any]:
        array = userfault.open(path)
        return float(array[index]), userfault.memory_of(array)

    yield _opens(open_one, opens)
    del keep


@contextmanager
def warm_zarr(path: str, opens: int) -> Iterator[Measure]:
    import zarr

    def open_one(index: tuple[int, ...]) -> tuple[float, Any]:
        element: Any = zarr.open_array(path, mode="r")[index]
        return float(element), None

    yield _opens(open_one, opens)


def _opens(open_one: Any, opens: int) -> Measure:
    """Median of several opens; closing is not counted."""

    def measure(repetition: int) -> Sample:
        times = []
        total = 0.0
        for number in range(opens):
            index = _index(repetition * opens + number)
            start = time.perf_counter()
            value, memory = open_one(index)
            times.append(time.perf_counter() - start)
            total += value
            if memory is not None:
                memory.close()
        return Sample(sorted(times)[opens // 2] * 1e3, check=total)

    return measure


def _index(number: int) -> tuple[int, int, int]:
    """An element of the chunks that exist."""
    return number % 8, 37 * number % 512, 101 * number % 512
