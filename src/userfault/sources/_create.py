"""Arrays that `open(..., "w+")` creates where a worker writes them: Zarr, and objects in blocks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any, Literal, SupportsIndex
from urllib.parse import urlsplit

import numpy as np

from userfault.errors import FormatError, MissingExtraError, ModeError, SourceError, UserfaultError
from userfault.sources._abc import Order
from userfault.sources._layout import as_shape
from userfault.sources._location import Location
from userfault.sources._sliced import tile_shape
from userfault.sources._stores import KeyStore, open_store, refuse_web
from userfault.sources._zarr_recipe import ZarrRecipe

__all__ = ["create_array"]


def create_array(
    location: Location,
    *,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    order: Order | None = None,
    format: str | None = None,
    chunks: SupportsIndex | Iterable[SupportsIndex] | None = None,
    block: int | None = None,
) -> Any:
    """Create an array of zeros, or replace the array that is there, and return the recipe that writes it.

    Args:
        location: Where: a folder or URL of its own. A URL that ends with "/" is that of an array in blocks.
        dtype: Type of the elements.
        shape: Shape of the array.
        order: Order of the memory, and of what is stored; None for C.
        format: `"zarr"`, or what a single file would be, which is not created here; None if nothing is said.
        chunks: Shape of the chunks of a Zarr array, None for about 1 MiB that lie together in memory.
        block: Bytes of each object of an array in blocks, None for 1 MiB.

    Raises:
        FormatError: A group or something else is there, or `chunks` does not fit.
        ModeError: It is a place that cannot be written, or one for a single object, of which no part can be.
        MissingExtraError: A package is missing.
        SourceError: It cannot be written.
    """
    if not location.is_local:
        refuse_web(location)
        if location.is_process_memory:
            raise ModeError(
                f"{location.url} is in the memory of this process, where a worker process cannot write: give a folder "
                "or an object store, or take userfault.zeros"
            )
    if format != "zarr":
        if location.is_local or not location.url.endswith("/") or format not in (None, "raw"):
            raise ModeError(
                f"{location.url} would be a single object, of which no part can be written: end the URL with '/' for "
                "an array of one object for each block, or with '.zarr' (or give format='zarr') for a Zarr array"
            )
        return _create_blocks(location, dtype, shape, order or "C", chunks, block)
    try:
        import zarr  # noqa: F401 - only to say what is missing
    except ImportError:
        raise MissingExtraError.for_module("zarr", "zarr", f"creating {location.url}") from None
    return _create_zarr(location, dtype, shape, order or "C", chunks)


def _create_blocks(
    location: Location,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    order: Order,
    chunks: object,
    block: int | None,
) -> Any:
    if chunks is not None:
        raise FormatError(f"{location.url} is to be an array in blocks: chunks= is for Zarr; leave it out")
    if location.client == "fsspec":
        raise ModeError(
            f"{location.url}: arrays in blocks are kept through obstore: give client='obstore', or take Zarr"
        )
    try:
        import obstore  # noqa: F401 - only to say what is missing
    except ImportError:
        raise MissingExtraError.for_module("obstore", "obstore", f"creating {location.url}") from None
    from userfault.sources._object_blocks import ObjectBlocksRecipe

    recipe = ObjectBlocksRecipe(location, "r+")
    recipe.create(dtype, shape, order, block)
    return recipe


def _create_zarr(
    location: Location, dtype: np.dtype[Any], shape: tuple[int, ...], order: Order, chunks: Any
) -> ZarrRecipe:
    lengths = _chunks(shape, dtype.itemsize, order) if chunks is None else as_shape(chunks)
    if len(lengths) != len(shape) or any(length < 1 for length in lengths):
        raise FormatError(
            f"chunks={chunks!r} do not fit shape {shape}: give one length of at least 1 for each axis"
        )
    zarr_format = _format(location)
    if location.is_local:
        try:
            os.makedirs(location.url, exist_ok=True)
        except OSError as error:
            raise SourceError(
                f"{location.url} cannot be created: {error.strerror}", errno=error.errno
            ) from error
    store = open_store(location)
    try:
        if store.get(".zgroup") is not None or _is_group(store):
            raise FormatError(
                f"{location.url} is a Zarr group, and would be lost with all that is in it: add the name of an array"
            )
        if store.get(".zarray") is None and store.get("zarr.json") is None and not _is_empty(store):
            raise FormatError(
                f"{location.url} is no Zarr array, and all that is in it would be lost: give the array a place of its "
                "own, or empty this one"
            )
        _write_metadata(store, zarr_format, dtype, shape, order, lengths)
    finally:
        store.close()
    return ZarrRecipe(location, order, "r+")


def _write_metadata(
    store: KeyStore,
    zarr_format: Literal[2, 3],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    order: Order,
    chunks: tuple[int, ...],
) -> None:
    import zarr

    options: dict[str, Any] = {}
    if order == "F" and len(shape) > 1:
        # So that chunks have the order of the memory. Zarr v3 has no other way to say it.
        axes = tuple(reversed(range(len(shape))))
        options = (
            {"order": "F"} if zarr_format == 2 else {"filters": [zarr.codecs.TransposeCodec(order=axes)]}
        )
    try:
        zarr.create_array(
            store.zarr_store(writable=True),
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            zarr_format=zarr_format,
            fill_value=np.zeros((), dtype)[()],
            overwrite=True,
            **options,
        )
    except UserfaultError:
        raise
    except OSError as error:
        raise SourceError(
            f"{store.location} cannot be written: {error}", detail=str(error), errno=error.errno
        ) from error
    except Exception as error:  # zarr, its stores and data types raise what they like
        detail = str(error).partition("\n")[0] or type(error).__name__
        raise SourceError(f"{store.location} cannot be created: {detail}", detail=detail) from error


def _is_group(store: KeyStore) -> bool:
    from userfault.sources._zarr_json import is_array

    document = store.get("zarr.json")
    return document is not None and is_array(bytes(document), 3) is False


def _is_empty(store: KeyStore) -> bool:
    from zarr.core.sync import sync

    try:
        return bool(sync(store.zarr_store().is_empty(store.zarr_path)))
    except UserfaultError:
        raise
    except Exception as error:  # libraries of object stores raise what they like
        raise SourceError(f"{store.location} cannot be listed: {error}", detail=str(error)) from error


def _format(location: Location) -> Literal[2, 3]:
    """Return the format of the group that the array will be in: one of another format it does not show."""
    parent = os.path.dirname(location.url.rstrip("/"))
    # A folder, or a bucket: what is above has no keys.
    if parent in ("", "/") or (not location.is_local and not urlsplit(parent).netloc):
        return 3
    if location.is_local and not os.path.isdir(parent):
        return 3
    with contextlib.suppress(UserfaultError):
        store = open_store(Location(parent, location.storage_options, location.client))
        try:
            if store.get("zarr.json") is None and store.get(".zgroup") is not None:
                return 2
        finally:
            store.close()
    return 3


def _chunks(shape: tuple[int, ...], itemsize: int, order: Order) -> tuple[int, ...]:
    """Return chunks of about 1 MiB that lie together in memory: a write changes few of them."""
    if 0 in shape:
        return tuple(max(1, length) for length in shape)
    return tile_shape(shape, itemsize, order)
