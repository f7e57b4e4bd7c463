"""A recorded working set becomes a plan of what to load ahead of demand."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from userfault._trace import Trace, plan, read_trace
from userfault.errors import SourceNotFoundError

if TYPE_CHECKING:
    from userfault.memory import PagedMemory

__all__ = ["Replay", "begin_replay", "load_replay"]

Replay = str | os.PathLike[str] | Trace


def load_replay(replay: Replay) -> Trace:
    """Return the trace that `replay` is or names.

    Raises:
        SourceNotFoundError: There is no such file.
        TraceError: It is no trace.
    """
    if isinstance(replay, Trace):
        return replay
    try:
        return read_trace(replay)
    except FileNotFoundError:
        raise SourceNotFoundError(
            f"replay: there is no trace {os.fspath(replay)!r}; a first run records it: userfault.track.Recorder([a], "
            f"to={os.fspath(replay)!r}), or `userfault record`",
            source_name=os.fspath(replay),
        ) from None


def begin_replay(memory: PagedMemory, trace: Trace) -> None:
    """Have `memory` load what an earlier run needed, in its order, ahead of demand.

    The recorded memory is the one of this name, else the only one of this size.

    Raises:
        TraceError: The trace has none, or several.
    """
    namesakes = [o.id for o in trace.objects if o.watched == "faults" and o.name == memory.name]
    made = plan(
        trace, namesakes[0] if len(namesakes) == 1 else None, nbytes=memory.nbytes, block=memory.block
    )
    if len(made):
        memory._replay(np.array(list(made), np.uint64).data)
