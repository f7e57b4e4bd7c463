"""Zarr arrays through zarr itself: plans from its metadata objects, and names of the arrays in a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from userfault.errors import FormatError, SourceError, SourceNotFoundError, UserfaultError
from userfault.sources._codecs import CRC32C_AT_END
from userfault.sources._stores import KeyStore
from userfault.sources._zarr_json import V2_CODECS, V3_CODECS
from userfault.sources._zarr_plan import ZarrPlan

__all__ = ["list_arrays", "open_array", "plan_of"]

_MOST_LISTED = 40


def open_array(
    store: KeyStore, zarr_format: int, *, writable: bool = False, write_empty_chunks: bool | None = None
) -> Any:
    """Return zarr's array at the root of `store`.

    Args:
        store: Where its keys are.
        zarr_format: 2 or 3.
        writable: Whether it is to be written.
        write_empty_chunks: Whether chunks of nothing but the fill value are to be stored; None for zarr's default.

    Raises:
        ModeError: It is to be writable, and cannot be.
        FormatError: zarr does not understand it.
        SourceError: It cannot be read.
    """
    import zarr

    try:
        # An array takes this setting when it is opened; its argument is only heard when one is created.
        setting = {} if write_empty_chunks is None else {"array.write_empty_chunks": write_empty_chunks}
        with zarr.config.set(setting):
            return zarr.open_array(
                store.zarr_store(writable=writable),
                path=store.zarr_path,
                mode="r+" if writable else "r",
                zarr_format=zarr_format,  # type: ignore[arg-type]
            )
    except UserfaultError:
        raise
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{store.location}: {error}", detail=str(error)) from error
    except OSError as error:
        raise SourceError(f"{store.location}: {error}", detail=str(error), errno=error.errno) from error
    except Exception as error:  # malformed metadata has many faces in zarr
        detail = f"{type(error).__name__}: {error}"
        raise FormatError(f"{store.location} is not an array that zarr can read: {detail}") from error


def list_arrays(store: KeyStore) -> list[str]:
    """Return the paths of the arrays in the group at the root of `store`; only the first ones of many."""
    import zarr

    try:
        group = zarr.open_group(store.zarr_store(), path=store.zarr_path, mode="r")
        names = []
        for path, member in group.members(max_depth=None):
            if isinstance(member, zarr.Array):
                names.append(path)
                if len(names) == _MOST_LISTED:
                    break
    except Exception:  # the listing only helps a message along: not every store can list
        return []
    return sorted(names)


def plan_of(array: Any) -> ZarrPlan | None:
    """Return the plan for a `zarr.Array`, None if only zarr's own slicing reads it."""
    meta = array.metadata
    grid = meta.chunk_grid
    if type(grid).__name__ != "RegularChunkGrid":
        return None
    shape, chunks = tuple(map(int, array.shape)), tuple(map(int, grid.chunk_shape))
    dtype = np.dtype(array.dtype)
    fill = _fill(meta, dtype)
    if meta.zarr_format == 2:
        configs = [codec.get_config() for codec in (*(meta.filters or ()), meta.compressor) if codec]
        if any(config["id"] not in V2_CODECS for config in configs):
            return None
        axes = tuple(range(len(shape)))
        axes = axes[::-1] if meta.order == "F" else axes
        return ZarrPlan(2, shape, chunks, dtype, dtype, axes, tuple(configs), fill, meta.dimension_separator)
    encoding = meta.chunk_key_encoding
    steps = _v3_steps(meta, dtype, len(shape))
    if steps is None or encoding.name not in ("default", "v2"):
        return None
    axes, stored, codecs = steps
    key_format = 3 if encoding.name == "default" else 2
    return ZarrPlan(key_format, shape, chunks, dtype, stored, axes, codecs, fill, encoding.separator)


def _fill(meta: Any, dtype: np.dtype[Any]) -> bytes:
    value = meta.fill_value
    # v2 allows null; zarr reads such chunks as the type's default.
    value = meta.dtype.default_scalar() if value is None else value
    element = np.empty((), dtype)
    element[()] = value
    return element.tobytes()


def _v3_steps(
    meta: Any, dtype: np.dtype[Any], ndim: int
) -> tuple[tuple[int, ...], np.dtype[Any], tuple[Mapping[str, Any], ...]] | None:
    from zarr.codecs import BytesCodec, Crc32cCodec, TransposeCodec

    codecs = list(meta.codecs)
    axes = tuple(range(ndim))
    while codecs and isinstance(codecs[0], TransposeCodec):
        axes = tuple(axes[axis] for axis in codecs.pop(0).order)
    if not codecs or type(codecs[0]) is not BytesCodec:
        return None
    endian = codecs.pop(0).endian
    stored = dtype
    if endian is not None and dtype.names is None:
        stored = dtype.newbyteorder(">" if endian.value == "big" else "<")
    compressors: list[Mapping[str, Any]] = []
    for codec in codecs:
        name = codec.to_dict().get("name")
        if isinstance(codec, Crc32cCodec):
            compressors.append({"id": CRC32C_AT_END})
        elif name in V3_CODECS and type(codec).__module__.startswith("zarr."):
            compressors.append({"id": name})
        else:
            return None
    return axes, stored, tuple(compressors)
