"""Local paths: which format, and where the array lies."""

from __future__ import annotations

import os
import stat

from userfault.arrays._request import Request, Target
from userfault.errors import FormatError, SourceError, SourceNotFoundError
from userfault.sources._compression import by_magic, by_suffix, strip_suffix
from userfault.sources._expand import expand, open_scratch
from userfault.sources._location import Location
from userfault.sources._native import FileData
from userfault.sources._npy import NPY_MAGIC, npy_layout
from userfault.sources._ranges import RangeReader, open_ranges
from userfault.sources._safetensors import tensor_table
from userfault.sources._stores import split_archive
from userfault.sources._worker_data import WorkerData
from userfault.sources._zarr_recipe import ZarrRecipe

__all__ = ["expanded", "file_target", "local_target"]

_ZARR_DOCUMENTS = ("zarr.json", ".zarray", ".zgroup")
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGIC = b"PK\x03\x04"


def local_target(location: Location, request: Request) -> Target:
    """Return what to map for a local path.

    Raises:
        SourceNotFoundError: There is nothing.
        FormatError: It is no array, or cannot be told what.
        TruncatedError: It ends before its array does.
    """
    path = location.url
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if split_archive(path)[0] is not None:
            return _zarr(location, request)
        raise SourceNotFoundError(f"{path} does not exist{_neighbours(path)}", errno=error.errno) from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", errno=error.errno) from error
    if stat.S_ISDIR(mode):
        if not any(os.path.exists(os.path.join(path, name)) for name in _ZARR_DOCUMENTS):
            raise FormatError(f"{path} is a folder, but not a Zarr array: it has no zarr.json and no .zarray")
        return _zarr(location, request)
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path} is neither a file nor a folder")
    reader = open_ranges(location)
    request.stack.callback(reader.close)
    head = reader.read(0, 16)
    if request.format == "zarr" or (request.format is None and head.startswith(_ZIP_MAGIC)):
        if location.name.lower().endswith(".npz"):
            raise FormatError(f"{path} is an .npz archive: unpack it, and open the .npy files in it")
        return _zarr(location, request)
    if _is_compressed(head, location.name, request):
        return expanded(reader, location.name, request)
    return file_target(reader, FileData(path, 0, reader.nbytes or 0), location.name, request)


def expanded(reader: RangeReader, name: str, request: Request) -> Target:
    """Return what to map for a file that is expanded first."""
    request.refuse_write(
        name, "is compressed or cannot be read in ranges, so no part of it can be replaced: unpack it first"
    )
    fd = open_scratch()
    request.stack.callback(os.close, fd)
    raw = request.format == "raw" or (request.format is None and request.dtype is not None)
    nbytes = expand(reader, fd, look=not raw)
    # It has no name; this one is good for as long as the descriptor is open.
    path = f"/proc/self/fd/{fd}"
    content = open_ranges(Location(path))
    request.stack.callback(content.close)
    return file_target(content, FileData(path, 0, nbytes), strip_suffix(name), request)


def file_target(reader: RangeReader, data: FileData, name: str, request: Request) -> Target:
    """Return what to map of a file that is not compressed."""
    kind = request.format or _look(reader.read(0, 16), data.nbytes, name, request)
    if kind == "raw":
        layout = request.raw_layout(data.nbytes, name)
        return Target(FileData(data.path, layout.offset, layout.nbytes), name, layout)
    request.refuse_raw(f"{name}, a .{kind} file,")
    if kind == "npy":
        layout = npy_layout(reader.read, data.nbytes, name)
        request.refuse_order(name, layout.order)
        return Target(FileData(data.path, layout.offset, layout.nbytes), name, layout)
    table = tensor_table(reader.read, data.nbytes, name)
    return Target(FileData(data.path, table.offset, table.nbytes), name, table=table)


def _look(head: bytes, nbytes: int, name: str, request: Request) -> str:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in (".npy", ".safetensors"):
        return suffix[1:]
    if request.dtype is not None:
        return "raw"
    if head.startswith(NPY_MAGIC):
        return "npy"
    if head.startswith(_HDF5_MAGIC):
        raise FormatError(f"{name} is an HDF5 file: open it with h5py, and give one of its datasets")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < nbytes:
        return "safetensors"
    raise FormatError(
        f"{name} does not say what it is: give dtype= (and shape=) to read it as raw bytes, or format="
    )


def _is_compressed(head: bytes, name: str, request: Request) -> bool:
    if request.format == "raw":
        return False
    if request.format is None and by_suffix(name) is not None:
        return True
    typed = request.format is not None or os.path.splitext(name)[1].lower() in (".npy", ".safetensors")
    # The length of a .safetensors header may look like gzip, but not with "{" behind it.
    return typed and by_magic(head) is not None and head[8:9] != b"{"


def _zarr(location: Location, request: Request) -> Target:
    request.refuse_raw(f"{location.name}, a Zarr array,")
    return Target(WorkerData(ZarrRecipe(location, request.order)), location.name)


def _neighbours(path: str) -> str:
    """Return a hint on what is where nothing was found."""
    folder = os.path.dirname(path)
    try:
        names = sorted(
            entry.name
            for entry in os.scandir(folder)
            if any(os.path.exists(os.path.join(entry.path, name)) for name in ("zarr.json", ".zarray"))
        )
    except OSError:
        return ""
    return f"; {folder} has {', '.join(names[:20])}" if names else ""
