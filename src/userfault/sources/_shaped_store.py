"""A store of plain bytes with a type and a shape."""

from __future__ import annotations

from userfault.sources._abc import Order, PageStore, write_all
from userfault.sources._shaped import ShapedSource

__all__ = ["ShapedStore"]


class ShapedStore(ShapedSource, PageStore):
    """A store of plain bytes, and what they are."""

    def __init__(self, store: PageStore, dtype_text: str, shape: tuple[int, ...], order: Order) -> None:
        super().__init__(store, dtype_text, shape, order)
        self._store = store
        self.transactional = store.transactional
        self.write_unit = store.write_unit
        self.writable = store.writable

    def write_from(self, offset: int, buffer: memoryview) -> None:
        """Let the store take `buffer`."""
        write_all(self._store, offset, buffer)

    def flush(self) -> None:
        """Let the store make durable what it took."""
        self._store.flush()
