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
    from userfault.arrays import memory_of, open
    from userfault.errors import (
        BudgetError,
        ClosedError,
        ExportedError,
        FormatError,
        InternalError,
        KernelError,
        MissingExtraError,
        ModeError,
        PrivilegeError,
        RangeError,
        SourceError,
        SourceNotFoundError,
        SourcePickleError,
        TruncatedError,
        UnsupportedDtypeError,
        UserfaultError,
        WorkerError,
    )
    from userfault.memory import PagedMemory
    from userfault.pager import PagerStats, limit, pager_stats, shutdown
    from userfault.sources import ArraySource, PageSource
    from userfault.stats import ErrorRecord, Histogram, MemoryStats

    __version__: str

__all__ = [
    "ArraySource",
    "BudgetError",
    "ClosedError",
    "ErrorRecord",
    "ExportedError",
    "FormatError",
    "Histogram",
    "InternalError",
    "KernelError",
    "MemoryStats",
    "MissingExtraError",
    "ModeError",
    "PageSource",
    "PagedMemory",
    "PagerStats",
    "PrivilegeError",
    "RangeError",
    "SourceError",
    "SourceNotFoundError",
    "SourcePickleError",
    "TruncatedError",
    "UnsupportedDtypeError",
    "UserfaultError",
    "WorkerError",
    "__version__",
    "limit",
    "memory_of",
    "open",
    "pager_stats",
    "shutdown",
]

_HOMES = {
    **dict.fromkeys(["open", "memory_of"], "arrays"),
    **dict.fromkeys(["PagedMemory"], "memory"),
    **dict.fromkeys(["PagerStats", "limit", "pager_stats", "shutdown"], "pager"),
    **dict.fromkeys(["ArraySource", "PageSource"], "sources"),
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
