"""Memory that fills itself from anywhere, stays within a budget, and is a plain `numpy.ndarray`: Linux's userfaultfd.

```python
import userfault

a = userfault.open("climate.zarr/t2m", memory="256 MiB")
a[123_456, 40:60, 7].mean()
```

Names are loaded when they are first used: a worker process, or a program that only wants `userfault.kernel`, imports
neither NumPy nor the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from userfault._sigbus import rearm
    from userfault.arrays import empty, memory_of, open, zeros
    from userfault.errors import (
        BudgetError,
        ClosedError,
        ExportedError,
        FlushError,
        ForkedError,
        FormatError,
        InternalError,
        KernelError,
        MissingExtraError,
        ModeError,
        OptionError,
        PrivilegeError,
        RangeError,
        SourceError,
        SourceNotFoundError,
        SourcePickleError,
        TraceError,
        TrackError,
        TruncatedError,
        UnsupportedDtypeError,
        UntrackableError,
        UserfaultError,
        WorkerError,
        WriteFailure,
    )
    from userfault.memory import PagedMemory
    from userfault.pager import PagerStats, fault_thread, limit, pager_stats, shutdown
    from userfault.sources import ArraySource, PageSource, PageStore
    from userfault.stats import ErrorRecord, Histogram, MemoryStats

    __version__: str

__all__ = [
    "ArraySource",
    "BudgetError",
    "ClosedError",
    "ErrorRecord",
    "ExportedError",
    "FlushError",
    "ForkedError",
    "FormatError",
    "Histogram",
    "InternalError",
    "KernelError",
    "MemoryStats",
    "MissingExtraError",
    "ModeError",
    "OptionError",
    "PageSource",
    "PageStore",
    "PagedMemory",
    "PagerStats",
    "PrivilegeError",
    "RangeError",
    "SourceError",
    "SourceNotFoundError",
    "SourcePickleError",
    "TraceError",
    "TrackError",
    "TruncatedError",
    "UnsupportedDtypeError",
    "UntrackableError",
    "UserfaultError",
    "WorkerError",
    "WriteFailure",
    "__version__",
    "empty",
    "fault_thread",
    "limit",
    "memory_of",
    "open",
    "pager_stats",
    "rearm",
    "shutdown",
    "zeros",
]

_HOMES = {
    **dict.fromkeys(["empty", "memory_of", "open", "zeros"], "arrays"),
    **dict.fromkeys(["PagedMemory"], "memory"),
    **dict.fromkeys(["PagerStats", "fault_thread", "limit", "pager_stats", "shutdown"], "pager"),
    **dict.fromkeys(["rearm"], "_sigbus"),
    **dict.fromkeys(["ArraySource", "PageSource", "PageStore"], "sources"),
    **dict.fromkeys(["ErrorRecord", "Histogram", "MemoryStats"], "stats"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'userfault' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("userfault")
    value = getattr(importlib.import_module(f"userfault.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
