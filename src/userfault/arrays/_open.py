"""open(): any array as ordinary memory."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from userfault.arrays._local import local_target
from userfault.arrays._remote import expanded_url_target, url_target
from userfault.arrays._request import Format, Request, Target, check_format, check_mode
from userfault.arrays._tensors import TensorFile
from userfault.arrays._view import view_of
from userfault.errors import RangeError
from userfault.memory import PagedMemory
from userfault.sources._abc import Description
from userfault.sources._dtypes import as_dtype, dtype_from_text
from userfault.sources._expand import MustExpandError
from userfault.sources._layout import ArrayLayout, as_order, as_shape
from userfault.sources._location import Client, Location
from userfault.sources._native import MemoryData
from userfault.sources._nothing import NotEmptyRecipe, NothingToMapError
from userfault.sources._objects import array_data, buffer_bytes, is_buffer, object_data
from userfault.sources._remote_file import table_of
from userfault.sources._worker_data import WorkerData

__all__ = ["open"]


def open(
    source: Any,
    mode: str = "r",
    *,
    memory: SupportsIndex | str | None = None,
    dtype: npt.DTypeLike | None = None,
    shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    offset: int = 0,
    block: SupportsIndex | str | None = None,
    order: Literal["C", "F"] | None = None,
    name: str | None = None,
    readahead: bool = True,
    format: Format | None = None,
    storage_options: Mapping[str, Any] | None = None,
    client: Client | None = None,
) -> Any:
    """Open an array of any size and origin as a plain, read-only `numpy.ndarray`, paged in when touched.

    Args:
        source: What to open. A path or URL (through obstore or fsspec: `s3://`, `https://`, `memory://`, ...)
            of a `.npy`, `.safetensors` or raw file, also compressed as a whole (`.gz`, `.zst`, `.bz2`, `.xz`,
            `.lz4`), or of a Zarr array (`"climate.zarr/t2m"`). Or an object: an array of zarr, h5py or
            tensorstore, anything with `shape`, `dtype` and slicing, a NumPy array, a buffer, or a
            `PageSource`.
        mode: `"r"`. The other modes of `numpy.memmap` come in a later version.
        memory: Most bytes of it to keep resident, or text such as `"256 MiB"`; None shares
            `userfault.limit()`.
        dtype: Type of the elements of a raw file, a buffer, or a `PageSource` that does not say.
        shape: Shape of those; None for one axis with all elements.
        offset: Where the array begins in a raw file, in bytes.
        block: Bytes to load at once: a power of two from the page size to 2 MiB; None for what suits the
            source.
        order: Order of the memory, `"C"` or `"F"`; None for that of the source.
        name: What to call it in messages; None for the last part of the path.
        readahead: Whether to load ahead of sequential and strided scans.
        format: `"npy"`, `"safetensors"`, `"raw"` or `"zarr"`, if the name and first bytes do not tell.
        storage_options: Credentials, endpoints and the like for the library that reads a URL.
        client: That library, `"obstore"` or `"fsspec"`; None to choose.

    Returns:
        The array. Its memory (`userfault.memory_of`) lives as long as any view of it. For a `.safetensors`
        file a mapping of names to arrays, all in one memory. An array without elements has no memory.

    Raises:
        ModeError: The mode is not known, or not in this version.
        SourceNotFoundError: Nothing is there.
        FormatError: It is not an array, or not what it is said to be.
        TruncatedError: It ends before its array does.
        UnsupportedDtypeError: Its elements are Python objects.
        SourcePickleError: No worker process can read this object.
        MissingExtraError: A package is missing; the message is the command that installs it.
        SourceError: It cannot be reached.
        BudgetError: The budget is too small, or no size.
        PrivilegeError: This user may not use userfaultfd.

    Example:
        >>> import numpy as np, userfault
        >>> a = userfault.open(np.arange(10.0))
        >>> float(a[2:5].sum())
        9.0
    """
    check_mode(mode)
    if isinstance(offset, bool) or operator.index(offset) < 0:
        raise RangeError(f"offset={offset!r} is not a number of bytes from the beginning")
    with contextlib.ExitStack() as stack:
        request = Request(
            dtype=None if dtype is None else as_dtype(dtype),
            shape=None if shape is None else as_shape(shape),
            offset=operator.index(offset),
            order=None if order is None else as_order(order),
            format=check_format(format),
            storage_options=storage_options,
            client=client,
            stack=stack,
        )

        def mapped(target: Target) -> Any:
            return _map(target, name, memory, block, readahead)

        if not isinstance(source, str | os.PathLike):
            return mapped(_object_target(source, request))
        location = Location.parse(source, storage_options, client)
        if location.is_local:
            return mapped(local_target(location, request))
        try:
            return mapped(url_target(location, request))
        except MustExpandError:
            return mapped(expanded_url_target(location, request))


def _object_target(source: Any, request: Request) -> Target:
    name = type(source).__name__
    if isinstance(source, np.ndarray):
        request.refuse_raw("a NumPy array")
        data, layout = array_data(source)
        request.refuse_order("this array", layout.order)
        return Target(data, name, layout)
    # What lies in memory already needs no worker; but a source or an HDF5 dataset may export something else,
    # too.
    if is_buffer(source):
        content = buffer_bytes(source)
        layout = request.raw_layout(content.nbytes, name)
        return Target(MemoryData(content, layout.offset, layout.nbytes), name, layout)
    text = request.raw_options().dtype
    found, known = object_data(source, text, request.shape, request.order)
    return Target(found, name, known)


def _map(
    target: Target,
    name: str | None,
    budget: SupportsIndex | str | None,
    block: SupportsIndex | str | None,
    readahead: bool,
) -> Any:
    """Map what was found, and return the array or arrays in it."""
    name = target.name if name is None else name
    data = target.data
    if isinstance(data, WorkerData):
        data = WorkerData(NotEmptyRecipe(data.recipe))
    elif data.nbytes == 0:
        return _arrays(None, target, name, None)
    try:
        memory = PagedMemory(data, name=name, memory=budget, block=block, readahead=readahead)
    except NothingToMapError as nothing:
        return _arrays(None, target, name, nothing.description)
    return _arrays(memory, target, name, memory.description)


def _arrays(memory: PagedMemory | None, target: Target, name: str, description: Description | None) -> Any:
    table, layout = target.table, target.layout
    if description is not None:
        table = table_of(description.extra)
        layout = _layout_of(description)
    if table is not None:
        return TensorFile(memory, table, name)
    assert layout is not None
    # The memory begins with the array, wherever that is in the file.
    return view_of(memory, ArrayLayout(layout.dtype, layout.shape, layout.order, 0))


def _layout_of(description: Description) -> ArrayLayout:
    if description.dtype is None or description.shape is None:
        return ArrayLayout(np.dtype(np.uint8), (description.nbytes,), "C", 0)
    return ArrayLayout(dtype_from_text(description.dtype), description.shape, description.order, 0)
