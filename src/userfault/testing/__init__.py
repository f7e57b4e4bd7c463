"""Tests for what you build on userfault. Needs pytest."""

from userfault.testing._page_source import PageSourceTests
from userfault.testing._page_store import PageStoreTests

__all__ = ["PageSourceTests", "PageStoreTests"]
