"""Files that are read in ranges, wherever they are. One private module for each library that reaches them."""

from userfault.sources._ranges._abc import RangeReader
from userfault.sources._ranges._open import open_ranges

__all__ = ["RangeReader", "open_ranges"]
