"""A pager of a test's own in the place of the process's."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from userfault import _engine, pager

__all__ = ["own_pager"]

SECOND = 1_000_000_000


@contextmanager
def own_pager(
    *,
    limit: int = 1 << 30,
    workers: int = 2,
    linger_ns: int = 5 * SECOND,
    deadline_ns: int = 120 * SECOND,
    attempts: int = 4,
    backoff_ns: int = 1_000_000,
    user_mode_only: bool = False,
    no_extents: bool = False,
    no_move: bool = False,
    scratch_dir: str | None = None,
) -> Iterator[_engine.Pager]:
    """Have new memories served by a pager with these options, until the end of the block.

    By then all of them must be closed.
    """
    own = _engine.Pager(
        limit=limit,
        workers=workers,
        argv=pager._worker_argv(),
        env=[os.fsencode(f"{name}={value}") for name, value in os.environ.items()],
        linger_ns=linger_ns,
        deadline_ns=deadline_ns,
        attempts=attempts,
        backoff_ns=backoff_ns,
        user_mode_only=user_mode_only,
        no_extents=no_extents,
        no_move=no_move,
        scratch_dir=None if scratch_dir is None else os.fsencode(scratch_dir),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pager, "_pager", own)
        patch.setattr(pager, "_limit", None)
        yield own
    # Tracebacks of errors that the test expected may hold its arrays, in cycles.
    gc.collect()
    own.shutdown()
