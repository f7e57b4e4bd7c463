"""Objects of any other library: anything with `shape`, `dtype` and slicing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from userfault.errors import FormatError
from userfault.sources._abc import ArraySource, Order
from userfault.sources._dtypes import check_plain

__all__ = ["ArrayLikeRecipe"]


@dataclass(frozen=True)
class ArrayLikeRecipe:
    """An object with `shape`, `dtype` and slicing, pickled as it is.

    Attributes:
        array: The object.
        order: Order of the memory.
    """

    array: Any
    order: Order = "C"

    def load(self) -> ArraySource:
        """Look at the object."""
        from userfault.sources._empty import EmptySource
        from userfault.sources._sliced import SlicedSource

        name = type(self.array).__name__
        try:
            shape = tuple(int(length) for length in self.array.shape)
            dtype = np.dtype(self.array.dtype)
        except (TypeError, ValueError) as error:
            raise FormatError(
                f"{name} has no shape of integers, or no dtype that NumPy knows: {error}"
            ) from error
        check_plain(dtype, name)
        if 0 in shape:
            return EmptySource(dtype, shape, self.order, name)
        # Nothing is known of its thread-safety.
        source = SlicedSource(self.array, dtype, shape, _chunks(self.array, shape), self.order, threads=1)
        source.name = name
        return source


def _chunks(array: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the chunks of an object that tells them as zarr, h5py or Dask do, None otherwise."""
    chunks: Any = getattr(array, "chunks", None)
    if not isinstance(chunks, tuple) or len(chunks) != len(shape):
        return None
    if all(isinstance(chunk, tuple) and chunk for chunk in chunks):
        # Dask's: the lengths of all chunks on each axis. Only where they are equal do ours match them.
        chunks = tuple(chunk[0] if len({*chunk[:-1]}) <= 1 else max(chunk) for chunk in chunks)
    if all(isinstance(chunk, int | np.integer) and chunk > 0 for chunk in chunks):
        return tuple(int(chunk) for chunk in chunks)
    return None
