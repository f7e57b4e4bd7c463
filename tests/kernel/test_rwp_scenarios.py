"""The kernel's own unit scenarios of read-write protection, 16 to 26, on every kind of memory."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from support.kernel import (
    KINDS,
    Link,
    Touch,
    available_features,
    in_child,
    make_area,
    next_event,
    protected,
    subject,
    waiters,
)
from support.kernel_facts import ask
from support.ring import Ring, needs_io_uring
from support.rwp import (
    ASYNC,
    SYNC,
    accessed,
    armed,
    by_vmsplice,
    needs_swap,
    pool_kept,
    protected_pages,
    swap_out,
)
from userfault.kernel import Feature, Fork, PageFault, RegisterMode, Userfaultfd, pagemap
from userfault.kernel.abi import FaultFlag, PageCategory, Request
from userfault.kernel.errors import UsageError
from userfault.kernel.mapping import MemoryKind, Protection

every_kind = pytest.mark.parametrize("kind", KINDS)
needs_rwp = pytest.mark.needs_feature("RWP", "RWP_ASYNC")


@pytest.mark.scenario(16)
@needs_rwp
@every_kind
def test_async_accesses_are_not_reported(kind: MemoryKind) -> None:
    with armed(kind, ASYNC, pages=4) as (area, uffd):
        assert [area.head(index) for index in range(4)] == [area.pattern(index)[:32] for index in range(4)]
        assert uffd.read_events() == []


@pytest.mark.scenario(17)
@needs_rwp
@every_kind
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_sync_accesses_wait_for_the_handler(kind: MemoryKind, write: bool) -> None:
    with armed(kind, SYNC, pages=4) as (area, uffd):
        for index in range(4):
            before = area.pattern(index)[:32]
            data = bytes(reversed(before)) if write else None
            with Touch(area, index, data=data) as touch:
                fault = next_event(uffd)
                flags = FaultFlag.RWP | FaultFlag.WRITE if write else FaultFlag.RWP
                assert fault == PageFault(area.page(index), flags, 0)
                assert not touch.done
                uffd.rwprotect(area.page(index), area.page_size, protect=False)
                assert touch.result() == (data or before)
            assert area.head(index) == (data or before)
            assert area.memory.read(index * area.page_size + 32, 32) == before
        assert uffd.read_events() == []


@pytest.mark.scenario(18)
@needs_rwp
@every_kind
def test_a_scan_tells_accessed_pages(kind: MemoryKind) -> None:
    with armed(kind, ASYNC, pages=4) as (area, _):
        assert pagemap.scan(area.memory, mask=PageCategory.ACCESSED).regions.tolist() == []
        for index in range(2):
            area.head(index)
        found = pagemap.scan(area.memory, mask=PageCategory.ACCESSED, returns=PageCategory.ACCESSED)
        assert found.regions.tolist() == [(area.start, area.page(2), PageCategory.ACCESSED)]


@pytest.mark.scenario(19)
@needs_rwp
@every_kind
def test_protection_outlives_mprotect(kind: MemoryKind) -> None:
    with armed(kind, ASYNC, pages=4) as (area, _):
        area.memory.protect(Protection.NONE)
        area.memory.protect(Protection.READ | Protection.WRITE)
        assert protected_pages(area) == [True] * 4
        assert accessed(area) == [False] * 4
        for index in range(4):
            assert area.head(index) == area.pattern(index)[:32]
        cold = pagemap.scan(area.memory, mask=PageCategory.ACCESSED, inverted=PageCategory.ACCESSED)
        assert cold.pages == 0


@pytest.mark.scenario(20)
@needs_rwp
@every_kind
def test_the_kernel_takes_hold_of_a_protected_page(kind: MemoryKind) -> None:
    with armed(kind, ASYNC) as (area, uffd):
        assert by_vmsplice(area.page(1)) == area.pattern(1)[:32]
        assert uffd.read_events() == []
        assert accessed(area) == [False, True]


@pytest.mark.scenario(21)
@needs_rwp
@every_kind
def test_switching_between_async_and_sync(kind: MemoryKind) -> None:
    with armed(kind, ASYNC, pages=4) as (area, uffd):
        for index in range(2):
            assert area.head(index) == area.pattern(index)[:32]
        assert uffd.read_events() == []
        uffd.set_mode(disable=Feature.RWP_ASYNC)
        for index in range(2, 4):
            with Touch(area, index) as touch:
                assert next_event(uffd) == PageFault(area.page(index), FaultFlag.RWP, 0)
                uffd.rwprotect(area.page(index), area.page_size, protect=False)
            assert touch.result() == area.pattern(index)[:32]
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        uffd.rwprotect(area.memory)
        assert protected_pages(area) == [True] * 4
        for index in range(4):
            assert area.head(index) == area.pattern(index)[:32]
        assert protected_pages(area) == [False] * 4
        assert uffd.read_events() == []


@pytest.mark.scenario(22)
@needs_rwp
@every_kind
def test_close_gives_the_pages_back(kind: MemoryKind) -> None:
    with armed(kind, SYNC, pages=4) as (area, uffd):
        with Touch(area, 0) as touch:
            waiters(uffd, 1)
            uffd.close()
            assert touch.result() == area.pattern(0)[:32]
        assert protected_pages(area) == [False] * 4
        assert [area.head(index) for index in range(4)] == [area.pattern(index)[:32] for index in range(4)]


def _fork_and_look(link: Link, kind: MemoryKind) -> tuple[list[bool], list[bool]]:
    with armed(kind, SYNC | Feature.EVENT_FORK) as (area, uffd):
        link.send(None, (uffd.fd,))
        in_the_child = in_child(protected_pages, area)
        return in_the_child, protected_pages(area)


@pytest.mark.scenario(23)
@needs_rwp
@pytest.mark.needs_privilege("EVENT_FORK")
@every_kind
def test_a_followed_fork_keeps_the_protection(kind: MemoryKind) -> None:
    with pool_kept(kind), subject(_fork_and_look, kind) as child, child.receive_uffd() as uffd:
        event = next_event(uffd)
        assert isinstance(event, Fork)
        with event.child:
            assert child.receive() == ([True, True], [True, True])


def _fork_a_pinned_page(link: Link) -> Any:
    def look(area: Any) -> tuple[bool, bytes, bool]:
        before = protected(area.start)
        return before, area.head(0), protected(area.start)

    with make_area(MemoryKind.ANONYMOUS, 1) as area:
        area.populate()
        with Userfaultfd(ASYNC | Feature.EVENT_FORK) as uffd, Ring() as ring:
            ring.register(area.start, area.length)  # which pins it
            uffd.register(area.memory, mode=RegisterMode.RWP)
            uffd.rwprotect(area.memory)
            link.send(None, (uffd.fd,))
            return in_child(look, area), protected(area.start)


@pytest.mark.scenario(24)
@needs_rwp
@pytest.mark.needs_privilege("EVENT_FORK")
def test_a_page_that_is_pinned_keeps_its_protection_in_the_fork() -> None:
    needs_io_uring()
    with subject(_fork_a_pinned_page) as child, child.receive_uffd() as uffd:
        event = next_event(uffd)
        assert isinstance(event, Fork)
        with event.child:
            content = b"page      0 of this area. ".ljust(32, b".")
            # Protected, read, and so protected no more; in the parent still.
            assert child.receive() == ((True, content, False), True)
            assert event.child.read_events() == []


def _hold(link: Link) -> None:
    assert link.receive() == "end"


@pytest.mark.scenario(25)
@needs_rwp
def test_a_write_to_a_page_in_swap_that_a_fork_shares_is_reported() -> None:
    needs_swap()
    with armed(MemoryKind.ANONYMOUS, SYNC) as (area, uffd):
        swap_out(area)
        assert protected_pages(area) == [True, True]
        with subject(_hold) as child:
            with Touch(area, 1, data=b"written by the parent") as touch:
                assert next_event(uffd) == PageFault(area.page(1), FaultFlag.RWP | FaultFlag.WRITE, 0)
                assert not touch.done
                uffd.rwprotect(area.page(1), area.page_size, protect=False)
            child.send("end")
            assert child.receive() is None
        assert area.head(1).startswith(b"written by the parent")
        assert area.memory.read(area.page_size + 32, 32) == area.pattern(1)[:32]


@pytest.mark.scenario(26)
@needs_rwp
@every_kind
def test_wp_and_rwp_exclude_each_other(kind: MemoryKind) -> None:
    both = RegisterMode.WP | RegisterMode.RWP
    with make_area(kind, 1) as area, Userfaultfd(available_features() & ~Feature.EVENT_FORK) as uffd:
        with pytest.raises(UsageError, match="WP and RWP exclude each other"):
            uffd.register(area.memory, mode=both)
        for mode in (both, both | RegisterMode.MISSING):
            assert ask(uffd, Request.REGISTER, area.start, area.length, mode).errno == errno.EINVAL
        (flags,) = pagemap.vm_flags(area.memory)
        assert not flags.write_protect
        assert not flags.read_write_protect
