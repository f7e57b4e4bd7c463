"""The header of NumPy's `.npy` files, versions 1, 2 and 3.

NumPy parses headers too, but only from file objects, and version 3 only inside `numpy.load`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from userfault.errors import FormatError, TruncatedError
from userfault.sources._dtypes import check_plain
from userfault.sources._layout import ArrayLayout

__all__ = ["NPY_MAGIC", "npy_layout"]

NPY_MAGIC = b"\x93NUMPY"

# Longer than any header of a real dtype; a parser for Python literals is not to be fed with gigabytes.
_MOST_HEADER = 1 << 20
# Python 2 wrote long integers like this.
_LONG = re.compile(r"(?<=\d)L\b")


def npy_layout(read: Callable[[int, int], bytes], available: int, name: str) -> ArrayLayout:
    """Return where the array of a `.npy` file lies.

    Args:
        read: Gives bytes by offset and length, fewer at the end.
        available: Length of the file.
        name: What to call it in messages.

    Raises:
        FormatError: It is not a `.npy` file.
        TruncatedError: It ends before its array does.
        UnsupportedDtypeError: Its elements are Python objects.
    """
    start = read(0, 12)
    if start[:6] != NPY_MAGIC[: len(start)]:
        raise FormatError(f"{name} is not a .npy file: it begins with {start[:6]!r} instead of {NPY_MAGIC!r}")
    if len(start) < 10:
        raise TruncatedError(f"{name} is truncated: it has only {len(start)} bytes")
    major, minor = start[6], start[7]
    if major not in (1, 2, 3) or minor != 0:
        raise FormatError(
            f"{name} has version {major}.{minor} of the .npy format; 1.0, 2.0 and 3.0 are known"
        )
    width = 2 if major == 1 else 4
    length = int.from_bytes(start[8 : 8 + width], "little")
    if length > _MOST_HEADER:
        raise FormatError(f"{name} has a header of {length} bytes, which no .npy file needs")
    header = read(8 + width, length)
    if len(header) < length or len(start) < 8 + width:
        raise TruncatedError(f"{name} is truncated: its header of {length} bytes is not all there")
    layout = _parse(header.decode("utf-8" if major == 3 else "latin-1", "replace"), 8 + width + length, name)
    layout.check_fits(available, name)
    return layout


def _parse(text: str, offset: int, name: str) -> ArrayLayout:
    try:
        try:
            fields = ast.literal_eval(text.strip())
        except SyntaxError:
            fields = ast.literal_eval(_LONG.sub("", text).strip())
        descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
        dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(descr)
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise FormatError(f"{name} has a .npy header that cannot be understood: {error}") from error
    if (
        not isinstance(fortran, bool)
        or not isinstance(shape, tuple)
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise FormatError(f"{name} has a .npy header with shape {shape!r} and fortran_order {fortran!r}")
    return ArrayLayout(check_plain(dtype, name), shape, "F" if fortran and len(shape) > 1 else "C", offset)
