"""empty() and zeros(): arrays of no file, larger than RAM."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from userfault.arrays._request import check_delivery
from userfault.arrays._view import view_of
from userfault.arrays._watch import be_watched
from userfault.memory import Delivery, PagedMemory
from userfault.sources._dtypes import as_dtype
from userfault.sources._layout import ArrayLayout, as_order, as_shape
from userfault.sources._native import ZeroData

__all__ = ["empty", "zeros"]


def zeros(
    shape: SupportsIndex | Iterable[SupportsIndex],
    dtype: npt.DTypeLike = np.float64,
    *,
    order: Literal["C", "F"] = "C",
    memory: SupportsIndex | str | None = None,
    block: SupportsIndex | str | None = None,
    name: str | None = None,
    delivery: Delivery | None = None,
) -> np.ndarray[Any, Any]:
    """Return a new, writable array of zeros that may be larger than RAM.

    What does not fit into the budget waits, compressed, in a scratch file without a name (`USERFAULT_SCRATCH` names
    the folder). It ends with the array. What was never written takes no space anywhere.

    Args:
        shape: Shape of the array.
        dtype: Type of the elements.
        order: `"C"` or `"F"`.
        memory: Most bytes of it to keep resident, or text such as `"256 MiB"`; None shares `userfault.limit()`.
        block: Bytes to load and evict at once: a power of two from the page size to 2 MiB; None for 64 KiB.
        name: What to call it in messages.
        delivery: As in `userfault.open`.

    Raises:
        RangeError: `shape` is none.
        UnsupportedDtypeError: The elements would be Python objects.
        BudgetError: The budget is too small, or no size.
        PrivilegeError: This user may not use userfaultfd.
        KernelError: The kernel refused, for want of address space.

    Example:
        >>> import userfault
        >>> a = userfault.zeros((1000, 1000, 1000), "f4", memory="64 MiB")
        >>> a[500, 500, :3] = 1, 2, 3
        >>> a[500, 500, :4]
        array([1., 2., 3., 0.], dtype=float32)
    """
    return _new("zeros" if name is None else name, shape, dtype, order, memory, block, delivery)


def empty(
    shape: SupportsIndex | Iterable[SupportsIndex],
    dtype: npt.DTypeLike = np.float64,
    *,
    order: Literal["C", "F"] = "C",
    memory: SupportsIndex | str | None = None,
    block: SupportsIndex | str | None = None,
    name: str | None = None,
    delivery: Delivery | None = None,
) -> np.ndarray[Any, Any]:
    """Return a new, writable array that may be larger than RAM; as `zeros`, but do not rely on what is in it.

    Args:
        shape: Shape of the array.
        dtype: Type of the elements.
        order: `"C"` or `"F"`.
        memory: As in `zeros`.
        block: As in `zeros`.
        name: What to call it in messages.
        delivery: As in `userfault.open`.

    Raises:
        Exception: As `zeros`.
    """
    return _new("empty" if name is None else name, shape, dtype, order, memory, block, delivery)


def _new(
    name: str,
    shape: SupportsIndex | Iterable[SupportsIndex],
    dtype: npt.DTypeLike,
    order: str,
    budget: SupportsIndex | str | None,
    block: SupportsIndex | str | None,
    delivery: Delivery | None,
) -> np.ndarray[Any, Any]:
    lengths, kind = as_shape(shape), as_dtype(dtype)
    layout = ArrayLayout(kind, lengths, as_order(order), 0)
    be_watched()
    memory = None
    if math.prod(lengths) * kind.itemsize:
        memory = PagedMemory(
            ZeroData(layout.nbytes),
            name=name,
            memory=budget,
            block=block,
            mode="c",
            delivery=check_delivery(delivery),
        )
    return view_of(memory, layout, writable=True)
