"""A source of plain bytes with a type and a shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from userfault.sources._abc import ArraySource, PageSource, read_all
from userfault.sources._layout import ArrayLayout

__all__ = ["ShapedSource"]


class ShapedSource(ArraySource):
    """A source of plain bytes, and what they are."""

    def __init__(self, source: PageSource, layout: ArrayLayout) -> None:
        self._source = source
        self._layout = layout
        self.order = layout.order
        self.block = source.block
        self.concurrency = source.concurrency
        self.affinity = source.affinity
        self.wants_cache = source.wants_cache
        self.name = source.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self._layout.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._layout.shape

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Let the source fill `buffer`."""
        read_all(self._source, offset, buffer)

    def set_cache(self, nbytes: int) -> None:
        """Tell the source."""
        self._source.set_cache(nbytes)

    def info(self) -> Mapping[str, object]:
        """Return what the source says."""
        return self._source.info()

    def close(self) -> None:
        """Close the source."""
        self._source.close()
