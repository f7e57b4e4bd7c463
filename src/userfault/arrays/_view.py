"""Arrays that are views of a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from userfault.sources._layout import ArrayLayout

if TYPE_CHECKING:
    from userfault.memory import PagedMemory

__all__ = ["view_of"]


def view_of(memory: PagedMemory | None, layout: ArrayLayout, writable: bool) -> np.ndarray[Any, Any]:
    """Return the array at `layout` in `memory`, writable as the memory is; it keeps the memory alive.

    An array without elements has no memory to keep: `writable` is what it says of itself.
    """
    if memory is None or layout.nbytes == 0:
        array: np.ndarray[Any, Any] = np.empty(layout.shape, layout.dtype, order=layout.order)
        array.flags.writeable = writable
        return array
    # np.ndarray(buffer=...) would keep the memory alive too, but not its buffer exported: close() could not
    # tell that an array is still there.
    buffer: Any = memory
    count = layout.nbytes // layout.dtype.itemsize
    flat: np.ndarray[Any, Any] = np.frombuffer(buffer, layout.dtype, count, layout.offset)
    return flat.reshape(layout.shape, order=layout.order)
