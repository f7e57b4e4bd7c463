"""The kernel's unit scenarios of UFFDIO_MOVE.

The scenarios and their numbers are those of the kernel's own `uffd-unit-tests`, listed in docs/kernel-api.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.kernel import PAGE, Area, make_area
from support.kernel_scenarios import NO_THP, Handler, for_kinds, huge_area, pmd_size
from userfault.kernel import FaultKind, PageFault, Userfaultfd, pagemap
from userfault.kernel.abi import FaultFlag, PageCategory
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import Advice, MemoryKind

pytestmark = pytest.mark.needs_feature("MOVE")


def _moving(source: Area, target: Area, chunk: int) -> Callable[[Userfaultfd, AnyEvent], None]:
    """Serve a fault by moving the chunk of bytes around it, which lies at the same place in the source."""

    def serve(uffd: Userfaultfd, event: AnyEvent) -> None:
        assert isinstance(event, PageFault)
        assert event.flags == FaultFlag(0)
        offset = (event.address - target.start) // chunk * chunk
        assert uffd.move(target.start + offset, source.start + offset, chunk, allow_holes=True) == chunk

    return serve


def _check_moves(uffd: Userfaultfd, source: Area, target: Area, chunk: int) -> None:
    """Read the target chunk by chunk: each is moved at its first page's fault, and leaves zeros."""
    uffd.register(target.memory)
    step = chunk // PAGE
    with Handler(uffd, _moving(source, target, chunk)) as handler:
        for first in range(0, target.pages, step):
            place = (first * PAGE, chunk)
            expected = b"".join(source.pattern(page) for page in range(first, first + step))
            assert source.memory.read(*place) == expected
            assert target.memory.read(*place) == expected
            assert source.memory.read(*place) == bytes(chunk)
    assert handler.count(FaultKind.MISSING) == target.pages // step
    assert len(handler.events) == target.pages // step


@pytest.mark.scenario(5)
@for_kinds(MemoryKind.ANONYMOUS)
def test_move(kind: MemoryKind) -> None:
    """Scenario 5, move: page by page, none of them huge."""
    with make_area(kind, 16) as source, make_area(kind, 16) as target, Userfaultfd() as uffd:
        source.memory.madvise(Advice.DONTFORK)
        source.populate()
        _check_moves(uffd, source, target, PAGE)


def _in_huge_pages(area: Area) -> int:
    """How many bytes of an area are in transparent huge pages."""
    return pagemap.scan(area.memory, mask=PageCategory.HUGE).pages * PAGE


def _check_huge_moves(target_advice: Advice) -> int:
    """Move two huge pages; return how many bytes of them are in huge pages still."""
    with (
        huge_area(2) as source,
        huge_area(2, target_advice) as target,
        Userfaultfd() as uffd,
    ):
        source.memory.madvise(Advice.DONTFORK)
        source.populate()
        if _in_huge_pages(source) != source.length:
            pytest.skip(NO_THP)
        _check_moves(uffd, source, target, pmd_size())
        return _in_huge_pages(target)


@pytest.mark.scenario(6)
@for_kinds(MemoryKind.ANONYMOUS)
def test_move_of_huge_pages(kind: MemoryKind) -> None:
    """Scenario 6, move-pmd: a huge page moves as a whole."""
    assert _check_huge_moves(Advice.HUGEPAGE) == 2 * pmd_size()


@pytest.mark.scenario(7)
@for_kinds(MemoryKind.ANONYMOUS)
def test_move_of_huge_pages_to_where_they_are_unwanted(kind: MemoryKind) -> None:
    """Scenario 7, move-pmd-split: a huge page is split before it moves."""
    assert _check_huge_moves(Advice.NOHUGEPAGE) == 0
