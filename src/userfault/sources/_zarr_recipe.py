"""Recipes for Zarr arrays. The program imports this; what reads them is imported by the worker alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from userfault.sources._abc import ArraySource, Order
from userfault.sources._location import Location
from userfault.sources._stores import KeyStore, open_store

__all__ = ["Mode", "ZarrRecipe", "ZarrStoreRecipe", "load"]

Mode = Literal["r", "r+"]


@dataclass(frozen=True)
class ZarrRecipe:
    """A Zarr array, by its location.

    Attributes:
        location: Folder, folder in a ZIP file, or URL of the array itself, not of its group.
        order: Order of the memory, None for that of the chunks.
        mode: `"r+"` if it is to be written.
        write_empty_chunks: Whether chunks of nothing but the fill value are to be stored; None for zarr's default.
    """

    location: Location
    order: Order | None = None
    mode: Mode = "r"
    write_empty_chunks: bool | None = None

    def load(self) -> ArraySource:
        """Open the array."""
        store = open_store(self.location)
        return load(store, self.location.name, self.order, self.mode, self.write_empty_chunks)


@dataclass(frozen=True)
class ZarrStoreRecipe:
    """The array at the root of a store that is pickled.

    Attributes:
        store: The store.
        name: What to call the array.
        order: Order of the memory, None for that of the chunks.
        mode: `"r+"` if it is to be written.
        write_empty_chunks: Whether chunks of nothing but the fill value are to be stored; None for zarr's default.
    """

    store: KeyStore
    name: str
    order: Order | None = None
    mode: Mode = "r"
    write_empty_chunks: bool | None = None

    def load(self) -> ArraySource:
        """Open the array."""
        return load(self.store, self.name, self.order, self.mode, self.write_empty_chunks)


def load(
    store: KeyStore, name: str, order: Order | None, mode: Mode, write_empty_chunks: bool | None
) -> ArraySource:
    """Return the source for the array at the root of `store`; see `userfault.sources._zarr.load_zarr`."""
    from userfault.sources._zarr import load_zarr

    if mode == "r":
        return load_zarr(store, name, order)
    from userfault.sources._zarr_store import StoreMake

    return load_zarr(store, name, order, StoreMake(write_empty_chunks))
