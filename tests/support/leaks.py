"""What a process holds: threads, file descriptors, children, fault-serving mappings, temporary files."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SETTLE_S = 10.0

# Threads of other libraries that live as long as the process, by the start of their names. Ours are
# never among them.
PYTHON_POOLS = (
    "zarr_io",  # zarr's event loop
    "zarr_pool",  # zarr's codec threads, started one by one as needed
    "asyncio_",  # an event loop's default executor, likewise
    "fsspecIO",  # fsspec's event loop
    "HypothesisThread",
    "tqdm_monitor",
    "rich",
)
NATIVE_POOLS = (
    "tokio-rt-worker",  # obstore, icechunk
    "tokio-runtime-w",
    "ts_",  # tensorstore
    "grpc",
    "jemalloc",
    "OMP",
)
# Libraries that start such threads, with descriptors for them, when first used: in the one test that first
# loads them, growth of what cannot be told from theirs is let pass (see `Holdings.growth`).
POOL_LIBRARIES = (
    "zarr",
    "fsspec",
    "obstore",
    "icechunk",
    "tensorstore",
    "numpy",
    "scipy",
    "torch",
    "pyarrow",
    "h5py",
    "moto",
    "aiohttp",
)
# Processes that Python itself keeps for its own use until it ends.
KEPT_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
USERFAULTFD = "anon_inode:[userfaultfd]"
# Opened once and kept by each of the two extension modules that hold a copy of the engine: a forked child that has
# dropped its privileges makes its userfaultfds from it (engine/host.c).
KEPT_DESCRIPTORS = ("/dev/userfaultfd",)
# Descriptors that an event loop or a native thread pool has; any other kind (a file, a userfaultfd, a pidfd)
# is always a leak.
LOOP_DESCRIPTORS = (
    "anon_inode:[eventpoll]",
    "anon_inode:[eventfd]",
    "anon_inode:[timerfd]",
    "socket:",
    "pipe:",
)


@dataclass(frozen=True)
class Holdings:
    """What this process holds at one moment."""

    threads: dict[int, str]
    descriptors: dict[int, str]
    children: dict[int, str]
    mappings: dict[str, str]
    files: dict[str, str]
    libraries: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        """Look at this process."""
        descriptors, children = _descriptors(), _children()
        # A registration ends with the last descriptor of its userfaultfd, which only these can hold.
        registered = USERFAULTFD in descriptors.values() or any(
            not any(kept in command for kept in KEPT_PROCESSES) for command in children.values()
        )
        return cls(
            _threads(),
            descriptors,
            children,
            _mappings() if registered else _shared_memory(),
            _files(),
            frozenset(name for name in POOL_LIBRARIES if name in sys.modules),
        )

    def growth(self, before: Holdings) -> list[str]:
        """Return a line for each thing that is here and was not `before`."""
        first_use = bool(self.libraries - before.libraries)
        lines = []
        for tid, name in self.threads.items():
            if tid in before.threads or name.startswith((*PYTHON_POOLS, *NATIVE_POOLS)):
                continue
            if first_use and not name.startswith("uf-"):
                continue
            lines.append(f"thread {tid} {name!r}")
        for fd, target in self.descriptors.items():
            if before.descriptors.get(fd) == target or (first_use and target.startswith(LOOP_DESCRIPTORS)):
                continue
            if target in KEPT_DESCRIPTORS and list(self.descriptors.values()).count(target) <= 2:
                continue
            lines.append(f"descriptor {fd} -> {target}")
        for pid, command in self.children.items():
            if pid not in before.children and not any(kept in command for kept in KEPT_PROCESSES):
                lines.append(f"child process {pid} {command!r}")
        lines += [
            f"mapping {key} {value}" for key, value in self.mappings.items() if key not in before.mappings
        ]
        lines += [f"temporary file {name}" for name in self.files if name not in before.files]
        return lines


def leaks_since(before: Holdings, settle_s: float = SETTLE_S) -> list[str]:
    """Shut the default pager down, then wait until nothing is held that was not held `before`.

    Returns:
        What is still held after `settle_s` seconds; nothing if all of it went.
    """
    pager = sys.modules.get("userfault.pager")
    deadline = time.monotonic() + settle_s
    never = threading.Event()
    pause_s = 0.001
    while True:
        if pager is not None:
            pager.shutdown()
        lines = Holdings.now().growth(before)
        if not lines or time.monotonic() > deadline:
            return lines
        # No event tells of a native thread's end: look again, at growing intervals. Every further look collects
        # first: arrays in cycles may go late, and `shutdown` does nothing while one lives.
        never.wait(pause_s)
        pause_s = min(pause_s * 2, 0.1)
        gc.collect()


_warm: set[str] = set()


_forked: list[bool] = []
os.register_at_fork(after_in_parent=lambda: _forked.append(True))


def warm_up() -> None:
    """Start what loaded libraries start at first use and never end, before a test is measured."""
    if _forked and "numpy" in sys.modules:
        # OpenBLAS ends its threads before a fork, and starts them again when there is work for them.
        _forked.clear()
        square = sys.modules["numpy"].ones((512, 512))
        square @ square
    for name in {"zarr", "fsspec.asyn"} & set(sys.modules) - _warm:
        _warm.add(name)
        if name == "zarr":
            sys.modules[name].zeros((1,), store={}, dtype="u1")[:]
        else:
            sys.modules[name].get_loop()


def _threads() -> dict[int, str]:
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    threads = {}
    for task in Path("/proc/self/task").iterdir():
        tid = int(task.name)
        try:
            native = (task / "comm").read_text().rstrip()
        except OSError:
            continue  # it ended while we looked
        threads[tid] = python.get(tid, native)
    return threads


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
    return found


def _children() -> dict[int, str]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue
        for pid in pids:
            try:
                found[int(pid)] = (
                    Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
    return found


_REGISTERED = {"um", "uw", "ui", "ur"}


def _shared_memory() -> dict[str, str]:
    """The engine's shared memory, from a listing that costs little."""
    found = {}
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        if "userfault" in value and "memfd:" in value:
            found[key] = value
    return found


def _mappings() -> dict[str, str]:
    """Mappings registered with a userfaultfd (by their VmFlags), and the engine's shared memory."""
    found = {}
    # Thousands of lines, for which the kernel walks the page tables: cut into mappings, not into lines.
    first, *others = Path("/proc/self/smaps").read_text(errors="replace").split("\nVmFlags: ")
    head = first.partition("\n")[0]
    for text in others:
        flags, _, following = text.partition("\n")
        key, _, value = head.partition(" ")
        if "userfault" in value and "memfd:" in value:
            found[key] = value
        if not _REGISTERED.isdisjoint(flags.split()):
            found[key] = f"{value} registered with a userfaultfd"
        head = following.partition("\n")[0]
    return found


def _files() -> dict[str, str]:
    """Entries of the session's private temporary folder, but pytest's own, and shared memory of ours."""
    names = [
        os.path.join(tempfile.gettempdir(), name)
        for name in os.listdir(tempfile.gettempdir())
        if not name.startswith(("pytest-of-", "pymp-"))
    ]
    if os.path.isdir("/dev/shm"):
        names += [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if "userfault" in name]
    return dict.fromkeys(names, "")
