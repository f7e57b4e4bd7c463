"""The live line: on a terminal, on stderr, and gone when it is done."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from userfault.cli._output import error_console
from userfault.sizes import format_rate, format_size

if TYPE_CHECKING:
    from types import TracebackType

    from userfault.memory import PagedMemory

__all__ = ["LiveLine"]

_REFRESH_NS: Final = 100_000_000


class LiveLine:
    """Shows one task at a time, with what the memory does meanwhile.

    It is drawn from the caller's own calls, at most ten times a second, and never by a thread: such a thread
    would stop while a page is waited for anyway, and would have to be told apart from a leak.
    """

    def __init__(self) -> None:
        console = error_console()
        self._on = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:>28}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not self._on,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._next_ns = 0
        self._seen = (0, 0)

    def __enter__(self) -> LiveLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, name: str, done: int, total: int, facts: str = "") -> None:
        """Show that `done` of `total` steps of a task are over."""
        if self._due(name, last=done >= total):
            self._show(name, done, total, facts)

    def watch(self, name: str, done: int, total: int, memory: PagedMemory | None) -> None:
        """Show the same with the memory's numbers."""
        if memory is None:
            self.step(name, done, total)
            return
        if not self._due(name, last=done >= total):
            return
        stats = memory.stats()
        now_ns = time.monotonic_ns()
        then_ns, read = self._seen
        rate = (stats.bytes_read - read) / max((now_ns - then_ns) / 1e9, 1e-9) if then_ns else 0.0
        self._seen = (now_ns, stats.bytes_read)
        resident = f"{format_size(stats.resident_bytes)} of {format_size(stats.budget)} resident"
        self._show(name, done, total, f"{resident}, {stats.faults:,} faults, {format_rate(max(rate, 0.0))}")

    def _due(self, name: str, *, last: bool) -> bool:
        now_ns = time.monotonic_ns()
        if not self._on or (now_ns < self._next_ns and name == self._name and not last):
            return False
        self._next_ns = now_ns + _REFRESH_NS
        return True

    def _show(self, name: str, done: int, total: int, facts: str) -> None:
        if name != self._name or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(name, total=total, facts="")
            self._name = name
        self._progress.update(self._task, completed=done, facts=facts)
        self._progress.refresh()
