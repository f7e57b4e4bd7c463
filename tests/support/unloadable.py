"""Sources that never come to be read."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

from support.page_sources import OddError
from userfault.sources._abc import PageSource

__all__ = ["Unloadable", "Unsendable"]


class Unloadable(PageSource):
    """Fails in the worker, when it is asked for its length."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @property
    def nbytes(self) -> int:
        if self.kind == "odd":
            raise OddError("no", "length")
        if self.kind == "exit":
            raise SystemExit(3)
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise FileNotFoundError(2, "not there", "the/file")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise AssertionError("it has no length")


class Unsendable(PageSource):
    """Refuses to be pickled."""

    nbytes = 100

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def __reduce__(self) -> NoReturn:
        raise TypeError("no, never")

    def __getstate__(self) -> Any:
        raise TypeError("no, never")
