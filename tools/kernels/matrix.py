"""All kernels of a run, a few machines at a time: of each kernel one for pytest and one for the engine's tests."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels import here, initramfs
from kernels.cpio import Archive
from kernels.download import Download
from kernels.machine import Machine
from kernels.results import NOT_AN_EVENT, Results

OUTPUT = initramfs.ROOT / "build" / "kernels"
STEPS = ("pytest", "engine")
EVENTS = "/dev/ttyS1"
IDS = "/ids.json"
# Before a machine is ended, pytest or a test program is stopped inside, so that it can say where it was.
LAST_WORDS_S = 30
PROGRAM_SECONDS = 240
HANGING_TEST_SECONDS = 240
POLL_S = 0.1


@dataclass(slots=True)
class Run:
    """One kernel's run of one step."""

    kernel: Download
    step: str
    machine: Machine
    results: Results = field(default_factory=Results)

    def listen(self) -> None:
        """Take the events that have come, and print what is worth it."""
        for line in self.machine.new_lines():
            try:
                said = self.results.feed(line)
            except NOT_AN_EVENT:
                self.results.troubles.append(f"this came where an event should: {line[:200]}")
                continue
            if said:
                name = f"{self.kernel.name} {self.step}"
                print(f"{name:>13} {time.monotonic() - self.machine.began:5.0f} s  {said}", flush=True)


_told_to_end = False


def end(*_: object) -> None:
    """End all machines and the program: the handler of SIGTERM, which CI's `timeout` sends."""
    global _told_to_end
    _told_to_end = True
    sys.exit(128 + signal.SIGTERM)  # lost if it comes in a destructor: then `run_all` sees what is said above


class BusyError(Exception):
    """Another run of the matrix uses the same folder."""


def run_all(kernels: list[Download], options: argparse.Namespace) -> list[Run]:
    """Boot the kernels and return their runs when all have ended.

    Raises:
        PreparationError: The tests cannot be collected or compiled on this machine.
        BusyError: Another run of the matrix uses the same folder.
    """
    with _emptied(options.output):
        ids, compiled = here.collect(options.pytest, options.output)
        programs = here.engine_programs() if options.only != "pytest" else []
        base = initramfs.build(programs, compiled)
        base.file(IDS, json.dumps(ids).encode())
        waiting = [
            Run(kernel, step, _machine(kernel, step, options), Results(ids if step == "pytest" else []))
            for kernel in kernels
            for step in STEPS
            if options.only in (None, step)
        ]
        running: list[Run] = []
        ended: list[Run] = []
        try:
            while waiting or running:
                if _told_to_end:
                    end()
                while waiting and len(running) < options.jobs:
                    running.append(waiting.pop(0))
                    _start(running[-1], base, programs, options)
                time.sleep(POLL_S)
                for run in list(running):
                    is_running = run.machine.is_running()
                    run.listen()
                    if not is_running:
                        run.machine.initramfs.unlink()
                        running.remove(run)
                        ended.append(run)
        finally:
            for run in running:
                run.machine.stop()
                run.machine.initramfs.unlink(missing_ok=True)
            shutil.rmtree(compiled)
        return ended


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Empty the folder, for this run alone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another run of the kernel matrix uses {folder}; --output chooses another"
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield


def _machine(kernel: Download, step: str, options: argparse.Namespace) -> Machine:
    folder = options.output / kernel.name / step
    folder.mkdir(parents=True)
    return Machine(kernel.vmlinuz, folder / "initramfs.cpio", folder, options.processors, options.seconds)


def _start(run: Run, base: Archive, programs: list[Path], options: argparse.Namespace) -> None:
    """Put what differs between machines into the archive, in place of another machine's, and boot."""
    modules = [f"/modules/{path.name}" for path in run.kernel.modules]
    for source, target in zip(run.kernel.modules, modules, strict=True):
        base.file(target, source)
    base.file("/plan.json", json.dumps(_plan(run.step, modules, programs, options)).encode())
    base.write(run.machine.initramfs)
    run.machine.start()


def _plan(step: str, modules: list[str], programs: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Return what the first process reads: what to run, and with what environment."""
    limit = f"faulthandler_timeout={HANGING_TEST_SECONDS}"
    pytest = [
        *here.PYTEST,
        "--tb=short",
        "-rN",
        "-o",
        limit,
        "--hypothesis-profile=emulated",
        *(options.pytest or here.TESTS),
    ]
    return {
        "python": sys.executable,
        "root": str(initramfs.ROOT),
        "pytest": pytest if step == "pytest" else [],
        "programs": [os.fspath(path) for path in programs] if step == "engine" else [],
        "seconds": options.seconds - LAST_WORDS_S,
        "program_seconds": PROGRAM_SECONDS,
        "modules": modules,
        "environment": {
            "PATH": "/usr/bin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "COLUMNS": "120",
            # Hypothesis then draws the same examples every time and has no deadline for one.
            "CI": "1",
            # Fewer rounds of the engine's tests (engine/tests/support.c).
            "UF_TEST_SLOW": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(initramfs.GUEST),
            "MATRIX_EVENTS": EVENTS,
            "MATRIX_IDS": IDS,
            "OPENBLAS_NUM_THREADS": "1",
        },
    }
