"""Settings from the environment: read when needed, checked, and nowhere else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from userfault import options
from userfault.errors import BudgetError

PACKAGE = Path(options.__file__).parent


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USERFAULT_MEMORY", raising=False)
    assert options.memory() is None
    monkeypatch.setenv("USERFAULT_MEMORY", " 2 GiB ")
    assert options.memory() == 2 << 30
    monkeypatch.setenv("USERFAULT_MEMORY", "plenty")
    with pytest.raises(BudgetError, match="USERFAULT_MEMORY: 'plenty' is not a size"):
        options.memory()


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USERFAULT_WORKERS", raising=False)
    assert 1 <= options.workers() <= min(8, options.cpu_count())
    monkeypatch.setenv("USERFAULT_WORKERS", "3")
    assert options.workers() == 3
    for bad in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("USERFAULT_WORKERS", bad)
        with pytest.raises(BudgetError, match="USERFAULT_WORKERS"):
            options.workers()


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("USERFAULT_SCRATCH", raising=False)
    assert os.path.isdir(options.scratch_dir())
    monkeypatch.setenv("USERFAULT_SCRATCH", str(tmp_path))
    assert options.scratch_dir() == str(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert options.cache_dir() == tmp_path / "userfault"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.cache_dir() == tmp_path / ".cache" / "userfault"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert options.runtime_dir() is None
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert options.runtime_dir() == Path("/run/user/1")


def test_every_variable_is_documented() -> None:
    source = Path(options.__file__).read_text()
    assert options.__doc__ is not None
    for name in re.findall(r'environ\.get\("(\w+)"', source):
        assert f"`{name}`" in options.__doc__


def test_sources_and_arrays_do_not_read_the_environment() -> None:
    for folder in ("sources", "arrays", "testing", "workers"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert not re.search(r"\bos\.(environ|getenv)\b", path.read_text()), path
