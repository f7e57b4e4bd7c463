"""Sources without a single byte: there is nothing to map, but their type and shape are wanted."""

from __future__ import annotations

from dataclasses import dataclass

from userfault.errors import UserfaultError
from userfault.sources._abc import Description, PageSource, Recipe, describe

__all__ = ["NotEmptyRecipe", "NothingToMapError"]


class NothingToMapError(UserfaultError):
    """The source has no bytes. `open()` makes an array without memory of it.

    Attributes:
        description: What the source says of itself.
    """

    description: Description


@dataclass(frozen=True)
class NotEmptyRecipe:
    """A recipe that only makes sources with bytes.

    Attributes:
        recipe: What to load.
    """

    recipe: Recipe

    def load(self) -> PageSource:
        """Load it.

        Raises:
            NothingToMapError: It has no bytes.
        """
        source = self.recipe.load()
        if source.nbytes == 0:
            nothing = NothingToMapError(f"{source.name} has no bytes")
            nothing.description = describe(source)
            source.close()
            raise nothing
        return source
