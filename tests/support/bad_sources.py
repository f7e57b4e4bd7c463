"""Sources that do not keep what they promise, as worker processes load them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

from support.page_sources import PatternSource

__all__ = ["BadSource", "Failing"]

Failing = Literal["raises at once", "raises in the middle", "returns short", "too much", "hangs"]


class BadSource(PatternSource):
    """A pattern that holds less than its `nbytes` say, until it is mended.

    Args:
        nbytes: What it says.
        held: What it holds.
        how: What a read beyond that does.
        folder: An empty folder; a file `mended` in it ends all trouble.
    """

    def __init__(self, nbytes: int, held: int, how: Failing, folder: Path) -> None:
        super().__init__(nbytes, block=16 << 10, concurrency=4)
        self.held = held
        self.how = how
        self.folder = folder

    def read_into(self, offset: int, buffer: memoryview) -> int:  # type: ignore[override]
        good = len(buffer)
        if not (self.folder / "mended").exists():
            good = max(0, min(good, self.held - offset))
        if good == len(buffer) or self.how != "raises at once":
            super().read_into(offset, buffer[:good])
        if good < len(buffer):
            buffer[good:] = b"\xee" * (len(buffer) - good)
            if self.how.startswith("raises"):
                raise EOFError(f"there is nothing at {offset + good}")
            if self.how == "too much":
                buffer[:] = bytes(len(buffer) + 1)
            if self.how == "hangs":
                threading.Event().wait()
        return good
