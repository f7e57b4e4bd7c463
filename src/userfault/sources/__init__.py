"""Where bytes come from. `PageSource` is what you implement for a place that userfault does not know."""

from userfault.sources._abc import ArraySource, Description, PageSource, Recipe

__all__ = ["ArraySource", "Description", "PageSource", "Recipe"]
