"""Sources of the user's own. NumPy is imported only where its types are needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from userfault.errors import FormatError, RangeError
from userfault.sources._abc import ArraySource, Order, PageSource, PageStore

__all__ = ["SourceRecipe"]


@dataclass(frozen=True)
class SourceRecipe:
    """A `PageSource` of the user's own, pickled as it is.

    Attributes:
        source: The source.
        dtype: What its bytes are, as text; None if it says itself, or for plain bytes.
        shape: Shape of the array in them; None if it says itself, or for one axis.
        order: Order of the memory, None for that of the source.
        itemsize: Bytes of an element of `dtype`, so that the worker need not import NumPy; None asks NumPy.
    """

    source: PageSource
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    order: Order | None = None
    itemsize: int | None = None

    def load(self) -> PageSource:
        """Check what the source says of itself."""
        source = self.source
        name = source.name or type(source).__name__
        _check_integer(name, "nbytes", source.nbytes, 0)
        _check_integer(name, "concurrency", source.concurrency, 1)
        _check_integer(name, "wants_cache", source.wants_cache, 0)
        if isinstance(source, PageStore) and source.write_unit is not None:
            _check_integer(name, "write_unit", source.write_unit, 1)
        if isinstance(source, ArraySource):
            from userfault.sources._dtypes import check_plain

            check_plain(source.dtype, name)
            if self.dtype is None and self.shape is None:
                if self.order not in (None, source.order):
                    raise FormatError(
                        f"{name} is in order {source.order!r}; order={self.order!r} is not its own"
                    )
                return source
        elif self.dtype is None and self.shape is None and self.order in (None, "C"):
            return source  # plain bytes need no NumPy here
        from userfault.sources._layout import raw_shape
        from userfault.sources._shaped import ShapedSource
        from userfault.sources._shaped_store import ShapedStore

        dtype, order, itemsize = self.dtype or "|u1", self.order or "C", self.itemsize
        if itemsize is None:
            from userfault.sources._dtypes import dtype_from_text

            itemsize = dtype_from_text(dtype).itemsize
        shape = raw_shape(dtype, itemsize, self.shape, 0, source.nbytes, name)
        nbytes = math.prod(shape) * itemsize
        if nbytes != source.nbytes:
            raise RangeError(
                f"{name} has {source.nbytes} bytes, but shape {shape} and dtype {dtype} need {nbytes}"
            )
        if isinstance(source, PageStore):
            return ShapedStore(source, dtype, shape, order)
        return ShapedSource(source, dtype, shape, order)


def _check_integer(name: str, attribute: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise FormatError(f"{name}.{attribute} is {value!r}: give an integer of {least} or more")
