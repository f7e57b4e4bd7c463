"""Open arrays of zarr: found again in the worker by their store and path."""

from __future__ import annotations

from typing import Any

from userfault.errors import FormatError, ModeError
from userfault.sources._abc import Order, Recipe
from userfault.sources._location import Location
from userfault.sources._stores import KeyStore
from userfault.sources._zarr_recipe import Mode, ZarrRecipe, ZarrStoreRecipe

__all__ = ["zarr_recipe"]


def zarr_recipe(array: Any, order: Order | None, mode: Mode = "r") -> Recipe:
    """Return the recipe for an open `zarr.Array`.

    Raises:
        FormatError: It is a group.
        ModeError: It is to be written, and cannot be.
        SourcePickleError: No other process can see what it has.
    """
    from zarr.storage import LocalStore

    from userfault.sources._stores._zarr import ZarrKeyStore

    if not hasattr(array, "shape"):
        names = ", ".join(sorted(array.array_keys())) if hasattr(array, "array_keys") else ""
        raise FormatError(
            f"{array!r} is not an array: open one of those in it" + (f", {names}" if names else "")
        )
    store, path = array.store_path.store, array.store_path.path
    keep_empty = None if mode == "r" else _writes_empty_chunks(array)
    if mode == "r+" and array.read_only:
        raise ModeError(
            f"{array!r} was opened for reading: open it with zarr's mode='r+', or here with mode='c' for changes that "
            "stay private"
        )
    if type(store) is LocalStore:
        location = Location.parse(store.root)
        return ZarrRecipe(location / path if path else location, order, mode, keep_empty)
    name = path.rpartition("/")[2] or "zarr"
    if type(store).__name__ == "IcechunkStore":
        from userfault.sources._stores._icechunk import icechunk_store

        return ZarrStoreRecipe(icechunk_store(store, path, mode), name, order, mode, keep_empty)
    if _is_process_memory(store):
        if mode == "r+":
            raise ModeError(
                f"{array!r} is in the memory of this process, where a worker process cannot write: open it with "
                "mode='c' for changes that stay private, or keep it in a folder or object store"
            )
        return ZarrStoreRecipe(_copied(store, path), name, order)
    return ZarrStoreRecipe(ZarrKeyStore(store, path), name, order, mode, keep_empty)


def _writes_empty_chunks(array: Any) -> bool | None:
    """Return the setting that the array was opened with, None if this zarr does not tell."""
    inner = array._async_array
    # Of newer zarr, of older zarr.
    config = getattr(inner, "config", None) or getattr(inner, "_config", None)
    return getattr(config, "write_empty_chunks", None)


def _is_process_memory(store: Any) -> bool:
    kind = type(store).__name__
    if kind == "FsspecStore":
        protocol = store.fs.protocol
        return "memory" in ((protocol,) if isinstance(protocol, str) else protocol)
    if kind == "ObjectStore":
        return type(store.store).__name__ == "MemoryStore"
    return kind == "MemoryStore"


def _copied(store: Any, path: str) -> KeyStore:
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import collect_aiterator, sync

    from userfault.sources._stores._dict import DictStore

    prefix = f"{path}/" if path else ""
    content = {}
    for key in collect_aiterator(store.list_prefix(prefix)):
        buffer = sync(store.get(key, default_buffer_prototype()))
        if buffer is not None:
            content[key[len(prefix) :]] = buffer.to_bytes()
    return DictStore(content, f"{store}/{path}")
