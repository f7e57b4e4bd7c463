"""Defaults, and the environment variables that change them. Nothing else in userfault reads the environment.

- `USERFAULT_MEMORY`: budget of the whole process, a size such as `4 GiB`. Default: a share
  of the RAM.
- `USERFAULT_WORKERS`: most worker processes for sources written in Python. Default: one per usable CPU,
  at most 8.
- `USERFAULT_SCRATCH`: folder of scratch files, which have no name: compressed files are expanded there, and changes
  wait there (mode `"c"`, `empty`, `zeros`, transactional stores). Default: `/var/tmp`, else the temporary folder of the
  system.
- `XDG_CACHE_HOME`: folder of caches; what `userfault demo` makes is kept below it. Default: `~/.cache`.
- `USERFAULT_WATCH`: `1` opens the socket of `userfault watch` at the first `open`. Default: `0`.
- `XDG_RUNTIME_DIR`: folder for sockets of this user. Default: none; they are then in a folder of the user's own below
  the temporary folder of the system.

Variables are read when they are needed, so that a program may still set them after importing userfault.
"""

from __future__ import annotations

import os
from pathlib import Path

from userfault.errors import BudgetError
from userfault.sizes import parse_size

__all__ = [
    "cache_dir",
    "cpu_count",
    "memory",
    "runtime_dir",
    "scratch_dir",
    "socket_dirs",
    "watch",
    "workers",
]

_MOST_DEFAULT_WORKERS = 8


def memory() -> int | None:
    """Return the budget of the process in bytes from `USERFAULT_MEMORY`, None if it is not set.

    Raises:
        BudgetError: The variable is not a size.
    """
    text = os.environ.get("USERFAULT_MEMORY", "").strip()
    return parse_size(text, what="USERFAULT_MEMORY") if text else None


def workers() -> int:
    """Return how many worker processes there may be, from `USERFAULT_WORKERS` or the number of CPUs.

    Raises:
        BudgetError: The variable is not a positive integer.
    """
    text = os.environ.get("USERFAULT_WORKERS", "").strip()
    if not text:
        return min(cpu_count(), _MOST_DEFAULT_WORKERS)
    if not text.isdecimal() or int(text) < 1:
        raise BudgetError(f"USERFAULT_WORKERS: {text!r} is not a number of processes; give 1 or more")
    return int(text)


def cpu_count() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def scratch_dir() -> str:
    """Return the folder for scratch files, from `USERFAULT_SCRATCH` or where large temporary files belong.

    The default is `/var/tmp` rather than `/tmp`: the latter is often RAM, and scratch files are there to
    keep things out of RAM.
    """
    chosen = os.environ.get("USERFAULT_SCRATCH", "")
    if chosen:
        return chosen
    if os.access("/var/tmp", os.W_OK | os.X_OK):
        return "/var/tmp"
    return _temporary_dir()


def watch() -> bool:
    """Return whether `USERFAULT_WATCH` asks for the socket of `userfault watch`: set, and not to `0` or `no`."""
    return os.environ.get("USERFAULT_WATCH", "").strip().lower() not in ("", "0", "no", "off", "false")


def cache_dir() -> Path:
    """Return the folder where userfault keeps what it can make again; it may not exist yet."""
    # The XDG rules: a relative path is to be ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "userfault"


def runtime_dir() -> Path | None:
    """Return the folder for sockets of this user, None if the system has none."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(base) if os.path.isabs(base) else None


def socket_dirs(uid: int | None = None) -> list[Path]:
    """Return the folders where the sockets of a user's processes may be; they may not exist yet.

    Args:
        uid: The user; None for this one. A process of this user makes its socket in the first of its folders.
    """
    own = os.geteuid()
    user = own if uid is None else uid
    runtime = runtime_dir() if user == own else None
    found = [runtime / "userfault"] if runtime is not None and os.path.isdir(runtime) else []
    found.append(Path(_temporary_dir()) / f"userfault-{user}")
    # Where systemd puts the runtime folder: for a process that was started with other variables than this one.
    usual = Path("/run/user", str(user), "userfault")
    return found if usual in found else [*found, usual]


def _temporary_dir() -> str:
    import tempfile

    return tempfile.gettempdir()
