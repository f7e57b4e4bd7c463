"""The newest kernel headers for user space that Debian has: `python tools/headers.py` prints where they are.

They are in the package linux-libc-dev, for all architectures at once: `include/linux`, `include/asm-generic`, and
`uapi/ARCH/asm` for each. Fetched with this machine's own apt, by any user, into ~/.cache/userfault/headers; asked
again after half a day.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from kernels import apt

PACKAGE = "linux-libc-dev"
# Debian removes from experimental whatever is not newer than in sid: the first that has it has the newest.
SUITES = ("experimental", "sid")
ASK_AGAIN_S = 12 * 3600
# Without a network each try costs seconds; the next test run shall not pay them again.
TRY_AGAIN_S = 3600


def cache_folder() -> Path:
    """Return where the headers are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "userfault" / "headers"


def headers(cache: Path) -> dict[str, str]:
    """Return the newest headers' `version` and `folder`, and a `warning` if they may not be the newest.

    Raises:
        UnavailableError: There are none in the cache, and none can be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = _kept(cache)
        if kept and _younger(cache / "asked", ASK_AGAIN_S):
            return kept
        try:
            found = _newest(cache)
        except apt.UnavailableError as error:
            if kept is None:
                raise
            return {**kept, "warning": f"from the cache, because the mirror could not be asked: {error}"}
        (cache / "asked").touch()
        return found


def _younger(path: Path, seconds: float) -> bool:
    return path.exists() and 0 <= time.time() - path.stat().st_mtime < seconds


def _kept(cache: Path) -> dict[str, str] | None:
    try:
        version = json.loads((cache / "current.json").read_text())["version"]
    except (OSError, ValueError):
        return None
    return {"version": version, "folder": str(cache / version)} if (cache / version).is_dir() else None


def _newest(cache: Path) -> dict[str, str]:
    failed = cache / "failed"
    if _younger(failed, TRY_AGAIN_S):
        raise apt.UnavailableError(f"{failed.read_text()} ({failed} keeps us from trying again for an hour)")
    failed.write_text("the last try was interrupted")
    try:
        found = _ask(cache)
    except apt.UnavailableError as error:
        failed.write_text(str(error))
        raise
    failed.unlink()
    return found


def _ask(cache: Path) -> dict[str, str]:
    mirror = apt.find_mirror()
    for name in SUITES:
        suite = apt.Suite(name, mirror, cache / "apt" / name)
        suite.update()
        if version := _version(suite.index()):
            if not (cache / version).is_dir():
                _unpack(suite.download(PACKAGE, version), cache / version)
                shutil.rmtree(suite.folder / "packages")
            _keep_only(cache, version)
            return {"version": version, "folder": str(cache / version)}
    raise apt.UnavailableError(f"no {PACKAGE} is in {' and '.join(SUITES)} of {mirror}")


def _version(index: str) -> str | None:
    found = re.search(rf"^Package: {PACKAGE}\n(?:\S.*\n| .*\n)*?Version: (\S+)$", index, re.MULTILINE)
    return found[1] if found else None


def _place(path: str) -> str | None:
    """Say where a file of the package goes, if it is wanted."""
    if re.match(r"usr/include/(linux|asm-generic)/", path):
        return path.removeprefix("usr/")
    return path.removeprefix("usr/lib/linux/") if path.startswith("usr/lib/linux/uapi/") else None


def _unpack(package: Path, home: Path) -> None:
    fresh = Path(tempfile.mkdtemp(prefix="new-", dir=home.parent))
    try:
        for path, content in apt.extract(package, lambda path: _place(path) is not None).items():
            target = fresh / str(_place(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if not (fresh / "include/linux/userfaultfd.h").exists() or not (fresh / "uapi").is_dir():
            raise apt.UnavailableError(f"{package.name} is not laid out as its newer versions are")
        fresh.rename(home)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _keep_only(cache: Path, version: str) -> None:
    (cache / "current.json").write_text(json.dumps({"version": version}))
    for other in cache.iterdir():
        if other.is_dir() and other.name not in ("apt", version):
            shutil.rmtree(other, ignore_errors=True)


def main() -> int:
    """Print the headers that were found as JSON."""
    try:
        print(json.dumps(headers(cache_folder())))
    except (apt.UnavailableError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
