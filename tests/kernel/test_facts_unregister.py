"""UNREGISTER and WAKE (docs/kernel-api.md, 2.3 and 2.4)."""

from __future__ import annotations

import errno
import os

import pytest

from support.kernel import (
    KINDS,
    PAGE,
    Touch,
    make_area,
    next_event,
    protected,
    waiters,
)
from support.kernel_facts import (
    ask,
    ask_at,
    exited_owner,
    ordinary_file,
    registered,
    vma,
)
from support.kernel_releases import documented
from userfault.kernel import Feature, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import Request
from userfault.kernel.errors import (
    InvalidRequestError,
    NoMemoryError,
)
from userfault.kernel.mapping import Mapping, MemoryKind

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


# --- 2.3: UNREGISTER ------------------------------------------------------------------------------------------


@pytest.mark.fact("2.3")
def test_the_arguments_of_unregister() -> None:
    with (
        make_area(ANONYMOUS) as area,
        Userfaultfd() as uffd,
        ordinary_file() as fd,
        Mapping.of_file(fd, PAGE, shared=False) as file,
    ):
        assert ask_at(uffd.fd, Request.UNREGISTER, 0) == errno.EFAULT
        uffd.unregister(area.memory)  # never was registered
        uffd.register(area.start, PAGE)
        uffd.unregister(area.memory)
        uffd.unregister(area.memory)
        with pytest.raises(InvalidRequestError):
            uffd.unregister(file)
        area.memory.unmap(PAGE, PAGE)
        assert ask(uffd, Request.UNREGISTER, area.page(1), PAGE).errno == errno.EINVAL
        with pytest.raises(InvalidRequestError, match="nothing is mapped there"):
            uffd.unregister(area.page(1), PAGE)


@pytest.mark.fact("2.3")
def test_what_another_userfaultfd_has() -> None:
    with registered() as (area, _), Userfaultfd() as other:
        number = ask(other, Request.UNREGISTER, area.start, area.length).errno
        assert number in documented("UNREGISTER of another's mapping")
        assert vma(area.start).missing is (number != 0)
        if number:
            with pytest.raises(InvalidRequestError, match="another userfaultfd has it"):
                other.unregister(area.memory)


@pytest.mark.fact("2.3")
def test_unregister_of_an_owner_that_has_exited() -> None:
    with exited_owner() as gone:
        assert ask(gone.uffd, Request.UNREGISTER, gone.start, 0).errno == errno.EINVAL
        assert ask(gone.uffd, Request.UNREGISTER, gone.start, PAGE).errno == errno.ENOMEM
        with pytest.raises(NoMemoryError, match="exited"):
            gone.uffd.unregister(gone.start, PAGE)


@pytest.mark.fact("2.3")
@every_kind
def test_unregister_takes_protection_and_markers_away(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(optional=Feature.WP_UNPOPULATED) as uffd:
        area.memory.write(0, b"there")
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        marked = kind is not ANONYMOUS or Feature.WP_UNPOPULATED in uffd.features
        assert [protected(area.page(index)) for index in (0, 1)] == [True, marked]
        uffd.unregister(area.page(0), area.page_size)
        assert [protected(area.page(index)) for index in (0, 1)] == [False, marked]
        uffd.unregister(area.memory)
        assert not protected(area.page(1))
        area.memory.write(0, b"written")
        area.memory.write(area.page_size, b"too")


@pytest.mark.fact("2.3")
@pytest.mark.parametrize("mode", [MISSING, MISSING | WP | MINOR])
def test_unregister_wakes_all_kinds_where_missing_pages_were_trapped(mode: RegisterMode) -> None:
    with make_area(SHMEM) as area, Userfaultfd() as uffd:
        area.memory.write(0, b"protected")
        assert area.memory.fd is not None
        os.pwrite(area.memory.fd, b"cached", PAGE)
        uffd.register(area.memory, mode=mode)
        touches = [Touch(area, 2)]
        if mode != MISSING:
            uffd.writeprotect(area.start, PAGE)
            touches += [Touch(area, 0, data=b"x"), Touch(area, 1)]
        waiters(uffd, len(touches))
        assert ask(uffd, Request.UNREGISTER, area.start, area.length).errno == 0
        assert touches[0].result() == bytes(32)  # silently
        for touch in touches[1:]:
            touch.result()
        assert area.head(1)[:6] == b"cached"


@pytest.mark.fact("2.3")
@pytest.mark.parametrize("mode", [WP, MINOR], ids=["WP", "MINOR"])
def test_unregister_leaves_the_others_waiting(mode: RegisterMode) -> None:
    for ours in (False, True):
        with make_area(SHMEM) as area, Userfaultfd() as uffd:
            assert area.memory.fd is not None
            os.pwrite(area.memory.fd, b"cached", 0)
            uffd.register(area.memory, mode=mode)
            if mode == WP:
                uffd.writeprotect(area.memory)
            with Touch(area, 0, data=b"written"):
                waiters(uffd, 1)
                if ours:
                    uffd.unregister(area.memory)  # wakes them
                    continue
                assert ask(uffd, Request.UNREGISTER, area.start, area.length).errno == 0
                assert uffd.fdinfo().total == 1
                assert uffd.poll(0)
                uffd.wake(area.memory)


# --- 2.4: WAKE ------------------------------------------------------------------------------------------------


@pytest.mark.fact("2.4")
def test_wake_looks_at_no_mapping() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        assert ask_at(uffd.fd, Request.WAKE, 0) == errno.EFAULT
        uffd.wake(area.memory)  # not registered
        area.memory.unmap(PAGE, PAGE)
        uffd.wake(area.page(1), PAGE)  # not mapped
        uffd.wake(area.memory)
    with exited_owner() as gone:
        gone.uffd.wake(gone.start, PAGE)


@pytest.mark.fact("2.4")
def test_wake_reaches_the_pages_of_its_range_whether_their_messages_were_read_or_not() -> None:
    with registered() as (area, uffd), Touch(area, 0), Touch(area, 2, offset=100):
        waiters(uffd, 2)
        # Unread: taken back, and queued anew.
        uffd.wake(area.page(0), 2 * PAGE)
        waiters(uffd, 2)
        first, second = next_event(uffd), next_event(uffd)
        assert isinstance(first, PageFault)
        assert isinstance(second, PageFault)
        # The one that was not woken is first now.
        assert [first.address, second.address] == [area.page(2), area.page(0)]
        # Read: a new message comes, and the other's does not.
        uffd.wake(area.page(2), PAGE)
        again = next_event(uffd)
        assert isinstance(again, PageFault)
        assert again.address == area.page(2)
        assert uffd.read_events() == []
        uffd.zeropage(area.memory)


@pytest.mark.fact("2.4")
def test_wake_reaches_the_waiters_of_its_own_userfaultfd_only() -> None:
    with registered() as (area, uffd), Userfaultfd() as other, Touch(area):
        next_event(uffd)
        other.wake(area.memory)
        assert uffd.fdinfo().total == 1
        # Neither does an answer by another one.
        other.copy(area.start, area.pattern(0))
        assert uffd.fdinfo().total == 1
        assert not uffd.poll(0)
        uffd.wake(area.memory)


@pytest.mark.fact("2.4")
def test_messages_that_a_dead_handler_had_read_are_had_again_over_the_whole_address_space() -> None:
    with registered() as (area, uffd), Touch(area, 0), Touch(area, 3):
        waiters(uffd, 2)
        with Userfaultfd.from_fd(os.dup(uffd.fd)) as handler:
            assert len(handler.read_events()) == 2
        assert (uffd.fdinfo().pending, uffd.fdinfo().total) == (0, 2)
        uffd.wake(0, 0x7FFFFFFFF000 if PAGE == 4096 else area.page(4))
        found: set[int] = set()
        while len(found) < 2:
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            found.add(event.address)
        assert found == {area.page(0), area.page(3)}
        uffd.zeropage(area.memory)
