"""Page sources for the tests, as worker processes load them: they import nothing but the standard library."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal, NoReturn

from userfault.sources._abc import PageSource

__all__ = ["GateSource", "ModulesSource", "OddError", "PatternSource", "Trouble", "TroubleSource", "pattern"]

# A prime: no two blocks nearby have the same bytes, whatever their size.
PERIOD = 1_000_003


@cache
def _period(seed: int) -> bytes:
    return Random(seed).randbytes(PERIOD) * 2


def pattern(offset: int, length: int, seed: int = 0) -> bytes:
    """Return bytes that tell their place: those of `PatternSource` from `offset` on."""
    start = offset % PERIOD
    copies = (start + length - 1) // (2 * PERIOD) + 1
    return (_period(seed) * copies)[start : start + length]


class PatternSource(PageSource):
    """Bytes that tell their place, of any length."""

    def __init__(self, nbytes: int, *, seed: int = 0, block: int | None = None, concurrency: int = 1) -> None:
        self._nbytes = nbytes
        self._seed = seed
        self.block = block
        self.concurrency = concurrency

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = pattern(offset, len(buffer), self._seed)


class GateSource(PatternSource):
    """A pattern whose reads wait until a file is there.

    Attributes:
        gate: The file; `asked` beside it is there from the first read on.
    """

    def __init__(self, nbytes: int, folder: Path, *, block: int | None = 4096) -> None:
        super().__init__(nbytes, block=block)
        self.gate, self.asked = folder / "gate", folder / "asked"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.asked.touch()
        while not self.gate.exists():
            threading.Event().wait(0.001)
        super().read_into(offset, buffer)


class OddError(Exception):
    """Can be pickled, but not unpickled: its constructor wants more than its message."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


Kind = Literal[
    "OSError",
    "OddError",
    "SystemExit",
    "KeyboardInterrupt",
    "killed",
    "hangs",
    "too much",
    "too little",
    "prints",
]


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a `TroubleSource`.

    Attributes:
        kind: How it shows.
        start: First byte that is concerned.
        stop: Byte after the last one.
        times: How many reads fail; those after them are good.
    """

    kind: Kind
    start: int = 0
    stop: int = 1 << 62
    times: int = 1 << 62


class TroubleSource(PatternSource):
    """A pattern with troubles, which a test makes and mends while workers read it.

    Args:
        nbytes: Length in bytes.
        folder: An empty folder, where the test and the workers leave word for each other.
        block: Preferred block size in bytes.
    """

    def __init__(self, nbytes: int, folder: Path, *, block: int | None = 4096, concurrency: int = 1) -> None:
        super().__init__(nbytes, block=block, concurrency=concurrency)
        self.folder = folder

    def trouble(self, trouble: Trouble | None) -> None:
        """Make the trouble, or mend it."""
        fresh = self.folder / "fresh"
        fresh.write_text(json.dumps(None if trouble is None else trouble.__dict__))
        fresh.rename(self.folder / "trouble")

    def reads(self) -> list[tuple[int, int]]:
        """Return offset and length of the reads so far."""
        return [(int(offset), int(length)) for offset, length, _ in self._log("reads")]

    def workers(self) -> set[int]:
        """Return the ids of the processes that read so far."""
        return {int(pid) for _, _, pid in self._log("reads")}

    def failures(self) -> int:
        """Return how many reads failed so far."""
        return len(self._log("failures"))

    def _log(self, name: str) -> list[list[str]]:
        path = self.folder / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def _note(self, name: str, line: str) -> None:
        fd = os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, line.encode() + b"\n")
        os.close(fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        self._note("reads", f"{offset} {length} {os.getpid()}")
        said = self.folder / "trouble"
        told = json.loads(said.read_text()) if said.exists() else None
        super().read_into(offset, buffer)
        if told is None:
            return
        trouble = Trouble(**told)
        if offset + length <= trouble.start or offset >= trouble.stop or self.failures() >= trouble.times:
            return
        self._note("failures", str(offset))
        buffer[:] = b"\xee" * length
        _fail(trouble.kind, buffer)
        super().read_into(offset, buffer)


def _fail(kind: Kind, buffer: memoryview) -> None:
    if kind == "OSError":
        raise OSError(5, "the disk is on fire")
    if kind == "OddError":
        raise OddError("fire", "water")
    if kind == "SystemExit":
        sys.exit("enough")
    if kind == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if kind == "too much":
        buffer[:] = bytes(len(buffer) + 1)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs":
        _hang()
    if kind == "prints":
        print("a line from the source", flush=True)


def _hang() -> NoReturn:
    while True:
        threading.Event().wait()


class ModulesSource(PageSource):
    """Tells in its bytes which modules its worker has imported: names, one a line, then zeros."""

    nbytes = 1 << 16

    def read_into(self, offset: int, buffer: memoryview) -> None:
        names = "\n".join(sorted(sys.modules)).encode()
        if len(names) >= self.nbytes:
            raise ValueError("too many modules")
        buffer[:] = names.ljust(self.nbytes, b"\0")[offset : offset + len(buffer)]
