"""The memory limit of the control group that this process runs in.

A module of its own, because the pager needs it for the first memory of every program, and `userfault.kernel` takes
longer to import than reading these files takes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

__all__ = ["memory_limit"]

_NO_LIMIT: Final = 1 << 62  # version 1 says "no limit" with a huge multiple of the page size


def memory_limit(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int | None:
    """Return the smallest memory limit of this process's control groups in bytes, or None if there is none.

    In version 2 every ancestor can limit; inside a container the tree often starts at the container's own
    group, so that the path in `/proc/self/cgroup` does not exist and the root is what counts.
    """
    try:
        lines = Path(membership).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    limits: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = Path(root), "memory.max"
        elif "memory" in controllers.split(","):
            base, name = Path(root) / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                limits.append(int((folder / name).read_text()))
            if folder == base:
                break
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)
