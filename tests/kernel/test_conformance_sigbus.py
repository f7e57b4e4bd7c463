"""The kernel's unit scenarios that end in SIGBUS: in place of messages, and for poisoned pages.

The scenarios and their numbers are those of the kernel's own `uffd-unit-tests`, listed in docs/kernel-api.md.
"""

from __future__ import annotations

import pytest

from support.kernel import KINDS, Area, Link, in_child, make_area, subject
from support.kernel_scenarios import (
    BUS_ADRERR,
    BUS_MCEERR_AR,
    BusError,
    BusErrors,
    Handler,
    for_kinds,
    page_of,
    release_pages,
    replace_page,
    spare_pages,
    whole_page,
)
from userfault.kernel import FaultKind, Feature, Fork, OpenWay, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import FaultFlag, Operation
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import MemoryKind

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
PAGES = 4


def _touch_and_repair(area: Area, uffd: Userfaultfd, write_protect: bool) -> list[tuple[str, int, int]]:
    """Read and write each page; what does not work is repaired once, and tried again. What had to be repaired."""
    repaired: list[tuple[str, int, int]] = []

    def repair(error: BusError) -> None:
        page = page_of(area, error.address)
        place = (area.page(page), area.page_size)
        if ("filled", page, BUS_ADRERR) not in repaired:
            assert uffd.copy(place[0], area.pattern(page), write_protect=write_protect) == area.page_size
            repaired.append(("filled", page, error.code))
        else:
            assert write_protect, f"page {page} was filled, and its access is not tried again"
            assert ("unprotected", page, BUS_ADRERR) not in repaired
            uffd.writeprotect(*place, protect=False)
            repaired.append(("unprotected", page, error.code))

    with BusErrors(repair):
        for page in range(area.pages):
            content = whole_page(area, page)
            assert content == area.pattern(page)
            area.memory.write(page * area.page_size, content)
            assert whole_page(area, page) == content
    return repaired


def _touch_in_vain(area: Area) -> list[tuple[int, int]]:
    """Read each page; what cannot be read is replaced by other memory. Which pages, and with what code."""
    with BusErrors(lambda error: replace_page(area, page_of(area, error.address))) as errors:
        for page in range(area.pages):
            assert whole_page(area, page) == bytes(area.page_size)
    return [(page_of(area, error.address), error.code) for error in errors]


def _fault_without_messages(link: Link, area: Area, mode: RegisterMode) -> None:
    with Userfaultfd(Feature.SIGBUS | Feature.EVENT_FORK) as uffd:
        uffd.register(area.memory, mode=mode)
        link.send("registered", (uffd.fd,))
        assert link.receive() == "go on"
        link.send(_touch_and_repair(area, uffd, bool(mode & WP)))
        release_pages(area)
        link.send(in_child(_touch_in_vain, area))
        # Until the test has seen that nothing waits.
        assert link.receive() == "the end"


def _only_forks(_: Userfaultfd, event: AnyEvent) -> None:
    assert isinstance(event, Fork)


def _check_sigbus(kind: MemoryKind, mode: RegisterMode) -> None:
    with (
        make_area(kind, PAGES) as area,
        spare_pages(kind, 2 * PAGES),
        subject(_fault_without_messages, area, mode) as process,
        process.receive_uffd() as uffd,
    ):
        with Handler(uffd, _only_forks) as handler:
            process.send("go on")
            repairs = ["filled", "unprotected"] if mode & WP else ["filled"]
            expected = [(repair, page, BUS_ADRERR) for page in range(PAGES) for repair in repairs]
            assert process.receive() == expected
            assert process.receive() == [(page, BUS_ADRERR) for page in range(PAGES)]
        assert handler.events == [Fork(handler.children[0])]
        assert uffd.fdinfo().total == 0
        process.send("the end")
        assert process.receive() is None
        assert process.wait() == 0


@pytest.mark.scenario(27)
@pytest.mark.needs_privilege("EVENT_FORK")
@pytest.mark.needs_feature("SIGBUS")
@for_kinds(*KINDS)
def test_sigbus(kind: MemoryKind) -> None:
    """Scenario 27, sigbus."""
    _check_sigbus(kind, MISSING)


@pytest.mark.scenario(28)
@pytest.mark.needs_privilege("EVENT_FORK")
@pytest.mark.needs_feature("SIGBUS", "PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM")
@for_kinds(*KINDS)
def test_sigbus_with_write_protection(kind: MemoryKind) -> None:
    """Scenario 28, sigbus-wp."""
    _check_sigbus(kind, MISSING | WP)


def _fault_alone(area: Area, mode: RegisterMode) -> tuple[list[tuple[str, int, int]], int]:
    with Userfaultfd(Feature.SIGBUS, way=OpenWay.USER_MODE_ONLY) as uffd:
        uffd.register(area.memory, mode=mode)
        repaired = _touch_and_repair(area, uffd, bool(mode & WP))
        return repaired, len(uffd.read_events()) + uffd.fdinfo().total


@pytest.mark.needs_feature("SIGBUS", "PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM")
@for_kinds(MemoryKind.ANONYMOUS, MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM)
def test_sigbus_needs_no_privilege(kind: MemoryKind) -> None:
    """What scenarios 27 and 28 ask for without a fork event, which is not for everybody."""
    for mode, repairs in ((MISSING, ["filled"]), (MISSING | WP, ["filled", "unprotected"])):
        with make_area(kind, PAGES) as area:
            repaired, messages = in_child(_fault_alone, area, mode)
        assert repaired == [(repair, page, BUS_ADRERR) for page in range(PAGES) for repair in repairs]
        assert messages == 0


_CURE = b"\xee"


def _read_poisoned_pages(link: Link, area: Area) -> tuple[list[BusError], list[str]]:
    """Read each page; poisoned ones are filled with something else, once. What came, and what the pages held."""
    with Userfaultfd() as uffd:
        registration = uffd.register(area.memory)
        expected = Operation.COPY | Operation.POISON
        assert registration.operations & expected == expected
        link.send("registered", (uffd.fd,))
        assert link.receive() == "go on"

        def repair(error: BusError) -> None:
            place = area.page(page_of(area, error.address))
            assert uffd.copy(place, _CURE * area.page_size) == area.page_size

        names = {bytes(area.page_size): "zeros", _CURE * area.page_size: "cured"}
        with BusErrors(repair) as errors:
            pages = [names[whole_page(area, page)] for page in range(area.pages)]
        return list(errors), pages


@pytest.mark.scenario(31)
@pytest.mark.needs_feature("POISON")
@for_kinds(*KINDS)
def test_poison(kind: MemoryKind) -> None:
    """Scenario 31, poison."""

    def serve(uffd: Userfaultfd, event: AnyEvent) -> None:
        assert isinstance(event, PageFault)
        assert event.flags == FaultFlag(0)
        page = page_of(area, event.address)
        if page % 2:
            assert uffd.copy(area.page(page), bytes(area.page_size)) == area.page_size
        else:
            assert uffd.poison(area.page(page), area.page_size) == area.page_size

    with (
        make_area(kind, PAGES) as area,
        spare_pages(kind, PAGES),
        subject(_read_poisoned_pages, area) as process,
        process.receive_uffd() as uffd,
    ):
        with Handler(uffd, serve) as handler:
            process.send("go on")
            errors, pages = process.receive()
        assert handler.count(FaultKind.MISSING) == PAGES
        assert len(handler.events) == PAGES
        assert pages == ["cured", "zeros", "cured", "zeros"]
        assert [page_of(area, error.address) for error in errors] == [0, 2]
        for error in errors:
            # As of broken memory; a kernel that knows nothing of broken memory calls it a bad address.
            if error.code == BUS_MCEERR_AR:
                assert 1 << error.lsb == area.page_size
            else:
                assert error.code == BUS_ADRERR
