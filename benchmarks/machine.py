"""What the figures were measured on. No host names and no paths: tables get pasted into reports."""

import importlib.metadata
import mmap
import os
import platform
import time
from pathlib import Path

PACKAGES = ("userfault", "numpy", "zarr", "numcodecs", "tensorstore", "fsspec")


def facts() -> dict[str, str]:
    """Machine, kernel, page size and versions, for the head of the table."""
    from userfault.kernel import probe

    report = probe()
    return {
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} CPUs",
        "memory": f"{report.physical_memory / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "userfaultfd": f"{report.access} faults, opened by {report.opened_by}",
        "page size": f"{report.page_size} bytes",
        "huge pages": report.huge_pages or "none",
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def touch_free_memory(nbytes: int) -> None:
    """Writes to `nbytes` of fresh memory and gives it back.

    The memory of a virtual machine that was never used is not there yet: the first touch of each page goes to
    the host and costs more than anything measured here (seen: 0.4 instead of 4 GB/s). What was just
    given back is reused first.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for offset in range(0, nbytes, mmap.PAGESIZE):
            memory[offset] = 1


class ForeignLoad:
    """How many CPUs programs other than this one and its (ended) children keep busy, from here on."""

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    def cpus(self) -> float:
        elapsed = time.monotonic() - self._start
        return max(0.0, (_busy_s() - self._busy) - (_own_s() - self._own)) / elapsed


def _busy_s() -> float:
    """CPU seconds of the whole machine since it started, without idle and I/O wait."""
    user, nice, system, _idle, _iowait, *interrupts = (
        Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def available_memory() -> int:
    """Bytes that could be used without swapping, by `/proc/meminfo`."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def can_move() -> bool:
    """Whether the kernel has UFFDIO_MOVE (6.8)."""
    from userfault.kernel import probe
    from userfault.kernel.abi import Feature

    return Feature.MOVE in probe().features


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
