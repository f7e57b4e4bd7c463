"""A source of plain bytes with a type and a shape. NumPy is imported only by who asks for the type itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from userfault.sources._abc import ArraySource, Order, PageSource, read_all

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ShapedSource"]


class ShapedSource(ArraySource):
    """A source of plain bytes, and what they are."""

    def __init__(self, source: PageSource, dtype_text: str, shape: tuple[int, ...], order: Order) -> None:
        self._source = source
        self.dtype_text = dtype_text
        self._shape = shape
        self.order = order
        self.block = source.block
        self.concurrency = source.concurrency
        self.affinity = source.affinity
        self.wants_cache = source.wants_cache
        self.name = source.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        from userfault.sources._dtypes import dtype_from_text

        return dtype_from_text(self.dtype_text)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self._source.nbytes

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
