"""The header of `.safetensors` files: named tensors in one stretch of bytes.

Eight bytes with the length of the header, the header as JSON, the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from userfault.errors import FormatError, TruncatedError, UnsupportedDtypeError
from userfault.sources._dtypes import extension_dtype

__all__ = ["TensorInfo", "TensorTable", "tensor_dtype", "tensor_table"]

# As the safetensors library has it.
_MOST_HEADER = 100_000_000

_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
}
# Names in ml_dtypes, and bytes of an element.
_EXTENSIONS = {
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor.

    Attributes:
        dtype: Its type, in the words of the format: `"F32"`, `"BF16"`.
        shape: Its shape.
        start: First byte in the data.
        stop: First byte after it.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorTable:
    """All tensors of a file.

    Attributes:
        tensors: By name, in the order of the header.
        metadata: What the writer noted.
        offset: First byte of the data in the file.
        nbytes: Bytes of data.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    offset: int = 0
    nbytes: int = 0

    def to_extra(self) -> dict[str, object]:
        """Return it for `Description.extra`."""
        rows = {name: [t.dtype, list(t.shape), t.start, t.stop] for name, t in self.tensors.items()}
        return {"tensors": rows, "metadata": self.metadata, "offset": self.offset, "nbytes": self.nbytes}

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> TensorTable:
        """Return what `to_extra` wrote."""
        tensors = {
            name: TensorInfo(dtype, tuple(shape), start, stop)
            for name, (dtype, shape, start, stop) in extra["tensors"].items()
        }
        return cls(tensors, dict(extra["metadata"]), extra["offset"], extra["nbytes"])


def tensor_dtype(name: str, info: TensorInfo) -> np.dtype[Any]:
    """Return NumPy's type for the elements of the tensor `name`.

    Raises:
        UnsupportedDtypeError: There is none, or it needs ml_dtypes, which is not installed.
    """
    if info.dtype in _DTYPES:
        return np.dtype(_DTYPES[info.dtype])
    if info.dtype not in _EXTENSIONS:
        raise UnsupportedDtypeError(f"tensor {name!r} has dtype {info.dtype}, which NumPy has no type for")
    dtype = extension_dtype(_EXTENSIONS[info.dtype][0])
    if dtype is None:
        raise UnsupportedDtypeError(
            f"tensor {name!r} has dtype {info.dtype}, which needs ml_dtypes: pip install 'userfault[ml]'"
        )
    return dtype


def tensor_table(read: Callable[[int, int], bytes], available: int, name: str) -> TensorTable:
    """Return the tensors of a `.safetensors` file.

    Args:
        read: Gives bytes by offset and length, fewer at the end.
        available: Length of the file.
        name: What to call it in messages.

    Raises:
        FormatError: It is not such a file, or its tensors overlap or do not have the size of their shape.
        TruncatedError: It ends before its tensors do.
    """
    start = read(0, 8)
    if len(start) < 8:
        raise TruncatedError(f"{name} is truncated: it has only {len(start)} bytes")
    length = struct.unpack("<Q", start)[0]
    if length > _MOST_HEADER:
        raise FormatError(f"{name} is not a .safetensors file: its header would have {length} bytes")
    text = read(8, length)
    if text[:1] not in (b"{", b""):
        raise FormatError(f"{name} is not a .safetensors file: its header begins with {text[:8]!r}")
    if len(text) < length:
        raise TruncatedError(f"{name} is truncated: its header of {length} bytes is not all there")
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {key: _tensor(value) for key, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{name} has a .safetensors header that cannot be understood: {error}") from error
    offset = 8 + length
    end = _check(tensors, name)
    if offset + end > available:
        raise TruncatedError(
            f"{name} is truncated: its tensors need {offset + end} bytes, but there are {available}"
        )
    return TensorTable(tensors, {str(k): str(v) for k, v in metadata.items()}, offset, end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


def _tensor(value: Any) -> TensorInfo:
    start, stop = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"shape {shape} and offsets {start}, {stop} are not all natural numbers")
    return TensorInfo(str(value["dtype"]), shape, start, stop)


def _check(tensors: Mapping[str, TensorInfo], name: str) -> int:
    """Check sizes and overlaps; return where the last tensor ends."""
    for key, info in tensors.items():
        if info.dtype in _DTYPES:
            itemsize = np.dtype(_DTYPES[info.dtype]).itemsize
        elif info.dtype in _EXTENSIONS:
            itemsize = _EXTENSIONS[info.dtype][1]
        else:
            # Unknown types may be smaller than a byte; they are refused when they are asked for.
            continue
        if info.stop - info.start != math.prod(info.shape) * itemsize:
            raise FormatError(
                f"{name}: tensor {key!r} has {info.stop - info.start} bytes, but its shape {info.shape} and "
                f"dtype {info.dtype} need {math.prod(info.shape) * itemsize}"
            )
    end = 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.stop < info.start or info.start < end:
            raise FormatError(f"{name}: tensor {key!r} overlaps another one, or ends before it begins")
        end = info.stop
    return end
