"""The defect of read-write protection on huge pages in Linux 7.3's first releases, and what helps.

Giving up a protected huge page (MADV_DONTNEED, a hole punched) leaves a marker. The next fault installs a page that
is accessible and yet marked as protected: it never counts as accessed, and whoever *writes* to it spins in the kernel.
What helps: take the protection away right after giving the page up, or have missing pages trapped and copied in.

Where the kernel has no such defect (any more), `stale` is False below, and the tests ask for what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.kernel import Area, Link, Touch, make_area, next_event, subject
from support.rwp import ASYNC, SYNC, accessed, armed, entry, pool_kept, protected_pages, read_waits
from support.waiting import wait_until
from userfault.kernel import Feature, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import FaultFlag, PagemapBit
from userfault.kernel.mapping import MemoryKind

pytestmark = [pytest.mark.fact("2.12"), pytest.mark.needs_feature("RWP", "RWP_ASYNC")]
HUGE_KINDS = (MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB)
every_huge_kind = pytest.mark.parametrize("kind", HUGE_KINDS)


def _drop(area: Area) -> None:
    area.drop(0, 1)


def _punch(area: Area) -> None:
    area.memory.punch_hole(0, area.page_size)


# How a page is given up. (A hole in the file leaves a private page that was written.)
ZAPS = [
    (MemoryKind.HUGETLB, _drop),
    (MemoryKind.HUGETLB, _punch),
    (MemoryKind.PRIVATE_HUGETLB, _drop),
]
every_zap = pytest.mark.parametrize(
    ("kind", "zap"), ZAPS, ids=[f"{kind}-{zap.__name__[1:]}" for kind, zap in ZAPS]
)
Zap = Callable[[Area], None]


def _zapped(area: Area, zap: Zap) -> bool:
    """Give the first page up; return whether a marker stays, as the defect has it."""
    zap(area)
    found = entry(area.start)
    assert not found & PagemapBit.PRESENT
    return PagemapBit.UFFD_PROTECTED in found


@every_zap
def test_a_read_after_the_zap_is_not_counted(kind: MemoryKind, zap: Zap) -> None:
    with armed(kind, ASYNC) as (area, uffd):
        stale = _zapped(area, zap)
        assert accessed(area) == [False, False]
        kept = kind is MemoryKind.HUGETLB and zap is _drop
        assert area.head(0) == (area.pattern(0)[:32] if kept else bytes(32))
        assert protected_pages(area) == [stale, True]
        assert accessed(area) == [not stale, False]
        assert uffd.read_events() == []


@every_huge_kind
def test_sync_a_read_after_the_zap_is_not_reported(kind: MemoryKind) -> None:
    with armed(kind, SYNC) as (area, uffd):
        stale = _zapped(area, _drop)
        assert not read_waits(area, uffd, 0)
        assert protected_pages(area) == [stale, True]
        assert uffd.read_events() == []


def _processor_ticks(pid: int) -> int:
    """Time that a process has spent in the kernel, in ticks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[12])


def _spins(pid: int) -> None:
    """Wait until a process has used more time in the kernel than any fault takes: a good part of a second."""
    before = _processor_ticks(pid)
    wait_until(lambda: _processor_ticks(pid) >= before + 20, "the child spins in the kernel")


def _zap_and_write(link: Link, kind: MemoryKind, zap: Zap, features: Feature) -> bool:
    with armed(kind, features) as (area, uffd):
        link.send((area.start, area.page_size, _zapped(area, zap)), (uffd.fd,))
        area.memory.write(0, b"written at last")
        return area.head(0).startswith(b"written at last")


@every_zap
@pytest.mark.parametrize("features", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_write_after_the_zap_spins_in_the_kernel(kind: MemoryKind, zap: Zap, features: Feature) -> None:
    with pool_kept(kind), subject(_zap_and_write, kind, zap, features) as child:
        (start, length, stale), (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            if stale:
                _spins(child.pid)
                assert uffd.read_events() == []
                if features is SYNC:
                    # The page is there by now: protected once more it is really so, and the write is reported.
                    uffd.rwprotect(start, length)
                    assert next_event(uffd) == PageFault(start, FaultFlag.RWP | FaultFlag.WRITE, 0)
                uffd.rwprotect(start, length, protect=False)
            assert child.receive() is True
            assert child.wait() == 0
            assert uffd.read_events() == []


@every_zap
def test_taking_the_protection_away_after_the_zap_helps(kind: MemoryKind, zap: Zap) -> None:
    with armed(kind, ASYNC) as (area, uffd):
        _zapped(area, zap)
        uffd.rwprotect(area.start, area.page_size, protect=False)
        assert entry(area.start) == PagemapBit(0)
        kept = kind is MemoryKind.HUGETLB and zap is _drop
        assert area.head(0) == (area.pattern(0)[:32] if kept else bytes(32))
        area.memory.write(0, b"x")
        assert accessed(area) == [True, False]
        uffd.rwprotect(area.memory)
        assert accessed(area) == [False, False]
        area.memory.write(0, b"y")
        assert accessed(area) == [True, False]
        assert area.head(0, 1) == b"y"


@every_zap
def test_protecting_after_the_zap_helps_from_the_second_time(kind: MemoryKind, zap: Zap) -> None:
    """Before a page is there again, it only keeps the marker."""
    with armed(kind, ASYNC) as (area, uffd):
        stale = _zapped(area, zap)
        uffd.rwprotect(area.memory)
        assert protected_pages(area) == [stale, True]
        area.head(0)
        assert accessed(area) == [not stale, False]
        uffd.rwprotect(area.memory)
        area.memory.write(0, b"x")
        assert accessed(area) == [True, False]


@every_huge_kind
def test_copying_missing_pages_in_helps(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(ASYNC) as uffd:
        uffd.register(area.memory, mode=RegisterMode.RWP | RegisterMode.MISSING)
        uffd.copy(area.memory, area.pattern(0) + area.pattern(1))
        uffd.rwprotect(area.memory)
        assert protected_pages(area) == [True, True]
        _drop(area)
        if kind is MemoryKind.HUGETLB:
            _punch(area)
        with Touch(area, 0, data=b"x") as touch:
            assert next_event(uffd) == PageFault(area.start, FaultFlag.WRITE, 0)
            uffd.copy(area.start, area.pattern(1))
            touch.result()
        assert protected_pages(area) == [False, True]
        assert accessed(area) == [True, False]
        assert area.head(0, 2) == b"x" + area.pattern(1)[1:2]
        uffd.rwprotect(area.memory)
        area.memory.write(0, b"y")
        assert accessed(area) == [True, False]
