"""Where an array lies in a file or other stretch of bytes. Without NumPy: workers ask, too."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

from userfault.errors import FormatError, RangeError, TruncatedError
from userfault.sources._abc import Order

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ArrayLayout", "as_order", "as_shape", "raw_layout", "raw_shape"]


@dataclass(frozen=True)
class ArrayLayout:
    """Where an array lies.

    Attributes:
        dtype: Type of the elements.
        shape: Shape of the array.
        order: `"C"` or `"F"`.
        offset: First byte.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Order
    offset: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check_fits(self, available: int, name: str) -> None:
        """Check that the array ends within `available` bytes.

        Raises:
            TruncatedError: It does not.
        """
        _check_fits(str(self.dtype), self.nbytes, self.shape, self.offset, available, name)


def as_shape(value: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return a shape given as an integer or as integers.

    Raises:
        RangeError: It is neither, or has a negative length.
    """
    try:
        given = value if isinstance(value, Iterable) else (value,)
        shape = tuple(operator.index(length) for length in given)
    except TypeError:
        raise RangeError(f"shape={value!r} is not a shape: give integers") from None
    if any(length < 0 for length in shape):
        raise RangeError(f"shape={value!r} has a negative length")
    return shape


def as_order(value: str) -> Order:
    """Return an order.

    Raises:
        FormatError: It is neither `"C"` nor `"F"`.
    """
    if value == "C":
        return "C"
    if value == "F":
        return "F"
    raise FormatError(f"order={value!r} is not known; give 'C' or 'F'")


def raw_layout(
    dtype: np.dtype[Any], shape: tuple[int, ...] | None, offset: int, order: Order, available: int, name: str
) -> ArrayLayout:
    """Return the layout of bytes that say nothing of themselves, by the rules of `numpy.memmap`.

    Args:
        dtype: Type of the elements.
        shape: Shape; None for one axis with all elements from `offset` to the end.
        offset: First byte of the array.
        order: `"C"` or `"F"`.
        available: How many bytes there are in all.
        name: What to call them in messages.

    Raises:
        RangeError: `offset` is negative or beyond the end.
        FormatError: Without a shape, the bytes are not a whole number of elements.
        TruncatedError: The array does not fit.
    """
    found = raw_shape(str(dtype), dtype.itemsize, shape, offset, available, name)
    return ArrayLayout(dtype, found, order, offset)


def raw_shape(
    dtype: str, itemsize: int, shape: tuple[int, ...] | None, offset: int, available: int, name: str
) -> tuple[int, ...]:
    """Return the shape of bytes that say nothing of themselves; as `raw_layout`, for a type of which the size is known.

    Args:
        dtype: What messages call the type of the elements.
        itemsize: Bytes of an element.
        shape: As in `raw_layout`.
        offset: As in `raw_layout`.
        available: As in `raw_layout`.
        name: As in `raw_layout`.

    Raises:
        RangeError: As `raw_layout`.
        FormatError: As `raw_layout`.
        TruncatedError: As `raw_layout`.
    """
    if not 0 <= offset <= available:
        raise RangeError(f"offset={offset} is out of range: {name} has {available} bytes")
    if shape is None:
        count, rest = divmod(available - offset, itemsize)
        if rest:
            raise FormatError(
                f"{name} has {available - offset} bytes from offset {offset} on, which is not a multiple of "
                f"the {itemsize} bytes of dtype {dtype}; give shape="
            )
        shape = (count,)
    _check_fits(dtype, math.prod(shape) * itemsize, shape, offset, available, name)
    return shape


def _check_fits(
    dtype: str, nbytes: int, shape: tuple[int, ...], offset: int, available: int, name: str
) -> None:
    if offset + nbytes > available:
        raise TruncatedError(
            f"{name} is truncated: an array of shape {shape} and dtype {dtype} that begins at byte {offset} needs "
            f"{offset + nbytes} bytes, but there are {available}"
        )
