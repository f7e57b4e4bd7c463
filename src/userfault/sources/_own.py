"""Sources of the user's own. NumPy is imported only where its types are needed."""

from __future__ import annotations

from dataclasses import dataclass

from userfault.errors import FormatError, RangeError
from userfault.sources._abc import ArraySource, Order, PageSource

__all__ = ["SourceRecipe"]


@dataclass(frozen=True)
class SourceRecipe:
    """A `PageSource` of the user's own, pickled as it is.

    Attributes:
        source: The source.
        dtype: What its bytes are, as text; None if it says itself, or for plain bytes.
        shape: Shape of the array in them; None if it says itself, or for one axis.
        order: Order of the memory, None for that of the source.
    """

    source: PageSource
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    order: Order | None = None

    def load(self) -> PageSource:
        """Check what the source says of itself."""
        source = self.source
        name = source.name or type(source).__name__
        _check_integer(name, "nbytes", source.nbytes, 0)
        _check_integer(name, "concurrency", source.concurrency, 1)
        _check_integer(name, "wants_cache", source.wants_cache, 0)
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
        import numpy as np

        from userfault.sources._dtypes import dtype_from_text
        from userfault.sources._layout import raw_layout
        from userfault.sources._shaped import ShapedSource

        dtype = np.dtype(np.uint8) if self.dtype is None else dtype_from_text(self.dtype)
        layout = raw_layout(dtype, self.shape, 0, self.order or "C", source.nbytes, name)
        if layout.nbytes != source.nbytes:
            raise RangeError(
                f"{name} has {source.nbytes} bytes, but shape {layout.shape} and dtype {dtype} need "
                f"{layout.nbytes}"
            )
        return ShapedSource(source, layout)


def _check_integer(name: str, attribute: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise FormatError(f"{name}.{attribute} is {value!r}: give an integer of {least} or more")
