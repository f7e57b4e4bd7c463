"""Recipes for Zarr arrays. The program imports this; what reads them is imported by the worker alone."""

from __future__ import annotations

from dataclasses import dataclass

from userfault.sources._abc import ArraySource, Order
from userfault.sources._location import Location
from userfault.sources._stores import KeyStore, open_store

__all__ = ["ZarrRecipe", "ZarrStoreRecipe"]


@dataclass(frozen=True)
class ZarrRecipe:
    """A Zarr array, by its location.

    Attributes:
        location: Folder, folder in a ZIP file, or URL of the array itself, not of its group.
        order: Order of the memory, None for that of the chunks.
    """

    location: Location
    order: Order | None = None

    def load(self) -> ArraySource:
        """Open the array."""
        from userfault.sources._zarr import load_zarr

        return load_zarr(open_store(self.location), self.location.name, self.order)


@dataclass(frozen=True)
class ZarrStoreRecipe:
    """The array at the root of a store that is pickled.

    Attributes:
        store: The store.
        name: What to call the array.
        order: Order of the memory, None for that of the chunks.
    """

    store: KeyStore
    name: str
    order: Order | None = None

    def load(self) -> ArraySource:
        """Open the array."""
        from userfault.sources._zarr import load_zarr

        return load_zarr(self.store, self.name, self.order)
