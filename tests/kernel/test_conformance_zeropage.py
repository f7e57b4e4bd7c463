"""The kernel's unit scenario of zero pages.

The scenarios and their numbers are those of the kernel's own `uffd-unit-tests`, listed in docs/kernel-api.md.
"""

from __future__ import annotations

import errno

import pytest

from support.kernel import HUGE_KINDS, KINDS, make_area
from support.kernel_facts import ask
from support.kernel_scenarios import for_kinds, release_pages, whole_page
from userfault.kernel import RegisterMode, Userfaultfd
from userfault.kernel.abi import Operation, Request
from userfault.kernel.mapping import MemoryKind

MISSING = RegisterMode.MISSING


@pytest.mark.scenario(4)
@for_kinds(*KINDS)
def test_zero_pages(kind: MemoryKind) -> None:
    """Scenario 4, zeropage."""
    with make_area(kind, 1) as area, Userfaultfd() as uffd:
        registration = uffd.register(area.memory, mode=MISSING)
        has_zero_pages = bool(registration.operations & Operation.ZEROPAGE)
        assert has_zero_pages is (kind not in HUGE_KINDS)
        if not has_zero_pages:
            assert uffd.try_zeropage(area.memory) == (0, errno.EINVAL)
            answer = ask(uffd, Request.ZEROPAGE, area.start, area.length, 0, 0)
            assert answer == (errno.EINVAL, -errno.EINVAL)
            uffd.unregister(area.memory)
            return
        assert ask(uffd, Request.ZEROPAGE, area.start, area.length, 0, 0) == (0, area.page_size)
        assert whole_page(area, 0) == bytes(area.page_size)
        # A second time there is a page; where another mapping shows the file, it is there for that one too.
        if area.shared:
            with area.memory.alias() as alias:
                assert uffd.register(alias, mode=MISSING).operations & Operation.ZEROPAGE
                assert uffd.try_zeropage(alias) == (0, errno.EEXIST)
                answer = ask(uffd, Request.ZEROPAGE, alias.address, alias.nbytes, 0, 0)
                assert answer == (errno.EEXIST, -errno.EEXIST)
                uffd.unregister(alias)
        assert uffd.try_zeropage(area.memory) == (0, errno.EEXIST)
        answer = ask(uffd, Request.ZEROPAGE, area.start, area.length, 0, 0)
        assert answer == (errno.EEXIST, -errno.EEXIST)
        # Through our own request, with the count that it gives.
        release_pages(area)
        assert uffd.zeropage(area.memory) == area.page_size
        assert whole_page(area, 0) == bytes(area.page_size)
        assert uffd.read_events() == []
        uffd.unregister(area.memory)
