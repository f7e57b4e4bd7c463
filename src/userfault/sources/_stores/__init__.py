"""Where the documents and chunks of a Zarr array are: bytes by key. One module for each kind of place."""

from userfault.sources._stores._abc import KeyStore, refuse_web
from userfault.sources._stores._open import open_store, split_archive

__all__ = ["KeyStore", "open_store", "refuse_web", "split_archive"]
