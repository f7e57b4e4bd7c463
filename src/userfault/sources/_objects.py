"""From an object of any library to what reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from userfault.errors import FormatError, ModeError, SourcePickleError, UnsupportedDtypeError
from userfault.sources._abc import Order, PageSource, PageStore, Recipe
from userfault.sources._array_like import ArrayLikeRecipe
from userfault.sources._dtypes import check_plain, dtype_from_text
from userfault.sources._layout import ArrayLayout
from userfault.sources._native import FileData, MemoryData
from userfault.sources._own import SourceRecipe
from userfault.sources._worker_data import WorkerData
from userfault.sources._zarr_recipe import Mode

__all__ = ["array_data", "buffer_bytes", "is_buffer", "object_data"]


def object_data(
    obj: Any,
    dtype: str | None,
    shape: tuple[int, ...] | None,
    order: Order | None,
    mode: Mode = "r",
) -> tuple[WorkerData | FileData, ArrayLayout | None]:
    """Return what reads `obj`, an object that only a worker may slice, and the layout if it is known already.

    Args:
        obj: A `PageSource`, an array of zarr, h5py or tensorstore, or anything with `shape`, `dtype` and
            slicing.
        dtype: For a `PageSource`: what its bytes are.
        shape: For a `PageSource`: shape of the array in them.
        order: Order of the memory, None for the object's own.
        mode: `"r+"` if it is to be written.

    Raises:
        FormatError: It is nothing of the kind, or says itself what `dtype` and `shape` would say.
        ModeError: It is to be written, and cannot be.
        SourcePickleError: No other process can read it.
    """
    if isinstance(obj, PageSource):
        if mode == "r+" and not (isinstance(obj, PageStore) and obj.writable):
            raise ModeError(
                f"{obj.name or type(obj).__name__} cannot be written: make it a userfault.sources.PageStore, or open "
                "it with mode='c' for changes that stay private"
            )
        itemsize = 1 if dtype is None else dtype_from_text(dtype).itemsize
        return WorkerData(SourceRecipe(obj, dtype, shape, order, itemsize)), None
    if dtype is not None or shape is not None:
        raise FormatError(
            f"{type(obj).__name__} says its dtype and shape itself: leave dtype= and shape= out"
        )
    library = type(obj).__module__.partition(".")[0]
    if library == "h5py":
        return _hdf5(obj, order, mode)
    make = _LIBRARIES.get(library, _array_like)
    return WorkerData(make(obj, order, mode)), None


def _zarr(obj: Any, order: Order | None, mode: Mode) -> Recipe:
    from userfault.sources._zarr_object import zarr_recipe

    return zarr_recipe(obj, order, mode)


def _icechunk(obj: Any, order: Order | None, mode: Mode) -> Recipe:
    raise FormatError(
        f"{type(obj).__name__} is not an array: open one in it, with zarr.open_array(session.store, path=...), and "
        "give that"
    )


def _hdf5(obj: Any, order: Order | None, mode: Mode) -> tuple[WorkerData | FileData, ArrayLayout | None]:
    from userfault.sources._hdf5 import hdf5_contiguous, hdf5_recipe

    recipe = hdf5_recipe(obj, order or "C")
    if mode == "r+":
        raise ModeError(
            f"{recipe.path}:{recipe.name} cannot be written: an HDF5 file is not safe to write from two processes, and "
            "h5py keeps parts of it in memory, which would be old. Open it with mode='c' for changes that stay "
            "private, or keep the array as Zarr"
        )
    native = hdf5_contiguous(obj, recipe) if recipe.order == "C" else None
    return (WorkerData(recipe), None) if native is None else native


def _tensorstore(obj: Any, order: Order | None, mode: Mode) -> Recipe:
    from userfault.sources._tensorstore import TensorstoreRecipe

    if not hasattr(obj, "spec") or not hasattr(obj, "shape"):
        return _array_like(obj, order, mode)
    if _holds_memory(obj.spec().to_json()):
        # Pickling would be silent about it, and the worker would find an empty store: zeros.
        raise SourcePickleError(
            "this tensorstore keeps its data in the memory of this process (kvstore 'memory'), which a "
            "worker process cannot see: copy it with array.read().result()"
        )
    if mode == "r+" and not obj.writable:
        raise ModeError(
            "this tensorstore was opened for reading: open it with write=True, or here with mode='c' for changes that "
            "stay private"
        )
    return TensorstoreRecipe(obj, order or "C", mode)


def _holds_memory(spec: Any) -> bool:
    if isinstance(spec, dict):
        return spec.get("driver") == "memory" or any(map(_holds_memory, spec.values()))
    if isinstance(spec, list):
        return any(map(_holds_memory, spec))
    return isinstance(spec, str) and spec.startswith("memory://")


def _array_like(obj: Any, order: Order | None, mode: Mode) -> Recipe:
    if not all(hasattr(obj, name) for name in ("shape", "dtype", "__getitem__")):
        raise FormatError(
            f"{type(obj).__name__} cannot be opened: give a path, a URL, an array, an object with shape, "
            "dtype and slicing, or a PageSource"
        )
    if mode == "r+":
        raise ModeError(
            f"how {type(obj).__name__} is written safely is not known here: wrap it in a userfault.sources.PageStore, "
            "or open it with mode='c' for changes that stay private"
        )
    return ArrayLikeRecipe(obj, order or "C")


_LIBRARIES: dict[str, Callable[[Any, Order | None, Mode], Recipe]] = {
    "icechunk": _icechunk,
    "zarr": _zarr,
    "tensorstore": _tensorstore,
}


def array_data(array: np.ndarray[Any, Any]) -> tuple[MemoryData, ArrayLayout]:
    """Return the memory of an array, and its layout.

    Raises:
        FormatError: Its elements do not lie together.
        UnsupportedDtypeError: They are Python objects, or some of them are masked.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise UnsupportedDtypeError(
            "a masked array has a mask, which memory has not: give its .data, or fill it"
        )
    check_plain(array.dtype, "this array")
    flags = array.flags
    if not flags.c_contiguous and not flags.f_contiguous:
        raise FormatError("the elements of this array do not lie together: give numpy.ascontiguousarray(a)")
    order: Order = "C" if flags.c_contiguous else "F"
    layout = ArrayLayout(array.dtype, array.shape, order, 0)
    # The transposed view of an array in Fortran order is in C order, which is what a flat buffer needs.
    flat = (array if order == "C" else array.T).reshape(-1).view(np.ndarray)
    # Without bytes there is no address to speak of.
    buffer = flat.view(np.uint8) if array.size else np.empty(0, np.uint8)
    return MemoryData(buffer, 0, array.nbytes), layout


def is_buffer(obj: Any) -> bool:
    """Return whether `obj` exports its memory."""
    try:
        memoryview(obj).release()
    except TypeError:
        return False
    return True


def buffer_bytes(obj: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the memory of `obj` as bytes.

    Raises:
        FormatError: It does not lie together.
    """
    view = memoryview(obj)
    if not view.contiguous:
        raise FormatError(f"the memory of this {type(obj).__name__} does not lie together: copy it first")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
