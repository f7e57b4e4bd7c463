"""Kernels in the user's cache: the newest that the mirror has, or the last one that it had."""

from __future__ import annotations

import fcntl
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kernels import apt, packages

# Loaded inside, for what needs a swap device: a disk in memory, without anything else that it depends on.
MODULES = ("brd",)


@dataclass(frozen=True, slots=True)
class Download:
    """A kernel that is here."""

    name: str
    series: str
    version: str
    folder: Path

    @property
    def vmlinuz(self) -> Path:
        """The kernel's image."""
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> list[Path]:
        """Those of the `MODULES` that its packages have, decompressed."""
        return [path for module in MODULES if (path := self.folder / f"{module}.ko").exists()]


def cache_folder() -> Path:
    """Return where downloads are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "userfault" / "kernels"


def kernel(name: str, cache: Path) -> tuple[Download, str | None]:
    """Return the newest kernel that `name` stands for, and a warning if it is only the newest of the cache.

    Raises:
        UnavailableError: It is not in the cache, and the mirror cannot be asked or does not have it.
    """
    with _locked(cache):
        try:
            return _newest(name, cache), None
        except apt.UnavailableError as error:
            kept = _kept(name, cache)
            if kept is None:
                raise
            return kept, f"from the cache, because the mirror could not be asked: {error}"


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Two runs at a time download one after the other."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _newest(name: str, cache: Path) -> Download:
    mirror = apt.find_mirror()
    for suite_name in packages.suites(name):
        suite = _updated(apt.Suite(suite_name, mirror, cache / "apt" / suite_name), cache)
        for again in (False, True):
            if again:
                suite.update(force=True)
            chosen = packages.choose(name, packages.kernel_packages(suite.index()))
            if chosen is None:
                break
            try:
                return _unpacked(name, chosen, suite, cache)
            except apt.UnavailableError:
                # An index that is some hours old may name what the mirror has replaced since.
                if again:
                    raise
    raise apt.UnavailableError(f"no kernel {name} is in {', '.join(packages.suites(name))} of {mirror}")


def _updated(suite: apt.Suite, cache: Path) -> apt.Suite:
    try:
        suite.update()
    except apt.UnavailableError as error:
        if "NO_PUBKEY" not in str(error):
            raise
        keyring = apt.newest_keyring(suite.mirror, cache / "apt" / "keys")
        if keyring is None:
            raise
        suite = apt.Suite(suite.name, suite.mirror, suite.folder, keyring)
        suite.update()
    return suite


def _unpacked(name: str, chosen: packages.Kernel, suite: apt.Suite, cache: Path) -> Download:
    kept = _kept(name, cache)
    if kept is not None and kept.version == chosen.version:
        return kept
    files: dict[str, bytes] = {}
    for package in chosen.packages:
        files |= apt.extract(suite.download(package, chosen.version), _is_wanted)
    shutil.rmtree(suite.folder / "packages")
    home = cache / name
    fresh = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
    try:
        for path, content in files.items():
            plain = lzma.decompress(content) if path.endswith(".xz") else content
            (fresh / _short_name(path)).write_bytes(plain)
        if not (fresh / "vmlinuz").exists():
            raise apt.UnavailableError(f"no vmlinuz is in {' and '.join(chosen.packages)}")
        (fresh / "kernel.json").write_text(json.dumps({"series": chosen.series, "version": chosen.version}))
        shutil.rmtree(home, ignore_errors=True)
        fresh.rename(home)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return Download(name, chosen.series, chosen.version, home)


def _kept(name: str, cache: Path) -> Download | None:
    try:
        facts = json.loads((cache / name / "kernel.json").read_text())
    except FileNotFoundError:
        return None
    return Download(name, facts["series"], facts["version"], cache / name)


def _is_wanted(path: str) -> bool:
    return _short_name(path) in {"vmlinuz", *(f"{module}.ko" for module in MODULES)}


def _short_name(path: str) -> str:
    """`boot/vmlinuz-6.1.0-50-cloud-amd64` is a vmlinuz, `.../brd.ko.xz` a brd.ko."""
    name = PurePosixPath(path).name
    return "vmlinuz" if name.startswith("vmlinuz") else name.removesuffix(".xz")
