"""An array without elements: it needs no memory, but has a type and a shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from userfault.sources._abc import ArraySource, Order, check_range

__all__ = ["EmptySource"]


class EmptySource(ArraySource):
    """An array of which one axis is 0."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: Order, name: str) -> None:
        self._dtype = dtype
        self._shape = shape
        self.order = order
        self.name = name

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements that it does not have."""
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._shape

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read nothing."""
        check_range(self, offset, len(buffer))
