"""Element types: which can be memory, and their form as text."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault.errors import FormatError, UnsupportedDtypeError

__all__ = ["as_dtype", "check_plain", "dtype_from_text", "dtype_to_text", "extension_dtype"]


def as_dtype(value: npt.DTypeLike) -> np.dtype[Any]:
    """Return `value` as a dtype whose elements can be memory.

    Raises:
        UnsupportedDtypeError: It is no dtype, or one of objects.
    """
    try:
        dtype = np.dtype(value)
    except TypeError as error:
        # The names that NumPy does not know may be those of ml_dtypes: "bfloat16".
        if isinstance(value, str) and (known := extension_dtype(value)) is not None:
            return known
        raise UnsupportedDtypeError(f"{value!r} is not a dtype: {error}") from None
    return check_plain(dtype)


def check_plain(dtype: np.dtype[Any], name: str = "") -> np.dtype[Any]:
    """Return `dtype` if its elements are plain bytes of one fixed size.

    Raises:
        UnsupportedDtypeError: They are, or hold, Python objects or strings of any length, or have no size.
    """
    where = f"{name}: " if name else ""
    # StringDType ("T") has a size, but its bytes are pointers.
    if dtype.hasobject or dtype.kind == "T":
        raise UnsupportedDtypeError(
            f"{where}elements of dtype {dtype} are Python objects or strings of any length, which cannot be "
            "paged; convert them to a type of fixed size, such as 'S16' or 'float64'"
        )
    if dtype.subdtype is not None:
        raise UnsupportedDtypeError(
            f"{where}dtype {dtype} has a shape of its own; add it to the array's shape"
        )
    if dtype.itemsize == 0:
        raise UnsupportedDtypeError(f"{where}elements of dtype {dtype} have no bytes; give one with a size")
    return dtype


def dtype_to_text(dtype: np.dtype[Any]) -> str:
    """Return `dtype` as text that `dtype_from_text` reads: `'<f4'`, `'bfloat16'`, `"[('a', '<i4')]"`."""
    # 2: a type that another library registered, such as those of ml_dtypes; its "str" is only "V2" or "f1".
    if dtype.isbuiltin == 2:
        return dtype.name
    with warnings.catch_warnings():
        # Metadata, such as h5py's names of enum values, is not part of the bytes; NumPy warns that it is
        # dropped.
        warnings.simplefilter("ignore", UserWarning)
        descr: object = np.lib.format.dtype_to_descr(dtype)
    return descr if isinstance(descr, str) else repr(descr)


def dtype_from_text(text: str) -> np.dtype[Any]:
    """Return the dtype that `dtype_to_text` wrote.

    Raises:
        FormatError: It did not.
        UnsupportedDtypeError: Its elements cannot be memory, or need ml_dtypes, which is not installed.
    """
    if not text.startswith("["):
        return as_dtype(text)
    try:
        dtype = np.lib.format.descr_to_dtype(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError) as error:
        raise FormatError(f"{text!r} is not a dtype: {error}") from error
    return check_plain(dtype)


def extension_dtype(name: str) -> np.dtype[Any] | None:
    """Return the dtype of ml_dtypes with this `name`, None if there is none or ml_dtypes is not installed."""
    if not name.isidentifier() or importlib.util.find_spec("ml_dtypes") is None:
        return None
    scalar = getattr(importlib.import_module("ml_dtypes"), name, None)
    return np.dtype(scalar) if isinstance(scalar, type) else None
