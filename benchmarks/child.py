"""The processes that the sides run in, and how the harness talks to them.

A process of its own for each side: one side's threads, caches and heap do not disturb the other's, the
affinity is set before anything is imported (so that engine threads and workers inherit it), and a side that
hangs in a page fault, with its interpreter lock held, can be ended from outside.
"""

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Self, TypedDict

DEADLINE_S = 120.0
"""How long one repetition may take, seconds."""


@dataclass(frozen=True)
class Sample:
    """What one repetition measured."""

    value: float
    """The figure, in the comparison's unit."""
    check: float | None = None
    """A sum over the bytes that were read; must be the same on both sides."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further figures in the same unit, such as percentiles."""


Measure = Callable[[int], Sample]


class Reply(TypedDict):
    value: float
    check: float | None
    extra: dict[str, float]


class ChildError(Exception):
    """A side could not be measured; the message says why in one line."""


class Child:
    """A process that measures one side, one repetition for each call."""

    def __init__(
        self, factory: str, arguments: dict[str, Any], *, one_cpu: bool = False, realtime: bool = False
    ) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        request = json.dumps(
            {"factory": factory, "arguments": arguments, "one_cpu": one_cpu, "realtime": realtime}
        )
        # A session of its own, so that ending the side ends its workers and programs too.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.child", request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def measure(self, repetition: int) -> Reply:
        """Asks for one repetition and waits for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{repetition}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self._last_words()) from None
        reply: Reply = json.loads(self._line())
        return reply

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + DEADLINE_S
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ChildError(f"no answer within {DEADLINE_S:.0f} s")
            piece = os.read(fd, 65536)
            if not piece:
                raise ChildError(self._last_words())
            line += piece
        return line

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with status {status}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10.0 if kind is None else 0.1)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def main(request: str) -> None:
    """Runs in the child: builds the side, then measures once for every line on stdin."""
    _end_with_parent()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints here does not belong to the replies
    order = json.loads(request)
    if order["one_cpu"]:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    module, _, function = order["factory"].partition(":")
    factory: Callable[..., AbstractContextManager[Measure]] = getattr(
        importlib.import_module(module), function
    )
    with factory(**order["arguments"]) as measure:
        for line in sys.stdin:
            with _ahead_of_others() if order["realtime"] else nullcontext():
                sample = measure(int(line))
            reply = Reply(value=sample.value, check=sample.check, extra=sample.extra)
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


@contextmanager
def _ahead_of_others() -> Iterator[None]:
    """No ordinary program runs on a CPU that this one wants. What is started meanwhile inherits it, for good."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _end_with_parent() -> None:
    """A session of its own hears no Ctrl-C: a side that hangs in a fault would outlive an interrupted run."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    # By its own name: `Sample` must be the class that the factories import.
    importlib.import_module("benchmarks.child").main(sys.argv[1])
