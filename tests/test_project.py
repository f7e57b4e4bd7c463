"""The project's own files agree with one another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import userfault

ROOT = Path(__file__).resolve().parent.parent


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert userfault.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_engine_source_is_built() -> None:
    listed = re.findall(r"'(\w+\.c)'", (ROOT / "engine" / "meson.build").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "engine").glob("*.c"))


def test_the_engine_does_not_know_python() -> None:
    files = [path for path in (ROOT / "engine").rglob("*.[ch]") if "build" not in path.parts]
    assert files
    assert [path.name for path in files if re.search(r"#\s*include.*Python\.h", path.read_text())] == []


def test_layers() -> None:
    pytest.importorskip("importlinter", reason="import-linter is in the dev extra; make layers runs this")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "layers.py"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not there"),
        ({"PYTHON": "/bin/true"}, "PYTHON=/bin/true does not run"),
        ({"CC": "no-such-compiler"}, "no-such-compiler is missing"),
        ({"PATH": "/no/such/folder"}, "cc is missing"),
    ],
)
def test_what_the_makefile_lacks_is_said_in_one_sentence(setting: dict[str, str], word: str) -> None:
    env = {"PATH": os.environ["PATH"], **setting}
    done = subprocess.run(
        ["/bin/sh", ROOT / "tools" / "find-python"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert word in done.stderr
    assert done.stderr.endswith("apt-get install gcc make libc6-dev python3 python3-venv python3-dev\n")
    assert done.stderr.count("\n") == 1
