"""The kernel's unit scenarios of write protection: across fork, with pinned pages, on empty pages.

The scenarios and their numbers are those of the kernel's own `uffd-unit-tests`, listed in docs/kernel-api.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from support.kernel import (
    KINDS,
    Area,
    Link,
    Subject,
    Touch,
    available_features,
    in_child,
    make_area,
    protected,
    subject,
)
from support.kernel_facts import entry
from support.kernel_scenarios import (
    Handler,
    for_kinds,
    pin_briefly,
    pinned,
    spare_pages,
    whole_page,
    zap,
)
from userfault.kernel import Feature, Fork, RegisterMode, Userfaultfd
from userfault.kernel.abi import PagemapBit
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import MemoryKind

WP = RegisterMode.WP

every_memory = pytest.mark.needs_feature("PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM")


def _forgets_huge_pages(kind: MemoryKind) -> bool:
    """Whether fork treats the protection of these huge pages wrongly, as it did before Linux 6.4.

    There the child inherits the mark always (not with an event alone), and it is lost in copies of pinned pages:
    "mm/hugetlb: fix uffd-wp during fork()", "mm/hugetlb: fix uffd-wp bit lost when unsharing happens". No feature
    tells; this one came with the same release.
    """
    return kind is MemoryKind.PRIVATE_HUGETLB and not available_features() & Feature.WP_UNPOPULATED


def _only_forks(_: Userfaultfd, event: AnyEvent) -> None:
    assert isinstance(event, Fork)


def _write_protected_page(link: Link, area: Area, features: Feature) -> Userfaultfd:
    """In a process of its own: populate and protect the first page, and give the descriptor to the test."""
    uffd = Userfaultfd(features)
    uffd.register(area.memory, mode=WP)
    area.memory.write(0, area.pattern(0))
    uffd.writeprotect(area.memory)
    link.send("protected", (uffd.fd,))
    assert link.receive() == "go on"
    return uffd


def _fork_and_look(link: Link, area: Area, features: Feature) -> list[bool]:
    """Whether the page is protected, here and in a new child in turn, from step to step."""
    uffd = _write_protected_page(link, area, features)
    seen = [protected(area.start), in_child(protected, area.start)]
    zap(area)
    assert not (area.shared and entry(area.start) & PagemapBit.PRESENT)
    seen += [protected(area.start), in_child(protected, area.start)]
    uffd.writeprotect(area.memory, protect=False)
    seen.append(protected(area.start))
    with Touch(area, 0, data=b"second"):
        pass
    seen.append(protected(area.start))
    return seen


@contextlib.contextmanager
def _forking(kind: MemoryKind, run: Any, features: Feature) -> Iterator[tuple[Subject, Area, Handler]]:
    """A process that runs `run(link, area, features)`, and has its fork events read."""
    with (
        make_area(kind, 1) as area,
        spare_pages(kind, 4),
        subject(run, area, features) as process,
        process.receive_uffd() as uffd,
        Handler(uffd, _only_forks) as handler,
    ):
        process.send("go on")
        yield process, area, handler


@pytest.mark.scenario(8)
@every_memory
@for_kinds(*KINDS)
def test_fork_without_event(kind: MemoryKind) -> None:
    """Scenario 8, wp-fork: the child's pages are not protected."""
    with _forking(kind, _fork_and_look, Feature(0)) as (process, _, handler):
        inherited = _forgets_huge_pages(kind)
        assert process.receive() == [True, inherited, True, inherited, False, False]
    assert handler.events == []


@pytest.mark.scenario(9)
@every_memory
@pytest.mark.needs_privilege("EVENT_FORK")
@for_kinds(*KINDS)
def test_fork_with_event(kind: MemoryKind) -> None:
    """Scenario 9, wp-fork-with-event: the child's pages are protected, those that are there and those that are not."""
    with _forking(kind, _fork_and_look, Feature.EVENT_FORK) as (process, _, handler):
        assert process.receive() == [True, True, True, True, False, False]
    assert len(handler.events) == 2


def _look_and_pin(area: Area) -> tuple[bool, bool, bool, bytes]:
    """Of a page: whether this process alone maps it, before and after a pin; whether it is protected then."""
    before = entry(area.start)
    head = pin_briefly(area.start)
    after = entry(area.start)
    alone = PagemapBit.EXCLUSIVE
    return bool(before & alone), bool(after & alone), bool(after & PagemapBit.UFFD_PROTECTED), head


def _look(area: Area) -> tuple[bool, bool, bytes]:
    """Of a page: whether this process alone maps it, whether it is protected, how it begins."""
    flags = entry(area.start)
    return bool(flags & PagemapBit.EXCLUSIVE), bool(flags & PagemapBit.UFFD_PROTECTED), area.head(0)


def _fork_with_pins(link: Link, area: Area, features: Feature) -> None:
    uffd = _write_protected_page(link, area, features)
    link.send("the page may be pinned")
    assert link.receive() == "it is"
    link.send(in_child(_look, area))
    assert link.receive() == "it is no more"
    link.send(in_child(_look_and_pin, area))
    assert protected(area.start)
    uffd.close()


def _check_pins(kind: MemoryKind, features: Feature) -> None:
    inherited = bool(features & Feature.EVENT_FORK)
    copied = inherited and not _forgets_huge_pages(kind)
    private = kind not in (MemoryKind.SHMEM, MemoryKind.HUGETLB)
    with _forking(kind, _fork_with_pins, features) as (process, area, handler):
        assert process.receive() == "the page may be pinned"
        # First the pin, then the fork. A private page that is pinned is copied for the child at once.
        with pinned(process.pid, area.start):
            process.send("it is")
            alone, is_protected, head = process.receive()
        assert is_protected is copied
        assert head == area.pattern(0)[:32]
        if private:
            assert alone, "fork has not copied the page: it was not pinned"
        # First the fork, then the pin, in the child. A private page is copied when it is pinned.
        process.send("it is no more")
        alone_before, alone_after, is_protected, head = process.receive()
        assert is_protected is copied
        assert head == area.pattern(0)[:32]
        if private:
            assert not alone_before
            assert alone_after, "the pin has not copied the page"
        # The process itself has kept its own.
        assert process.receive() is None
        assert process.wait() == 0
    assert len(handler.events) == (2 if inherited else 0)


@pytest.mark.scenario(10)
@every_memory
@pytest.mark.needs_kernel_faults  # for the pin
@for_kinds(*KINDS)
def test_fork_of_pinned_pages_without_event(kind: MemoryKind) -> None:
    """Scenario 10, wp-fork-pin. The kernel's own test pins for long, by a device of debug kernels."""
    _check_pins(kind, Feature(0))


@pytest.mark.scenario(11)
@every_memory
@pytest.mark.needs_privilege("EVENT_FORK")
@for_kinds(*KINDS)
def test_fork_of_pinned_pages_with_event(kind: MemoryKind) -> None:
    """Scenario 11, wp-fork-pin-with-event."""
    _check_pins(kind, Feature.EVENT_FORK)


@pytest.mark.scenario(12)
@pytest.mark.needs_feature("PAGEFAULT_FLAG_WP", "WP_UNPOPULATED")
@for_kinds(MemoryKind.ANONYMOUS)
def test_empty_pages(kind: MemoryKind) -> None:
    """Scenario 12, wp-unpopulated."""
    with make_area(kind, 1) as area, Userfaultfd(Feature.WP_UNPOPULATED) as uffd:
        uffd.register(area.memory, mode=WP)
        # An empty page can be marked, and the mark taken away.
        uffd.writeprotect(area.memory)
        assert protected(area.start)
        uffd.writeprotect(area.memory, protect=False)
        assert not protected(area.start)
        # The mark goes with MADV_DONTNEED.
        uffd.writeprotect(area.memory)
        area.drop()
        assert not protected(area.start)
        # Then a write is not trapped.
        with Touch(area, 0, data=b"\1"):
            pass
        assert not protected(area.start)
        area.drop()
        # Reading a marked page gives zeros, and it stays protected.
        uffd.writeprotect(area.memory)
        with Touch(area, 0) as touch:
            assert touch.result() == bytes(32)
        assert protected(area.start)
        area.drop()
        assert not protected(area.start)
        assert whole_page(area, 0) == bytes(area.page_size)
        assert uffd.read_events() == []
        assert uffd.fdinfo().total == 0
