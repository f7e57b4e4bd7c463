"""What `open` returned, in the form that commands want: arrays by name, and their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import userfault
from userfault.cli._output import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from userfault.memory import PagedMemory

__all__ = ["Opened", "RawOptions", "opened"]


@dataclass(frozen=True, slots=True)
class RawOptions:
    """What a raw file does not say of itself.

    Attributes:
        dtype: Type of the elements, as NumPy writes it; None if the file is not raw.
        shape: Shape, None for one axis with all elements.
        offset: Where the elements begin, in bytes.
    """

    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    offset: int = 0

    @classmethod
    def parse(cls, dtype: str | None, shape: str | None, offset: int) -> RawOptions:
        """Take the options of a command apart.

        Raises:
            UsageError: They do not fit together, or `shape` is not a list of numbers.
        """
        if dtype is None and (shape is not None or offset):
            raise UsageError("--shape and --offset are for raw files: give --dtype too")
        try:
            lengths = tuple(int(length) for length in shape.split(",")) if shape else None
        except ValueError:
            raise UsageError(f"--shape {shape!r}: give numbers with commas, such as 1000,512") from None
        return cls(dtype, lengths, offset)

    def as_arguments(self) -> dict[str, Any]:
        """Return them as keyword arguments of `userfault.open`."""
        if self.dtype is None:
            return {}
        return {"dtype": self.dtype, "shape": self.shape, "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Opened:
    """An open array, or the arrays of a file.

    Attributes:
        arrays: By name; "" if there is only one.
        memory: Their memory, None if they have no elements.
    """

    arrays: Mapping[str, NDArray[Any]]
    memory: PagedMemory | None

    @property
    def is_mapping(self) -> bool:
        """Whether the file holds arrays by name."""
        return "" not in self.arrays


@contextmanager
def opened(url: str, raw: RawOptions, memory: int | str | None = None) -> Iterator[Opened]:
    """Open a file or URL, and close its memory at the end, whoever still holds an array of it.

    Raises:
        UserfaultError: As `userfault.open`.
    """
    found = userfault.open(url, memory=memory, **raw.as_arguments())
    arrays = {"": found} if isinstance(found, np.ndarray) else dict(found)
    full = next((array for array in arrays.values() if array.size), None)
    paged = None if full is None else userfault.memory_of(full)
    try:
        yield Opened(arrays, paged)
    finally:
        if paged is not None:
            # As by force, but nobody reads the arrays after this: a traceback may keep them alive.
            paged._close(quiet=True)
