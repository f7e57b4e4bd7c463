"""Blocks that stay where they are."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from userfault._observed import ObservedMemory

__all__ = ["Pin"]


class Pin:
    """Blocks of a memory that are resident, present, and never evicted, until `release()`. A context manager.

    `PagedMemory.pin` makes it. Letting it go does not unpin: a device may write on.
    """

    def __init__(self, memory: ObservedMemory, runs: list[tuple[int, int]]) -> None:
        self._memory = memory
        self._runs: list[tuple[int, int]] = []
        try:
            for first, count in runs:
                memory._pin(first, count)
                self._runs.append((first, count))
        except BaseException:
            self.release()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that it pins now."""
        return sum(count for _, count in self._runs) * self._memory.block

    def release(self) -> None:
        """Unpin. Idempotent, also after the memory was closed."""
        while self._runs:
            try:
                first, count = self._runs.pop()
            except IndexError:  # another thread released the last one
                return
            if not self._memory.closed:
                self._memory._unpin(first, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<userfault.memory.Pin of {self.nbytes} bytes of {self._memory.name!r}>"
