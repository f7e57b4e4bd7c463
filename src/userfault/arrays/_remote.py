"""URLs: which format, and who reads them."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import numpy as np

from userfault.arrays._local import expanded
from userfault.arrays._request import Request, Target
from userfault.errors import FormatError
from userfault.sources._compression import by_magic, by_suffix
from userfault.sources._location import Location
from userfault.sources._native import MemoryData
from userfault.sources._npy import NPY_MAGIC, npy_layout
from userfault.sources._process_memory import copy_file, copy_tree
from userfault.sources._ranges import open_ranges
from userfault.sources._ranges._memory import MemoryReader
from userfault.sources._remote_file import FileFormat, RemoteFileRecipe, UrlRecipe
from userfault.sources._safetensors import tensor_table
from userfault.sources._worker_data import WorkerData
from userfault.sources._zarr_recipe import ZarrRecipe, ZarrStoreRecipe

__all__ = ["expanded_url_target", "url_target"]


def url_target(location: Location, request: Request) -> Target:
    """Return what to map for a URL. Nothing is read: the worker does that, and tells what it found.

    Raises:
        MissingExtraError: No library for the URL is installed.
        SourceNotFoundError: Nothing is there, of what only this process can see.
    """
    if location.is_process_memory:
        return _memory_target(location, request)
    location.choose_client()
    name = location.name
    if request.format == "zarr" or (request.format is None and _in_zarr(location)):
        request.refuse_raw(f"{name}, a Zarr array,")
        return Target(WorkerData(ZarrRecipe(location, request.order)), name)
    if request.format is None and by_suffix(name) is not None:
        return expanded_url_target(location, request)
    kind = _kind(name, request)
    if kind is None:
        return Target(WorkerData(UrlRecipe(location, request.raw_options(), request.order)), name)
    if kind != "raw":
        request.refuse_raw(f"{name}, a .{kind} file,")
    return Target(WorkerData(RemoteFileRecipe(location, kind, request.raw_options())), name)


def expanded_url_target(location: Location, request: Request) -> Target:
    """Return what to map for a URL whose file is expanded first."""
    reader = open_ranges(location)
    request.stack.callback(reader.close)
    return expanded(reader, location.name, request)


def _memory_target(location: Location, request: Request) -> Target:
    request.refuse_write(
        location.url, "is in the memory of this process, which no worker process can write to"
    )
    content = None if request.format == "zarr" else copy_file(location)
    if content is None:
        from userfault.sources._stores._dict import DictStore

        request.refuse_raw(f"{location.name}, a Zarr array,")
        store = DictStore(copy_tree(location), location.url)
        return Target(WorkerData(ZarrStoreRecipe(store, location.name, request.order)), location.name)
    reader = MemoryReader(content, location.url)
    kind = _kind(location.name, request)
    if (
        by_suffix(location.name) is not None
        if request.format is None
        else kind != "raw" and by_magic(content)
    ):
        return expanded(reader, location.name, request)
    kind = kind or ("npy" if content.startswith(NPY_MAGIC) else None)
    if kind is None and request.dtype is None:
        raise FormatError(f"{location.url} does not say what it is: give dtype= (and shape=), or format=")
    buffer = np.frombuffer(content, np.uint8)
    if kind == "safetensors":
        request.refuse_raw(location.name)
        table = tensor_table(reader.read, len(content), location.url)
        return Target(MemoryData(buffer, table.offset, table.nbytes), location.name, table=table)
    if kind == "npy":
        request.refuse_raw(location.name)
        layout = npy_layout(reader.read, len(content), location.url)
        request.refuse_order(location.name, layout.order)
    else:
        layout = request.raw_layout(len(content), location.url)
    return Target(MemoryData(buffer, layout.offset, layout.nbytes), location.name, layout)


def _kind(name: str, request: Request) -> FileFormat | None:
    if request.format in ("npy", "safetensors", "raw"):
        return request.format
    match os.path.splitext(name)[1].lower():
        case ".npy":
            return "npy"
        case ".safetensors":
            return "safetensors"
        case _:
            return "raw" if request.dtype is not None else None


def _in_zarr(location: Location) -> bool:
    return any(part.lower().endswith(".zarr") for part in urlsplit(location.url).path.split("/"))
