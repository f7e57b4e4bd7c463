"""Plans from the metadata documents of common Zarr arrays, without importing zarr.

Importing zarr takes longer than all else that is needed to read a first element. What is not certain here (an
unusual codec, type, grid or fill value, a malformed document) is answered with None: then zarr decides, and
`_zarr_library` makes the plan from zarr's own objects. A test compares the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from userfault.sources._codecs import CRC32C_AT_END
from userfault.sources._zarr_plan import ZarrPlan

__all__ = ["V2_CODECS", "V3_CODECS", "is_array", "plan_v2", "plan_v3"]

# Codecs of numcodecs whose decoded form is the bytes of plain elements.
V2_CODECS = frozenset(
    {
        "adler32",
        "astype",
        "bitround",
        "blosc",
        "bz2",
        "crc32",
        "delta",
        "fixedscaleoffset",
        "fletcher32",
        "gzip",
        "jenkins_lookup3",
        "lz4",
        "lzma",
        "packbits",
        "quantize",
        "shuffle",
        "zlib",
        "zstd",
    }
)
# Compressors of Zarr v3, by name; how they were configured does not matter to a decoder.
V3_CODECS = frozenset({"blosc", "gzip", "zstd"})

_V3_DTYPES = frozenset(
    f"{kind}{bits}"
    for kind, widths in {
        "int": (8, 16, 32, 64),
        "uint": (8, 16, 32, 64),
        "float": (16, 32, 64),
        "complex": (64, 128),
    }.items()
    for bits in widths
) | {"bool"}
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_V3_KEYS = frozenset(
    {
        "attributes",
        "chunk_grid",
        "chunk_key_encoding",
        "codecs",
        "data_type",
        "dimension_names",
        "fill_value",
        "node_type",
        "shape",
        "storage_transformers",
        "zarr_format",
    }
)


def is_array(document: bytes, zarr_format: int) -> bool | None:
    """Return whether `document` is the metadata of an array; None if it is not metadata at all."""
    try:
        parsed = json.loads(document)
    except ValueError:
        return None
    if not isinstance(parsed, dict) or parsed.get("zarr_format") != zarr_format:
        return None
    return zarr_format == 2 or parsed.get("node_type") == "array"


def plan_v3(document: bytes) -> ZarrPlan | None:
    """Return the plan for the content of a `zarr.json`, None if zarr is to decide."""
    try:
        meta = json.loads(document)
        if not set(meta) <= _V3_KEYS or meta["zarr_format"] != 3 or meta.get("storage_transformers"):
            return None
        if meta["data_type"] not in _V3_DTYPES or _name(meta["chunk_grid"]) != "regular":
            return None
        # zarr's data types are little-endian, whatever the machine.
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        shape = _lengths(meta["shape"], 0)
        chunks = _lengths(meta["chunk_grid"]["configuration"]["chunk_shape"], 1)
        fill = _fill(meta["fill_value"], dtype)
        keys = _v3_keys(meta["chunk_key_encoding"])
        steps = _v3_steps(meta["codecs"], dtype, len(shape))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if fill is None or keys is None or steps is None or len(shape) != len(chunks):
        return None
    key_format, separator = keys
    axes, stored, codecs = steps
    return ZarrPlan(key_format, shape, chunks, dtype, stored, axes, codecs, fill, separator)


def plan_v2(document: bytes) -> ZarrPlan | None:
    """Return the plan for the content of a `.zarray`, None if zarr is to decide."""
    try:
        meta = json.loads(document)
        typestr, order, separator = meta["dtype"], meta["order"], meta.get("dimension_separator", ".")
        if meta["zarr_format"] != 2 or not isinstance(typestr, str) or typestr[1:2] not in "biufc":
            return None
        if order not in ("C", "F") or separator not in (".", "/"):
            return None
        dtype = np.dtype(typestr)
        shape, chunks = _lengths(meta["shape"], 0), _lengths(meta["chunks"], 1)
        given = meta["fill_value"]
        fill = bytes(dtype.itemsize) if given is None else _fill(given, dtype)
        codecs = (*(meta.get("filters") or ()), *((meta["compressor"],) if meta["compressor"] else ()))
        known = all(codec["id"] in V2_CODECS for codec in codecs)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if fill is None or not known or len(shape) != len(chunks):
        return None
    axes = tuple(range(len(shape)))
    axes = axes[::-1] if order == "F" else axes
    return ZarrPlan(2, shape, chunks, dtype, dtype, axes, codecs, fill, separator)


def _name(named: Any) -> str:
    return str(named["name"]) if isinstance(named, dict) else str(named)


def _lengths(value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= least for n in value):
        raise ValueError("not a shape")
    return tuple(value)


def _fill(value: Any, dtype: np.dtype[Any]) -> bytes | None:
    """Return the bytes of a fill value that has one clear meaning."""
    match dtype.kind:
        case "b" if isinstance(value, bool):
            number: Any = value
        case "i" | "u" if type(value) is int:
            number = value
        case "f" if type(value) in (int, float) or value in _SPECIAL_FLOATS:
            number = _SPECIAL_FLOATS.get(value, value) if isinstance(value, str) else value
        case _:
            return None
    return np.array(number, dtype).tobytes()


def _v3_keys(encoding: Any) -> tuple[int, str] | None:
    """Return the format that numbers chunks in this way, and the separator."""
    name = _name(encoding)
    if name not in ("default", "v2"):
        return None
    config = encoding.get("configuration", {}) if isinstance(encoding, dict) else {}
    separator = config.get("separator", "/" if name == "default" else ".")
    return (3 if name == "default" else 2, separator) if separator in (".", "/") else None


def _v3_steps(
    codecs: Any, dtype: np.dtype[Any], ndim: int
) -> tuple[tuple[int, ...], np.dtype[Any], tuple[Mapping[str, Any], ...]] | None:
    """Return the axes of a stored chunk, the type of its elements, and what compresses its bytes."""
    names = [_name(codec) for codec in codecs]
    if names.count("bytes") != 1:
        return None
    middle = names.index("bytes")
    axes = tuple(range(ndim))
    for codec in codecs[:middle]:
        if _name(codec) != "transpose":
            return None
        order = codec["configuration"]["order"]
        if sorted(order) != list(range(ndim)):
            return None
        axes = tuple(axes[axis] for axis in order)
    config = codecs[middle].get("configuration", {}) if isinstance(codecs[middle], dict) else {}
    endian = config.get("endian", "little")
    if endian not in ("little", "big") or (dtype.itemsize > 1 and "endian" not in config):
        return None
    compressors: list[Mapping[str, Any]] = []
    for codec in codecs[middle + 1 :]:
        name = _name(codec)
        if name == "crc32c":
            compressors.append({"id": CRC32C_AT_END})
        elif name in V3_CODECS:
            compressors.append({"id": name})
        else:
            return None
    return axes, dtype.newbyteorder(">" if endian == "big" else "<"), tuple(compressors)
