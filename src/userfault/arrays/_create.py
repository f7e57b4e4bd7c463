"""Mode `"w+"`: what is to be opened is made first, in the place of what was there."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable
from typing import Any, SupportsIndex
from urllib.parse import urlsplit

import numpy as np

from userfault._blocks import block_size
from userfault.arrays._request import Format, Request, Target
from userfault.errors import FormatError, ModeError, RangeError, SourceError
from userfault.sources._abc import Order
from userfault.sources._compression import by_suffix
from userfault.sources._layout import ArrayLayout
from userfault.sources._location import Location
from userfault.sources._worker_data import WorkerData

__all__ = ["create"]


def create(
    location: Location,
    request: Request,
    chunks: SupportsIndex | Iterable[SupportsIndex] | None,
    block: SupportsIndex | str | None,
) -> Request | Target:
    """Make the array, all zeros, and return the request that opens it, or what to map.

    Args:
        location: Where.
        request: What was asked.
        chunks: Shape of the chunks of a Zarr array, None to choose.
        block: What was asked for as block size; also that of the objects of an array in blocks.

    Raises:
        ModeError: `dtype` or `shape` is not given, or nothing of this format can be created.
        FormatError: `offset` or `chunks` makes no sense for it.
        RangeError: It is larger than a file can be.
        SourceError: It cannot be made there.
    """
    dtype, shape = request.dtype, request.shape
    if dtype is None or shape is None:
        raise ModeError(f"mode 'w+' creates {location.url}: give dtype= and shape=")
    kind, nbytes = _kind(location, request), ArrayLayout(dtype, shape, "C", 0).nbytes
    if nbytes + request.offset >= 1 << 63:
        raise RangeError(f"shape={shape} of {dtype} has {nbytes} bytes, more than a file can have")
    if request.offset and (kind != "raw" or not location.is_local):
        raise FormatError(f"offset={request.offset}: only a raw file that is local has one; leave it out")
    if kind == "zarr" or not location.is_local:
        from userfault.sources._create import create_array

        recipe = create_array(
            location,
            dtype=dtype,
            shape=shape,
            order=request.order,
            format=kind,
            chunks=chunks,
            block=None if block is None else block_size(block),
        )
        return Target(WorkerData(recipe), location.name)
    if chunks is not None:
        raise FormatError(f"chunks={chunks!r}: only a Zarr array has some, and {location.name} is {kind}")
    if kind == "npy":
        header = npy_header(dtype, shape, request.order or "C")
        _create_file(location.url, header, len(header) + nbytes)
    else:
        _create_file(location.url, b"", request.offset + nbytes)
    if kind == "raw":
        return dataclasses.replace(request, format="raw")
    # It speaks for itself now.
    return dataclasses.replace(request, format="npy", dtype=None, shape=None, order=None)


def _kind(location: Location, request: Request) -> Format:
    suffix = os.path.splitext(location.name)[1].lower()
    kind = request.format
    if kind is None and by_suffix(location.name) is not None:
        raise ModeError(
            f"mode 'w+': {location.name} would be compressed as a whole, and no part of that can be replaced: leave "
            f"{suffix} out, or give format='raw'"
        )
    path = location.url if location.is_local else urlsplit(location.url).path
    if kind is None and any(part.lower().endswith(".zarr") for part in path.split("/")):
        kind = "zarr"
    if kind is None and suffix == ".safetensors":
        kind = "safetensors"
    if kind == "safetensors":
        raise ModeError(
            "mode 'w+' does not create .safetensors files, which hold many tensors: write one with the safetensors "
            "library, and open it with mode 'r+'"
        )
    return kind or ("npy" if suffix == ".npy" else "raw")


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...], order: Order) -> bytes:
    """Return the header of a `.npy` file.

    Raises:
        FormatError: The format cannot hold this type.
    """
    if dtype.isbuiltin == 2:  # NumPy would write it as raw bytes of its length
        raise FormatError(f"a .npy file cannot hold dtype {dtype}: give format='raw'")
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": order == "F",
        "shape": shape,
    }
    buffer = io.BytesIO()
    try:
        try:
            np.lib.format.write_array_header_1_0(buffer, fields)
        except ValueError:  # more than 64 KiB
            buffer = io.BytesIO()
            np.lib.format.write_array_header_2_0(buffer, fields)
    except ValueError as error:
        raise FormatError(f"a .npy header cannot hold dtype {dtype}: {error}") from error
    return buffer.getvalue()


def _create_file(path: str, head: bytes, nbytes: int) -> None:
    was_there = os.path.lexists(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            # The rest is a hole: it takes no space until it is written.
            os.ftruncate(fd, nbytes)
            os.pwrite(fd, head, 0)
        except OSError:
            if not was_there:
                os.unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise SourceError(f"{path} cannot be created: {error.strerror}", errno=error.errno) from error
