"""Columns of whole numbers in few bytes: as offsets from their smallest, as differences where that is narrower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column = NDArray[np.int64]

__all__ = ["append_column", "append_number", "read_column", "read_number"]

_DIFFERENCES = 0x10
_WIDTH = 0x0F


def append_number(out: bytearray, value: int) -> None:
    """Append a whole number: zigzag (0, -1, 1, -2, ... as 0, 1, 2, 3, ...), seven bits a byte, lowest first."""
    rest = value * 2 if value >= 0 else -value * 2 - 1
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)


def read_number(data: memoryview, at: int) -> tuple[int, int]:
    """Return a number and where the next thing begins. IndexError: the data ends before."""
    rest, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        rest |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (rest >> 1) ^ -(rest & 1), at
        if shift > 70:
            raise ValueError("a number of more than 64 bits")


def append_column(out: bytearray, values: NDArray[Any]) -> None:
    """Append a column; its length is not written. Values are below 2**62 either side of zero."""
    if not len(values):
        return
    values = values.astype(np.int64, copy=False)
    steps = np.diff(values)
    low, span = _range(values)
    low_step, span_step = _range(steps)
    if _bytes(span_step) < _bytes(span):
        _append(out, _DIFFERENCES, int(values[0]), steps, low_step, span_step)
    else:
        _append(out, 0, None, values, low, span)


def _range(values: Column) -> tuple[int, int]:
    if not len(values):
        return 0, 0
    low = int(values.min())
    return low, int(values.max()) - low


def _bytes(span: int) -> int:
    return (span.bit_length() + 7) // 8


def _append(out: bytearray, form: int, first: int | None, values: Column, low: int, span: int) -> None:
    offsets = values - low
    scale = 1
    if span > 0xFF:
        # Times that were rounded to a microsecond, or blocks at even places, have a divisor in common. A few tell where
        # there is none.
        scale = int(np.gcd.reduce(offsets[:16])) or span
        if scale > 1:
            scale = int(np.gcd.reduce(offsets))
        if scale > 1:
            offsets = offsets // scale
            span //= scale
    width = _bytes(span)
    out.append(form | width)
    if first is not None:
        append_number(out, first)
    append_number(out, low)
    append_number(out, scale)
    # The lowest bytes of all values, then the next ones: compression finds more in bytes that are alike.
    out += offsets.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()


def read_column(data: memoryview, at: int, length: int) -> tuple[Column, int]:
    """Return a column and where the next thing begins.

    Raises:
        IndexError: The data ends before.
        ValueError: It is no column.
    """
    if not length:
        return np.zeros(0, np.int64), at
    form = data[at]
    at += 1
    width = form & _WIDTH
    if width > 8 or form & ~(_WIDTH | _DIFFERENCES):
        raise ValueError(f"a column of form {form:#x}")
    first = 0
    if form & _DIFFERENCES:
        first, at = read_number(data, at)
        length -= 1
    low, at = read_number(data, at)
    scale, at = read_number(data, at)
    offsets = np.zeros((length, 8), np.uint8)
    if width:
        offsets[:, :width] = np.frombuffer(data, np.uint8, width * length, at).reshape(width, length).T
    at += width * length
    values = offsets.view("<u8").reshape(-1).astype(np.int64)
    if scale != 1:
        values *= scale
    values += low
    if form & _DIFFERENCES:
        values = np.cumsum(np.concatenate(([first], values)), dtype=np.int64)
    return values, at
