"""Where bytes come from. `PageSource` is what you implement for a place that userfault does not know.

`PageStore` is one that can be written, too. `ObjectBlocks` keeps an array in an object store, an object for each block.
"""

from typing import TYPE_CHECKING, Any

from userfault.sources._abc import ArraySource, Description, PageSource, PageStore, Recipe

if TYPE_CHECKING:
    from userfault.sources._object_blocks import ObjectBlocks

__all__ = ["ArraySource", "Description", "ObjectBlocks", "PageSource", "PageStore", "Recipe"]


def __getattr__(name: str) -> Any:
    # It needs NumPy, which a worker may do without.
    if name == "ObjectBlocks":
        from userfault.sources._object_blocks import ObjectBlocks

        globals()[name] = ObjectBlocks
        return ObjectBlocks
    raise AttributeError(f"module 'userfault.sources' has no attribute {name!r}")
