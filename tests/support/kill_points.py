"""Sources whose workers are killed, by themselves at a chosen point of a request or by a test. As workers load them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from support.page_sources import PatternSource
from support.page_stores import FileStore

__all__ = ["KilledSource", "KilledStore"]


class _Killed:
    """Kills its worker after a number of byte codes, counted from the beginning of a request on.

    The counting goes on in the functions that called the source, and in the next requests: every point of a worker's
    loop can be hit. The folder also holds one file for each worker, with a byte for each of its requests.
    """

    folder: Path

    def kill_after(self, codes: int) -> None:
        """Have the worker that gets a request next end itself after so many byte codes."""
        fresh = self.folder / "fresh"
        fresh.write_text(str(codes))
        fresh.rename(self.folder / "plan")

    def requests(self, pid: int) -> int:
        """Return how many requests this worker began."""
        path = self.folder / f"worker-{pid}"
        return path.stat().st_size if path.exists() else 0

    def _begin(self) -> None:
        fd = os.open(self.folder / f"worker-{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, b".")
        os.close(fd)
        taken = self.folder / f"taken-{os.getpid()}"
        try:
            (self.folder / "plan").rename(taken)
        except FileNotFoundError:
            return
        left = int(taken.read_text())

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if event == "call":
                frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step

        sys.settrace(step)
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frame.f_trace, frame.f_trace_opcodes = step, True
            frame = frame.f_back


class KilledSource(_Killed, PatternSource):
    """A pattern whose worker is killed.

    Args:
        nbytes: Length in bytes.
        folder: An empty folder, where the test and the workers leave word for each other.
        block: Preferred block size in bytes.
        concurrency: Threads of each worker that read.
        fills: How often each read fills the buffer, with wrong bytes first: work, for a worker that is to be met busy.
    """

    def __init__(
        self, nbytes: int, folder: Path, *, block: int = 4096, concurrency: int = 1, fills: int = 1
    ) -> None:
        super().__init__(nbytes, block=block, concurrency=concurrency)
        self.folder = folder
        self.fills = fills

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._begin()
        # In two halves, so that a half-filled buffer is one of the points.
        half = len(buffer) // 2
        for _ in range(self.fills):
            buffer[:] = b"\xee" * len(buffer)
            super().read_into(offset, buffer[:half])
            super().read_into(offset + half, buffer[half:])


class KilledStore(_Killed, FileStore):
    """A file whose worker is killed while it reads, writes or flushes.

    Each write spoils what was there first, and puts the new bytes in two halves: a write that was begun and is not done
    again shows.
    """

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._begin()
        super().read_into(offset, buffer)

    def write_from(self, offset: int, buffer: memoryview) -> int | None:  # type: ignore[override]
        self._begin()
        return super().write_from(offset, buffer)

    def flush(self) -> None:
        self._begin()
        super().flush()

    def _put(self, offset: int, buffer: bytes | memoryview) -> None:
        half = len(buffer) // 2
        super()._put(offset, b"\xee" * len(buffer))
        super()._put(offset, buffer[:half])
        super()._put(offset + half, buffer[half:])
