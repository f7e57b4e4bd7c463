"""Tests for what you build on userfault. Needs pytest."""

from userfault.testing._page_source import PageSourceTests

__all__ = ["PageSourceTests"]
