"""Which pages a computation reads and writes: exactly, on any kernel from Linux 6.7.

```python
import numpy as np
from userfault.track import track_writes

a = np.zeros((4096, 4096))
with track_writes(a) as w:
    a[1000:1010] = 1
print(w.slices(a), w.nbytes)
```

Nothing here touches the memory that it watches. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from userfault._trace import (
        Cost,
        EventKind,
        Region,
        Trace,
        TracedObject,
        WorkingSet,
        cold,
        hot,
        read_trace,
        totals,
        working_set,
    )
    from userfault.track._accesses import AccessTracker, track_accesses
    from userfault.track._cold import ColdPages
    from userfault.track._methods import MethodInfo, methods
    from userfault.track._page_out import page_out
    from userfault.track._recorder import Recorder, record_to
    from userfault.track._shared_array import shared_array
    from userfault.track._touched import Touched
    from userfault.track._writes import WriteTracker, track_writes

__all__ = [
    "AccessTracker",
    "ColdPages",
    "Cost",
    "EventKind",
    "MethodInfo",
    "Recorder",
    "Region",
    "Touched",
    "Trace",
    "TracedObject",
    "WorkingSet",
    "WriteTracker",
    "cold",
    "hot",
    "methods",
    "page_out",
    "read_trace",
    "record_to",
    "shared_array",
    "totals",
    "track_accesses",
    "track_writes",
    "working_set",
]

_HOMES = {
    **dict.fromkeys(
        [
            *(
                "Cost",
                "EventKind",
                "Region",
                "Trace",
                "TracedObject",
                "WorkingSet",
                "cold",
                "hot",
                "read_trace",
            ),
            *("totals", "working_set"),
        ],
        "_trace",
    ),
    **dict.fromkeys(["Recorder", "record_to"], "track._recorder"),
    **dict.fromkeys(["track_accesses", "AccessTracker"], "track._accesses"),
    **dict.fromkeys(["ColdPages"], "track._cold"),
    **dict.fromkeys(["methods", "MethodInfo"], "track._methods"),
    **dict.fromkeys(["page_out"], "track._page_out"),
    **dict.fromkeys(["shared_array"], "track._shared_array"),
    **dict.fromkeys(["Touched"], "track._touched"),
    **dict.fromkeys(["track_writes", "WriteTracker"], "track._writes"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'userfault.track' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"userfault.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
