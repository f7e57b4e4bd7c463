"""Open arrays of zarr: found again in the worker by their store and path."""

from __future__ import annotations

from typing import Any

from userfault.errors import FormatError
from userfault.sources._abc import Order, Recipe
from userfault.sources._location import Location
from userfault.sources._stores import KeyStore
from userfault.sources._zarr_recipe import ZarrRecipe, ZarrStoreRecipe

__all__ = ["zarr_recipe"]


def zarr_recipe(array: Any, order: Order | None) -> Recipe:
    """Return the recipe for an open `zarr.Array`.

    Raises:
        FormatError: It is a group.
    """
    from zarr.storage import LocalStore

    from userfault.sources._stores._zarr import ZarrKeyStore

    if not hasattr(array, "shape"):
        names = ", ".join(sorted(array.array_keys())) if hasattr(array, "array_keys") else ""
        raise FormatError(
            f"{array!r} is not an array: open one of those in it" + (f", {names}" if names else "")
        )
    store, path = array.store_path.store, array.store_path.path
    if type(store) is LocalStore:
        return ZarrRecipe(Location.parse(store.root) / path if path else Location.parse(store.root), order)
    name = path.rpartition("/")[2] or "zarr"
    if _is_process_memory(store):
        return ZarrStoreRecipe(_copied(store, path), name, order)
    return ZarrStoreRecipe(ZarrKeyStore(store, path), name, order)


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
