"""What a kernel must have for a test of its API: found out by trying, and said the same way everywhere.

The kernel matrix compares the reasons of all skips with what is expected of each kernel, so a reason names what is
missing and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from support import kernel as support
from userfault.kernel import Feature, Userfaultfd, abi
from userfault.kernel.errors import NotSupportedError, UffdError
from userfault.kernel.mapping import Advice, Mapping


def _scans(category: abi.PageCategory) -> bool:
    from userfault.kernel import pagemap

    try:
        with Mapping.anonymous(support.PAGE) as memory:
            pagemap.scan(memory, anyof=category, returns=category)
    except UffdError:
        return False
    return True


def _advises(advice: Advice) -> bool:
    try:
        with Mapping.anonymous(support.PAGE) as memory:
            memory.madvise(advice)
    except UffdError:
        return False
    return True


def _reads_without_waiting() -> bool:
    try:
        with Userfaultfd(nonblocking=False) as uffd:
            uffd.read_events()
    except NotSupportedError:
        return False
    return True


# By name: since which release, and how to find out.
_ABILITIES: dict[str, tuple[str, Callable[[], bool]]] = {
    "PAGEMAP_SCAN": ("6.7", lambda: _scans(abi.PageCategory.PRESENT)),
    "PAGE_IS_GUARD": ("6.15", lambda: _scans(abi.PageCategory.GUARD)),
    "PAGE_IS_ACCESSED": ("7.3", lambda: _scans(abi.PageCategory.ACCESSED)),
    "MADV_GUARD_INSTALL": ("6.13", lambda: _advises(Advice.GUARD_INSTALL)),
    "RWF_NOWAIT": ("6.10", _reads_without_waiting),
    "MADV_POPULATE_READ": ("5.14", lambda: _advises(Advice.POPULATE_READ)),
}


@cache
def _has(ability: str) -> bool:
    return _ABILITIES[ability][1]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs_feature"):
        for name in marker.args:
            if not support.available_features() & Feature[name]:
                pytest.skip(f"needs {name} (Linux {abi.FEATURE_SINCE[Feature[name]]})")
    for marker in item.iter_markers("needs_linux"):
        for name in marker.args:
            if not _has(name):
                pytest.skip(f"needs {name} (Linux {_ABILITIES[name][0]})")
