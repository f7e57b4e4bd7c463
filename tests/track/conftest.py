"""What a kernel must have for a test of tracking, with the reasons that the tests of the kernel's API give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import kernel as support
from userfault.kernel import Feature, abi
from userfault.track._ledger import ledger


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs_feature"):
        for name in marker.args:
            if not support.available_features() & Feature[name]:
                pytest.skip(f"needs {name} (Linux {abi.FEATURE_SINCE[Feature[name]]})")


@pytest.fixture(autouse=True)
def nothing_is_tracked_any_more() -> Iterator[None]:
    """Trackers that a test started have ended, and nothing is registered for them."""
    assert ledger.areas == []
    yield
    assert ledger.areas == []
