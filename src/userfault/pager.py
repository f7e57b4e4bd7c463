"""The process's pager: its budget, its workers, its end.

One pager serves all memories of a process. It is made when the first memory is, its threads and workers run while any
memory is open, and for a few seconds more.
"""

from __future__ import annotations

import errno
import os
import pickle
import sys
import threading
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, SupportsIndex

from userfault import _engine, options
from userfault._cgroups import memory_limit
from userfault.errors import (
    InternalError,
    KernelError,
    OptionError,
    PrivilegeError,
    SourceError,
    UserfaultError,
    WorkerError,
)
from userfault.sizes import parse_size
from userfault.sources._pickle import dumps

if TYPE_CHECKING:
    from userfault.sources._abc import Description, Recipe

__all__ = ["PagerStats", "default_limit", "fault_thread", "limit", "pager_stats", "shutdown"]

_SECOND = 1_000_000_000
_LINGER_NS = 5 * _SECOND
_READ_DEADLINE_NS = 60 * _SECOND
_LOAD_DEADLINE_NS = 300 * _SECOND
_ATTEMPTS = 4
_BACKOFF_NS = 50_000_000
_MOST_SPIN_US = 1000
_MOST_CPUS = 1 << 16  # more than the kernel has

_lock = threading.Lock()
_pager: _engine.Pager | None = None
_limit: int | None = None


@dataclass(frozen=True)
class PagerStats:
    """What the process's pager does.

    Attributes:
        limit: Bytes that all memories may keep resident together.
        resident_bytes: Bytes that they keep now.
        resident_peak: The most that they kept.
        reserved_bytes: Bytes of the limit that sources use for decoded chunks.
        memories: Open memories.
        workers_alive: Worker processes that run.
        workers_started: Worker processes started so far.
        workers_lost: Worker processes that ended unasked.
        requests: Reads that were given to workers.
        requests_reissued: Reads that were given again because their worker was lost.
        running: Whether the fault thread runs.
    """

    limit: int
    resident_bytes: int
    resident_peak: int
    reserved_bytes: int
    memories: int
    workers_alive: int
    workers_started: int
    workers_lost: int
    requests: int
    requests_reissued: int
    running: bool


def default_limit() -> int:
    """Return the budget of a process that sets none, in bytes: `USERFAULT_MEMORY`, or half of what there is.

    What there is is the RAM, or the memory limit of the control group (v2 or v1) that this process runs in.
    """
    return options.memory() or _available_memory() // 2


def _available_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return total if limit is None else min(total, limit)


def _worker_argv() -> list[bytes]:
    # Not `-m`: the package must be found where this process found it, whatever the worker's own sys.path is.
    code = f"import sys; sys.path[:] = {sys.path!r}; from userfault.workers._main import main; main()"
    return [os.fsencode(part) for part in (sys.executable, "-c", code)]


def get() -> _engine.Pager:
    """Return the process's pager, made on the first call."""
    global _pager
    with _lock:
        if _pager is None:
            _pager = _engine.Pager(
                limit=_limit if _limit is not None else default_limit(),
                workers=min(options.workers(), _engine.MAX_WORKERS),
                argv=_worker_argv(),
                env=[os.fsencode(f"{name}={value}") for name, value in os.environ.items()],
                linger_ns=_LINGER_NS,
                deadline_ns=_READ_DEADLINE_NS,
                attempts=_ATTEMPTS,
                backoff_ns=_BACKOFF_NS,
                scratch_dir=os.fsencode(options.scratch_dir()),
            )
        return _pager


def limit(size: SupportsIndex | str | None = None) -> int:
    """Set, or with no argument return, how many bytes all memories of this process may keep resident together.

    Args:
        size: Bytes, or text such as `"4 GiB"`. A smaller limit evicts at once.

    Returns:
        The limit in bytes that holds now.

    Raises:
        BudgetError: `size` is not a size.
    """
    global _limit
    if size is not None:
        nbytes = parse_size(size, what="limit")
        with _lock:
            _limit = nbytes
            if _pager is not None:
                _pager.set_limit(nbytes)
    if _limit is not None:
        return _limit
    return _pager.stats()["limit"] if _pager is not None else default_limit()


def fault_thread(*, cpu: SupportsIndex | None = None, spin_us: float = 0.0) -> None:
    """Choose where the thread that resolves faults runs, and how long it looks for the next fault before it sleeps.

    For arrays with `delivery="thread"` that are read by a thread which is pinned itself: a fault thread on the same CPU
    answers several times as fast as one on a CPU that must be woken first. Each call sets both; without arguments it is
    as at first. docs/performance.md has figures, and advice.

    Args:
        cpu: The number of a CPU; None: wherever the scheduler puts it.
        spin_us: Microseconds, 0 to 1000, for which it keeps its CPU busy after each fault, in case that another comes.

    Raises:
        OptionError: This process may not use that CPU, or `spin_us` is out of range.
    """
    number = -1 if cpu is None else index(cpu)
    if cpu is not None and number < 0:
        raise OptionError(f"cpu={number} is no CPU; give the number of one, from 0, or None for any")
    if not 0 <= spin_us <= _MOST_SPIN_US:
        raise OptionError(f"spin_us={spin_us!r} is not a time from 0 to {_MOST_SPIN_US} microseconds")
    try:
        get().tune(min(number, _MOST_CPUS), round(spin_us * 1000))
    except _engine.EngineError as error:
        if error.errno != errno.EINVAL:
            raise engine_error(error, "fault_thread") from None
        allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise OptionError(f"cpu={number}: this process may not use that CPU; it runs on {allowed}") from None


def shutdown() -> bool:
    """End the pager's idle threads and worker processes now, instead of a few seconds after the last memory was closed.

    Returns:
        Whether they ended: False if a memory is still open, or an array of one is still alive.
    """
    if _pager is None:
        return True
    try:
        _pager.shutdown()
    except _engine.EngineError as error:
        if error.errno == errno.EBUSY:
            return False
        raise engine_error(error, "shutdown") from None
    return True


def pager_stats() -> PagerStats:
    """Return the counters of the process's pager."""
    raw = get().stats()
    return PagerStats(
        limit=raw["limit"],
        resident_bytes=raw["resident"],
        resident_peak=raw["resident_peak"],
        reserved_bytes=raw["reserved"],
        memories=raw["memories"],
        workers_alive=raw["workers_alive"],
        workers_started=raw["workers_started"],
        workers_lost=raw["workers_lost"],
        requests=raw["requests"],
        requests_reissued=raw["requests_reissued"],
        running=bool(raw["running"]),
    )


def load(recipe: Recipe) -> tuple[int, Description]:
    """Send `recipe` to a worker, wait until it has loaded the source, and return the source's number and description.

    Raises:
        SourcePickleError: The recipe cannot be pickled.
        WorkerError: No worker could be started, or it died.
        Exception: Whatever `recipe.load()` raised in the worker.
    """
    if not sys.executable:
        raise WorkerError(
            "sys.executable is empty, so no worker process can be started for a source written in Python; an "
            "embedded interpreter must set it to a Python interpreter first"
        )
    # Absolute, since a worker keeps the working directory that it was started in.
    paths = pickle.dumps([os.path.abspath(path) for path in sys.path])
    blob = len(paths).to_bytes(8, "little") + paths + dumps(recipe)
    pager = get()
    try:
        source = pager.add_source(blob)
    except _engine.EngineError as error:
        raise engine_error(error, "a new source") from None
    try:
        reply, failed, _ = pager.load_source(source, _LOAD_DEADLINE_NS)
        answer = pickle.loads(reply)
        if failed and isinstance(answer, Exception):
            raise answer
        if failed:  # SystemExit and the like are the worker's affair: here they would end the program
            raise WorkerError(f"loading the source raised {type(answer).__name__}: {answer}")
        pager.configure_source(source, affinity=answer.affinity, cache=0)
    except _engine.EngineError as error:
        pager.drop_source(source)
        raise WorkerError(f"no worker process loaded the source: {error.message}") from None
    except BaseException:
        pager.drop_source(source)
        raise
    return source, answer


def engine_error(error: _engine.EngineError, what: str) -> UserfaultError:
    """Return the typed exception for an engine call about `what` that failed."""
    number, detail = error.errno, error.message or os.strerror(error.errno)
    if number in (errno.EPERM, errno.EACCES):
        return PrivilegeError(
            f"{what}: this user may not use userfaultfd ({detail}). Give it /dev/userfaultfd (chmod or an udev rule), "
            "or set vm.unprivileged_userfaultfd=1, or lift the container's seccomp rule; `userfault doctor` says which",
            call="userfaultfd",
            errno=number,
        )
    if number == errno.ENOSYS:
        return KernelError(
            f"{what}: this kernel has no userfaultfd (CONFIG_USERFAULTFD)", call="userfaultfd", errno=number
        )
    if number == errno.EDEADLK:
        return SourceError(
            f"{what}: the source's memory is itself paged memory, which the engine cannot read while it serves a "
            "fault; copy it first (numpy.array(a))",
            errno=number,
        )
    if number == errno.ENOMEM:
        return KernelError(
            f"{what}: the kernel has no address space or memory for it ({detail}); see vm.max_map_count, ulimit -v and "
            "vm.overcommit_memory",
            call="mmap",
            errno=number,
        )
    if number == errno.EOPNOTSUPP:
        return KernelError(
            f"{what}: this kernel's userfaultfd lacks what this needs ({detail}): write protection (Linux 5.7) for "
            "memory that can be written, UFFD_FEATURE_SIGBUS for delivery='direct'",
            call="UFFDIO_API",
            errno=number,
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return KernelError(f"{what}: no file descriptor is free ({detail}); see ulimit -n", errno=number)
    if number == errno.EAGAIN:
        return KernelError(f"{what}: no thread could be started ({detail}); see ulimit -u", errno=number)
    if number == errno.EINVAL:
        return InternalError(f"{what}: the engine refused its arguments ({detail})")
    return KernelError(f"{what}: {detail}", errno=number)
