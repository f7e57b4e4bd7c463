"""Page stores for the tests, as worker processes load them: a file with troubles, a crowd that is counted."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

from userfault.sources._abc import PageStore

__all__ = ["CrowdStore", "FileStore"]


class FileStore(PageStore):
    """Bytes in a file, with troubles that a test makes and mends.

    A transactional one keeps what is written in the memory of its worker, and puts it into the file when it is flushed.

    Args:
        folder: An empty folder, for the file and for word between the test and the worker.
        content: What it holds at first.
        block: Preferred block size in bytes.
    """

    def __init__(
        self,
        folder: Path,
        content: bytes,
        *,
        block: int | None = 4096,
        transactional: bool = False,
        writable: bool = True,
        write_unit: int | None = None,
        concurrency: int = 1,
    ) -> None:
        self.folder = folder
        self.block = block
        self.transactional = transactional
        self.writable = writable
        self.write_unit = write_unit
        self.concurrency = concurrency
        self.name = "store"
        self._nbytes = len(content)
        self._staged: dict[int, bytes] = {}
        (folder / "content").write_bytes(content)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def content(self) -> bytes:
        """Return what the file holds."""
        return (self.folder / "content").read_bytes()

    def log(self) -> list[tuple[str, int, int]]:
        """Return what was done so far: "write", "flush" or "fail", offset and length."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(what, int(offset), int(length)) for what, offset, length in map(str.split, lines)]

    def trouble(self, kind: str | None, start: int = 0, stop: int = 1 << 62, times: int = 1 << 62) -> None:
        """Have writes there fail so often ("raises", "short", "spoils", "killed", "hangs"), or every flush; None mends.

        A flush fails with "commit" and does not return with "commit hangs".
        """
        fresh = self.folder / "fresh"
        fresh.write_text(json.dumps([kind, start, stop, times]))
        fresh.rename(self.folder / "trouble")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with open(self.folder / "content", "rb", buffering=0) as file:
            file.seek(offset)
            assert file.readinto(buffer) == len(buffer)
        for start, piece in self._staged.items():
            first, last = max(start, offset), min(start + len(piece), offset + len(buffer))
            if first < last:
                buffer[first - offset : last - offset] = piece[first - start : last - start]

    def write_from(self, offset: int, buffer: memoryview) -> int | None:  # type: ignore[override]
        if kind := self._fails(offset, len(buffer)):
            return self._fail(kind, offset, buffer)
        self._note("write", offset, len(buffer))
        if self.transactional:
            self._staged.pop(offset, None)
            self._staged[offset] = bytes(buffer)
        else:
            self._put(offset, buffer)
        return None

    def _put(self, offset: int, buffer: bytes | memoryview) -> None:
        with open(self.folder / "content", "r+b", buffering=0) as file:
            file.seek(offset)
            file.write(buffer)

    def flush(self) -> None:
        if kind := self._fails(-1, 0):
            self._note("fail", -1, 0)
            if kind == "commit hangs":
                threading.Event().wait()
            raise RuntimeError("somebody else committed")
        for offset, piece in self._staged.items():
            self._put(offset, piece)
        self._staged.clear()
        self._note("flush", 0, 0)

    def _fails(self, offset: int, length: int) -> str | None:
        said = self.folder / "trouble"
        if not said.exists():
            return None
        kind, start, stop, times = json.loads(said.read_text())
        if kind is None or kind.startswith("commit") != (offset < 0):
            return None
        if offset >= 0 and (offset + length <= start or offset >= stop):
            return None
        return kind if sum(what == "fail" for what, _, _ in self.log()) < times else None

    def _fail(self, kind: str, offset: int, buffer: memoryview) -> int:
        self._note("fail", offset, len(buffer))
        # Half of it is stored: it must be written again, whole.
        self._put(offset, bytes(buffer[: len(buffer) // 2]))
        if kind == "raises":
            raise OSError(28, "No space left on device")
        if kind == "spoils":
            buffer[:] = bytes(len(buffer))
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ("killed", "hangs"):
            threading.Event().wait()
        return len(buffer) // 2

    def _note(self, what: str, offset: int, length: int) -> None:
        fd = os.open(self.folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{what} {offset} {length}\n".encode())
        os.close(fd)


class CrowdStore(PageStore):
    """Zeros that take what they are given, and tell how many of its methods ran at once, in which processes.

    Args:
        nbytes: Length in bytes.
        log: A file, of lines "read", "write" or "flush", the process, and how many ran in it at that moment.
        block: Preferred block size in bytes.
        concurrency: How many may run.
    """

    nbytes = 0

    def __init__(self, nbytes: int, log: Path, *, block: int, concurrency: int) -> None:
        self.__setstate__((nbytes, log, block, concurrency))

    def __getstate__(self) -> tuple[int, Path, int, int]:
        assert self.block is not None
        return self.nbytes, self.log, self.block, self.concurrency

    def __setstate__(self, state: tuple[int, Path, int, int]) -> None:
        self.nbytes, self.log, self.block, self.concurrency = state
        self.lock = threading.Lock()
        self.meet = threading.Barrier(max(2, self.concurrency))
        self.inside = 0

    def _work(self, what: str) -> None:
        with self.lock:
            self.inside += 1
            line = f"{what} {os.getpid()} {self.inside}\n"
            with self.log.open("a") as file:
                file.write(line)
        # Wait a little for others: whoever could be inside at the same time is seen.
        try:
            self.meet.wait(0.02)
        except threading.BrokenBarrierError:
            self.meet.reset()
        with self.lock:
            self.inside -= 1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._work("read")
        buffer[:] = bytes(len(buffer))

    def write_from(self, offset: int, buffer: memoryview) -> None:
        self._work("write")

    def flush(self) -> None:
        self._work("flush")
