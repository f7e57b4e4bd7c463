"""open(): any array as ordinary memory."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from userfault._trace import Trace
from userfault.arrays._create import create
from userfault.arrays._local import local_target
from userfault.arrays._remote import expanded_url_target, url_target
from userfault.arrays._replay import Replay, begin_replay, load_replay
from userfault.arrays._request import (
    Format,
    Request,
    Target,
    check_delivery,
    check_format,
    check_mode,
    check_sizes,
)
from userfault.arrays._tensors import TensorFile
from userfault.arrays._view import view_of
from userfault.arrays._watch import be_watched
from userfault.errors import ModeError, RangeError
from userfault.memory import Delivery, PagedMemory
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
    delivery: Delivery | None = None,
    replay: Replay | None = None,
    chunks: SupportsIndex | Iterable[SupportsIndex] | None = None,
) -> Any:
    """Open an array of any size and origin as a plain `numpy.ndarray`, paged in when touched.

    Args:
        source: What to open. A path or URL (through obstore or fsspec: `s3://`, `https://`, `memory://`, ...)
            of a `.npy`, `.safetensors` or raw file, also compressed as a whole (`.gz`, `.zst`, `.bz2`, `.xz`,
            `.lz4`), or of a Zarr array (`"climate.zarr/t2m"`). Or an object: an array of zarr, h5py or
            tensorstore, anything with `shape`, `dtype` and slicing, a NumPy array, a buffer, or a
            `PageSource`.
        mode: As in `numpy.memmap`. `"r"`: read-only. `"r+"`: changes go back to the source, when their block is
            evicted, by `flush()` and `close()` of the memory, and when the array goes. `"c"`: changes are private to
            this process, and move to a scratch file when the budget asks for it. `"w+"`: creates a raw or `.npy` file,
            a Zarr array, or (a URL that ends with `/`) an array of one object for each block, of `dtype` and `shape`
            and in the place of what was there, then as `"r+"`.
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
        delivery: Who resolves a fault: a `"thread"` of the engine (None means that, too), or `"direct"`ly the thread
            that faults, inside a handler of SIGBUS: quicker, but system calls on missing pages get EFAULT
            (docs/performance.md says when it pays).
        replay: A trace of an earlier run (a file of `userfault.track.Recorder` or `userfault record`): what that run
            needed is loaded in its order, ahead of demand, as long as this one does the same.
        chunks: Shape of the chunks of a Zarr array that mode `"w+"` creates; None for about 1 MiB that lie together in
            memory.

    Returns:
        The array. Its memory (`userfault.memory_of`) lives as long as any view of it. For a `.safetensors`
        file a mapping of names to arrays, all in one memory. An array without elements has no memory.

    Raises:
        ModeError: The mode is not known, or the source cannot be written or created.
        SourceNotFoundError: Nothing is there.
        FormatError: It is not an array, or not what it is said to be.
        TruncatedError: It ends before its array does.
        UnsupportedDtypeError: Its elements are Python objects.
        SourcePickleError: No worker process can read this object.
        MissingExtraError: A package is missing; the message is the command that installs it.
        SourceError: It cannot be reached.
        BudgetError: The budget is too small, or no size.
        TraceError: `replay` is no trace, or has no recording of this array.
        PrivilegeError: This user may not use userfaultfd.

    Example:
        >>> import numpy as np, userfault
        >>> a = userfault.open(np.arange(10.0))
        >>> float(a[2:5].sum())
        9.0
    """
    known_mode, how = check_mode(mode), check_delivery(delivery)
    if chunks is not None and known_mode != "w+":
        raise ModeError(f"mode {mode!r}: chunks= is for mode 'w+', which creates; leave it out")
    if isinstance(offset, bool) or operator.index(offset) < 0:
        raise RangeError(f"offset={offset!r} is not a number of bytes from the beginning")
    trace = None if replay is None else load_replay(replay)
    be_watched()
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
            mode=known_mode,
        )

        def mapped(target: Target) -> Any:
            return _map(target, request, name, memory, block, readahead, how, trace)

        if not isinstance(source, str | os.PathLike):
            return mapped(_object_target(source, request))
        location = Location.parse(source, storage_options, client)
        if known_mode == "w+":
            # What is there goes. Whatever is wrong with the other arguments is to be said before.
            check_sizes(memory, block)
            created = create(location, request, chunks, block)
            if isinstance(created, Target):
                return mapped(created)
            request = created
        if location.is_local:
            return mapped(local_target(location, request))
        try:
            return mapped(url_target(location, request))
        except MustExpandError:
            return mapped(expanded_url_target(location, request))


def _object_target(source: Any, request: Request) -> Target:
    name = type(source).__name__
    if request.mode == "w+":
        raise ModeError(f"mode 'w+' creates a file or a Zarr array: give a path or URL, not {name}")
    if isinstance(source, np.ndarray):
        request.refuse_write("a NumPy array", "is memory already: write to it")
        request.refuse_raw("a NumPy array")
        data, layout = array_data(source)
        request.refuse_order("this array", layout.order)
        return Target(data, name, layout)
    # What lies in memory already needs no worker; but a source or an HDF5 dataset may export something else,
    # too.
    if is_buffer(source):
        request.refuse_write(f"{name}, a buffer,", "is memory already: write to it")
        content = buffer_bytes(source)
        layout = request.raw_layout(content.nbytes, name)
        return Target(MemoryData(content, layout.offset, layout.nbytes), name, layout)
    text = request.raw_options().dtype
    found, known = object_data(
        source, text, request.shape, request.order, "r+" if request.writes_back else "r"
    )
    return Target(found, name, known)


def _map(
    target: Target,
    request: Request,
    name: str | None,
    budget: SupportsIndex | str | None,
    block: SupportsIndex | str | None,
    readahead: bool,
    delivery: Delivery,
    trace: Trace | None,
) -> Any:
    """Map what was found, and return the array or arrays in it."""
    name = target.name if name is None else name
    data, writable = target.data, request.mode != "r"
    if isinstance(data, WorkerData):
        data = WorkerData(NotEmptyRecipe(request.recipe(data.recipe)))
    elif data.nbytes == 0:
        return _arrays(None, target, name, None, writable)
    try:
        memory = PagedMemory(
            data,
            name=name,
            memory=budget,
            block=block,
            readahead=readahead,
            mode=request.mode,
            delivery=delivery,
        )
    except NothingToMapError as nothing:
        return _arrays(None, target, name, nothing.description, writable)
    if trace is not None:
        try:
            begin_replay(memory, trace)
        except BaseException:
            memory.close()
            raise
    return _arrays(memory, target, name, memory.description, writable)


def _arrays(
    memory: PagedMemory | None, target: Target, name: str, description: Description | None, writable: bool
) -> Any:
    table, layout = target.table, target.layout
    if description is not None:
        table = table_of(description.extra)
        layout = _layout_of(description)
    if table is not None:
        return TensorFile(memory, table, name, writable)
    assert layout is not None
    # The memory begins with the array, wherever that is in the file.
    return view_of(memory, ArrayLayout(layout.dtype, layout.shape, layout.order, 0), writable)


def _layout_of(description: Description) -> ArrayLayout:
    if description.dtype is None or description.shape is None:
        return ArrayLayout(np.dtype(np.uint8), (description.nbytes,), "C", 0)
    return ArrayLayout(dtype_from_text(description.dtype), description.shape, description.order, 0)
