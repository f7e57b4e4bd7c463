"""What is done on this machine before a kernel boots: the tests are collected, the engine's test programs compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kernels.initramfs import GUEST, ROOT
from kernels.results import Results

PYTEST = ("-p", "matrix_plugin", "-p", "no:cacheprovider", "--color=no")
# Of tracking, those of accesses: which method tells them depends on the kernel.
TESTS = (
    "tests/kernel",
    "tests/track/test_rwp_tracking.py",
    "tests/track/test_accesses.py",
    "tests/track/test_accesses_concurrent.py",
    "tests/track/test_accesses_gaps.py",
    "tests/track/test_accesses_limits.py",
    "tests/track/test_stash.py",
    "tests/track/test_cold.py",
)


class PreparationError(Exception):
    """The tests cannot be collected, or the engine's tests not compiled."""


def collect(arguments: list[str], work: Path) -> tuple[list[str], Path]:
    """Return the ids of the tests to be run, and the folder with what pytest compiled of them."""
    events, compiled = work / "collected.jsonl", work / "compiled"
    events.unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPATH": str(GUEST), "PYTHONPYCACHEPREFIX": str(compiled), "MATRIX_EVENTS": str(events)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *PYTEST, *(arguments or TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    results = Results()
    if events.exists():
        for line in events.read_text().splitlines():
            results.feed(line)
    if done.returncode != 0 or results.troubles or not results.collected:
        said = "\n".join(results.troubles) or (done.stdout + done.stderr)[-4000:]
        raise PreparationError(f"the tests cannot be collected on this machine either:\n{said}")
    return results.collected, compiled


def engine_programs() -> list[Path]:
    """Compile the engine's tests and return the programs."""
    names = sorted(path.stem for path in (ROOT / "engine" / "tests").glob("test_*.c"))
    variant = ["VARIANT=plain", "VARIANT_CFLAGS=-O2"]
    command = [
        "make",
        "--no-print-directory",
        "-C",
        "engine",
        *variant,
        *(f"build/plain/{name}" for name in names),
    ]
    env = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PreparationError(f"the engine's tests do not compile:\n{(done.stdout + done.stderr)[-4000:]}")
    return [ROOT / "engine" / "build" / "plain" / name for name in names]
