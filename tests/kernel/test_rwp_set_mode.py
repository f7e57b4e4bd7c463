"""UFFDIO_SET_MODE: switching between asynchronous and synchronous read-write protection."""

from __future__ import annotations

import errno

import pytest

from support.kernel import HUGE, PAGE, Touch, in_child, make_area, next_event, waiters
from support.kernel_facts import ask, ask_at
from support.rwp import ASYNC, DIFFERENT_KINDS, SYNC, accessed, armed, protected_pages, read_waits
from userfault.kernel import Feature, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import FaultFlag, Request
from userfault.kernel.errors import NotInitialisedError, UsageError
from userfault.kernel.mapping import MemoryKind

pytestmark = [pytest.mark.fact("2.13"), pytest.mark.needs_feature("RWP", "RWP_ASYNC")]
kinds = pytest.mark.parametrize("kind", DIFFERENT_KINDS)


def _set_mode(uffd: Userfaultfd, enable: int, disable: int) -> int:
    return ask(uffd, Request.SET_MODE, enable, disable).errno


def test_what_is_refused() -> None:
    with Userfaultfd(SYNC) as uffd:
        assert ask_at(uffd.fd, Request.SET_MODE, 1) == errno.EFAULT
        assert _set_mode(uffd, Feature.RWP_ASYNC, Feature.RWP_ASYNC) == errno.EINVAL
        with pytest.raises(UsageError, match="on and off in one call"):
            uffd.set_mode(enable=Feature.RWP_ASYNC, disable=Feature.RWP_ASYNC)
        for other in (Feature.RWP, Feature.WP_ASYNC, Feature.RWP_ASYNC | Feature.SIGBUS, Feature(1 << 63)):
            assert _set_mode(uffd, other, 0) == errno.EINVAL
            assert _set_mode(uffd, 0, other) == errno.EINVAL
            with pytest.raises(UsageError, match="only RWP_ASYNC"):
                uffd.set_mode(enable=other)
            with pytest.raises(UsageError, match="only RWP_ASYNC"):
                uffd.set_mode(disable=other)
        assert uffd.fdinfo().features == uffd.features == SYNC
    with Userfaultfd() as uffd:
        assert _set_mode(uffd, Feature.RWP_ASYNC, 0) == errno.EINVAL
        assert _set_mode(uffd, 0, Feature.RWP_ASYNC) == 0
    with Userfaultfd(handshake=False) as uffd:
        assert _set_mode(uffd, 0, 0) == errno.EINVAL
        with pytest.raises(NotInitialisedError):
            uffd.set_mode(enable=Feature.RWP_ASYNC)


def test_what_is_on_is_told() -> None:
    with Userfaultfd(SYNC) as uffd:
        for _ in range(2):  # again is no error
            uffd.set_mode(enable=Feature.RWP_ASYNC)
            assert uffd.features == uffd.fdinfo().features == ASYNC
        uffd.set_mode()
        assert uffd.features == uffd.fdinfo().features == ASYNC
        for _ in range(2):
            uffd.set_mode(disable=Feature.RWP_ASYNC)
            assert uffd.features == uffd.fdinfo().features == SYNC


@kinds
def test_switching_on_lets_those_go_on_who_wait(kind: MemoryKind) -> None:
    """And counts their accesses."""
    with armed(kind, SYNC, pages=3) as (area, uffd):
        touches = [Touch(area, 0), Touch(area, 2, data=b"x")]
        waiters(uffd, 2)
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert [touch.result() for touch in touches] == [area.pattern(0)[:32], b"x"]
        assert accessed(area) == [True, False, True]
        assert protected_pages(area) == [False, True, False]
        assert uffd.fdinfo().total == 0
        # Their messages, which nobody had read, went with them.
        assert uffd.read_events() == []


@kinds
def test_switching_on_wakes_those_who_wait_for_missing_pages(kind: MemoryKind) -> None:
    """They fault again, and their messages come again."""
    page_size = HUGE if "hugetlb" in kind else PAGE
    with armed(kind, SYNC) as (_, uffd), make_area(kind, 2) as empty:
        uffd.register(empty.memory, mode=RegisterMode.MISSING)
        with Touch(empty, 1) as touch:
            for _ in range(2):  # also where it is on already
                assert next_event(uffd) == PageFault(empty.page(1), FaultFlag(0), 0)
                assert uffd.read_events() == []
                uffd.set_mode(enable=Feature.RWP_ASYNC)
            assert next_event(uffd) == PageFault(empty.page(1), FaultFlag(0), 0)
            # Switching off wakes nobody.
            uffd.set_mode(disable=Feature.RWP_ASYNC)
            assert uffd.fdinfo().total == 1
            uffd.copy(empty.page(1), b"\1" * page_size)
            assert touch.result() == b"\1" * 32
        assert uffd.read_events() == []


@pytest.mark.parametrize("kind", [MemoryKind.SHMEM, MemoryKind.HUGETLB])
def test_switching_on_wakes_those_who_wait_for_a_minor_fault(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd(SYNC) as uffd:
        area.populate()
        area.drop()
        uffd.register(area.memory, mode=RegisterMode.MINOR)
        with Touch(area) as touch:
            for _ in range(2):
                assert next_event(uffd) == PageFault(area.start, FaultFlag.MINOR, 0)
                uffd.set_mode(enable=Feature.RWP_ASYNC)
            assert next_event(uffd) == PageFault(area.start, FaultFlag.MINOR, 0)
            uffd.continue_(area.memory)
            assert touch.result() == area.pattern(0)[:32]


@kinds
def test_switching_off_is_about_later_accesses(kind: MemoryKind) -> None:
    with armed(kind, ASYNC, pages=3) as (area, uffd):
        area.head(0)
        uffd.set_mode(disable=Feature.RWP_ASYNC)
        assert protected_pages(area) == [False, True, True]
        assert accessed(area) == [True, False, False]
        assert not read_waits(area, uffd, 0)
        assert read_waits(area, uffd, 1)
        assert accessed(area) == [True, True, False]


def test_a_forked_childs_descriptor_switches_the_parents_mode() -> None:
    """It is the same object of the kernel's."""
    with armed(MemoryKind.ANONYMOUS, SYNC) as (area, uffd), Touch(area) as touch:
        waiters(uffd, 1)
        in_child(lambda: uffd.set_mode(enable=Feature.RWP_ASYNC))
        assert touch.result() == area.pattern(0)[:32]
        assert uffd.fdinfo().features == ASYNC
        assert uffd.features == SYNC  # which this object cannot know of
