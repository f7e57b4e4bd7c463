"""Arrays of tensorstore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault import options
from userfault.errors import SourceError, UserfaultError
from userfault.sources._abc import ArraySource, Order
from userfault.sources._chunked_store import ChunkedStore
from userfault.sources._dtypes import check_plain
from userfault.sources._empty import EmptySource
from userfault.sources._sliced import Bytes, SlicedSource
from userfault.sources._zarr_recipe import Mode

__all__ = ["TensorstoreRecipe"]

_LARGEST = 1 << 60


@dataclass(frozen=True)
class TensorstoreRecipe:
    """A `tensorstore.TensorStore`.

    Attributes:
        array: Pickled as its spec, and opened again in the worker.
        order: Order of the memory.
        mode: `"r+"` if it is to be written.
    """

    array: Any
    order: Order = "C"
    mode: Mode = "r"

    def load(self) -> ArraySource:
        """Look at the array that unpickling opened."""
        import tensorstore

        array = self.array
        dtype = check_plain(np.dtype(array.dtype.numpy_dtype), "this tensorstore")
        shape = tuple(map(int, array.shape))
        if any(length >= _LARGEST for length in shape):
            raise SourceError(f"this tensorstore has no bounds: {array.domain}")
        if 0 in shape:
            return EmptySource(dtype, shape, self.order, "tensorstore")
        if shape:
            # tensorstore slices by coordinates, which need not begin at 0.
            array = array[tensorstore.d[:].translate_to[0]]
        layout = array.chunk_layout
        chunks = _lengths(layout.read_chunk.shape) if shape else None
        if self.mode == "r":
            return TensorstoreSource(array, dtype, shape, chunks, self.order)
        units = _lengths(layout.write_chunk.shape) if shape else None
        if units is None or chunks is None or any(unit % n for unit, n in zip(units, chunks, strict=True)):
            chunks = units
        return TensorstoreStore(array, dtype, shape, chunks, units, self.order)


class TensorstoreSource(SlicedSource):
    """An array of tensorstore."""

    def __init__(
        self,
        array: Any,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        chunks: tuple[int, ...] | None,
        order: Order,
    ) -> None:
        super().__init__(array, dtype, shape, chunks, order, options.cpu_count())
        self.name = "tensorstore"

    def load_chunk(self, place: tuple[int, ...], out: Bytes, need: int) -> int:
        """Let tensorstore read one chunk."""
        try:
            return super().load_chunk(place, out, need)
        except UserfaultError:
            raise
        except Exception as error:  # tensorstore has ValueError for nearly everything
            raise SourceError(f"tensorstore: chunk {place}: {error}", detail=str(error)) from error

    def read_part(self, selection: tuple[slice, ...]) -> Any:
        """Slice the object."""
        return self._array[selection].read().result()

    def info(self) -> dict[str, object]:
        """Return the spec and chunks."""
        return {"format": "tensorstore", "chunks": list(self._chunks), "spec": self._array.spec().to_json()}


class TensorstoreStore(ChunkedStore, TensorstoreSource):
    """An array of tensorstore that can be written."""

    # What its codecs do is not known here.
    lossless = False

    def __init__(
        self,
        array: Any,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        chunks: tuple[int, ...] | None,
        units: tuple[int, ...] | None,
        order: Order,
    ) -> None:
        super().__init__(array, dtype, shape, chunks, order)
        self.set_units(units)

    def store_part(self, selection: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Let tensorstore write, and wait until it has committed; it syncs files by itself."""
        self._array[selection].write(values).result()


def _lengths(shape: Any) -> tuple[int, ...] | None:
    """Return the shape of chunks, None if not each axis has one."""
    return tuple(map(int, shape)) if shape and all(shape) else None
