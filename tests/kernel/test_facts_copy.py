"""COPY (docs/kernel-api.md, 2.5).

Unchecked: ENOSPC in place of ESRCH (Linux 4.11 and 4.12); EIO for a huge page that the hardware broke. Running out of
memory in a control group is in test_facts_gotchas.py, an empty pool of huge pages too.
"""

from __future__ import annotations

import errno
import os

import pytest

from support.kernel import (
    HUGE,
    HUGE_KINDS,
    KINDS,
    PAGE,
    SHARED_KINDS,
    Touch,
    make_area,
    next_event,
    protected,
    waiters,
)
from support.kernel_facts import (
    UNTOUCHED,
    Answer,
    Job,
    ask,
    ask_at,
    bytes_at,
    exited_owner,
    fill_cache,
    in_file,
    mounted,
    ordinary_file,
    registered,
    signal_info,
    vma,
)
from support.kernel_releases import documented
from support.kernel_scenarios import huge_area, whole_page
from userfault.kernel import FaultKind, Feature, OpenWay, Outcome, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import CopyMode, Request
from userfault.kernel.errors import (
    BadAddressError,
    InvalidRequestError,
    NoMemoryError,
    NotRegisteredError,
    PageExistsError,
    TargetExitedError,
)
from userfault.kernel.mapping import Advice, Mapping, MemoryKind, Protection

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
EXISTS = Answer(errno.EEXIST, -errno.EEXIST)
INVALID = Answer(errno.EINVAL, -errno.EINVAL)

pytestmark = pytest.mark.fact("2.5")
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@every_kind
def test_the_page_is_there_whole_and_writable(kind: MemoryKind) -> None:
    with registered(kind, 2) as (area, uffd):
        with Touch(area, 0):
            assert next_event(uffd) == PageFault(area.start, 0, 0)  # type: ignore[arg-type]
            assert uffd.copy(area.start, area.pattern(0)) == area.page_size
        assert whole_page(area, 0) == area.pattern(0)
        area.memory.write(0, b"written")
        assert uffd.read_events() == []
        if area.shared:
            assert in_file(area, 0)[:7] == b"written"


def test_the_arguments_win_over_an_owner_that_has_exited() -> None:
    with exited_owner() as gone, make_area(ANONYMOUS) as source:
        source.populate()
        uffd, start = gone.uffd, gone.start
        assert ask_at(uffd.fd, Request.COPY, 0) == errno.EFAULT
        refused = Answer(errno.EINVAL, UNTOUCHED)
        assert ask(uffd, Request.COPY, start + 1, source.start, PAGE, 0) == refused
        assert ask(uffd, Request.COPY, start, source.start, PAGE, 1 << 2) == refused
        assert ask(uffd, Request.COPY, start, source.start, PAGE, 0) == Answer(errno.ESRCH, UNTOUCHED)
        assert uffd.try_copy(start, source.memory) == Outcome(0, errno.ESRCH)
        with pytest.raises(TargetExitedError, match="exited") as refusal:
            uffd.copy(start, source.memory)
        assert refusal.value.done == 0


def test_the_source_lies_in_the_address_space() -> None:
    with registered() as (area, uffd):
        for length in (PAGE, 2 * PAGE):
            wraps = ask(uffd, Request.COPY, area.start, (1 << 64) - PAGE, length, 0)
            assert wraps == Answer(errno.EINVAL, UNTOUCHED)
        assert ask(uffd, Request.COPY, area.start, 1 << 63, PAGE, 0) in documented(
            "COPY from the kernel's half"
        )
        with pytest.raises((InvalidRequestError, BadAddressError)):
            uffd.copy(area.start, 1 << 63, PAGE)


def test_the_target_is_one_registered_mapping() -> None:
    missing = Answer(errno.ENOENT, -errno.ENOENT)
    with make_area(ANONYMOUS) as area, make_area(ANONYMOUS) as source, Userfaultfd() as uffd:
        source.populate()
        assert ask(uffd, Request.COPY, area.start, source.start, PAGE, 0) == missing  # not registered
        with pytest.raises(NotRegisteredError, match="not registered"):
            uffd.copy(area.start, source.start, PAGE)
        uffd.register(area.start, 2 * PAGE)
        assert ask(uffd, Request.COPY, area.start, source.start, 3 * PAGE, 0) == missing  # a part of it
        assert not uffd.poll(0)
        assert ask(uffd, Request.COPY, area.start, source.start, 2 * PAGE, 0) == Answer(0, 2 * PAGE)
        area.memory.unmap(PAGE, PAGE)
        assert ask(uffd, Request.COPY, area.page(1), source.start, PAGE, 0) == missing  # not mapped


@pytest.mark.parametrize("how", ["mprotect", "madvise", "mlock", "mode"])
def test_what_splits_a_mapping_splits_the_target(how: str) -> None:
    with registered() as (area, uffd), make_area(ANONYMOUS) as source:
        source.populate()
        match how:
            case "mprotect":
                area.memory.protect(Protection.READ, 2 * PAGE, 2 * PAGE)
            case "madvise":
                area.memory.madvise(Advice.DONTDUMP, 2 * PAGE, 2 * PAGE)
            case "mlock":
                # On fault only, or it would wait for the missing pages.
                area.memory.mlock(2 * PAGE, 2 * PAGE, on_fault=True)
            case "mode":
                uffd.register(area.page(2), 2 * PAGE, mode=MISSING | WP)
        assert vma(area.start).end == area.page(2)
        assert uffd.try_copy(area.page(1), source.start, 2 * PAGE) == Outcome(0, errno.ENOENT)
        for page in (1, 2):
            assert uffd.copy(area.page(page), source.start, PAGE) == PAGE


def test_any_userfaultfd_of_the_process_may_fill_and_any_mode_will_do() -> None:
    with registered() as (area, _), Userfaultfd() as other:
        assert other.copy(area.start, area.pattern(0)) == PAGE
    for kind, mode in ((ANONYMOUS, WP), (SHMEM, MINOR), (SHMEM, WP)):
        with registered(kind, mode=mode) as (area, uffd):
            assert uffd.copy(area.start, area.pattern(0)) == PAGE
            assert area.head(0) == area.pattern(0)[:32]


@every_kind
def test_write_protected_from_the_beginning(kind: MemoryKind) -> None:
    with registered(kind, 1) as (area, uffd):
        source = area.pattern(0)
        with pytest.raises(InvalidRequestError, match="not registered for WP"):
            uffd.copy(area.start, source, write_protect=True)
        uffd.register(area.memory, mode=MISSING | WP)
        uffd.copy(area.start, source, write_protect=True)
        assert protected(area.start)
        with Touch(area, data=b"written"):
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert (event.kind, event.write) == (FaultKind.WRITE_PROTECT, True)
            uffd.writeprotect(area.memory, protect=False)
        assert whole_page(area, 0) == b"written" + source[7:]


def test_write_protection_without_the_mode_is_an_error_of_the_work() -> None:
    with registered() as (area, uffd), make_area(ANONYMOUS) as source:
        source.populate()
        assert ask(uffd, Request.COPY, area.start, source.start, PAGE, CopyMode.WP) == INVALID


@pytest.mark.needs_feature("WP_ASYNC")
def test_files_cannot_be_filled() -> None:
    with (
        ordinary_file() as fd,
        Mapping.of_file(fd, PAGE, shared=False) as memory,
        make_area(ANONYMOUS) as source,
        Userfaultfd(Feature.WP_ASYNC) as uffd,
    ):
        source.populate()
        uffd.register(memory, mode=WP)
        assert ask(uffd, Request.COPY, memory.address, source.start, PAGE, 0) == INVALID
        with pytest.raises(InvalidRequestError, match="memory of a kind that cannot be filled"):
            uffd.copy(memory, source.start, PAGE)


# --- what is there already ------------------------------------------------------------------------------------


@every_kind
def test_a_page_that_is_mapped_exists(kind: MemoryKind) -> None:
    with registered(kind, 1) as (area, uffd):
        uffd.copy(area.start, area.pattern(0))
        for _ in range(2):
            with pytest.raises(PageExistsError, match="wake its waiters"):
                uffd.copy(area.start, bytes(area.page_size))
        assert whole_page(area, 0) == area.pattern(0)


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_a_page_of_the_file_exists_in_shared_memory_and_is_shadowed_in_private(kind: MemoryKind) -> None:
    with registered(kind, 1) as (area, uffd):
        fill_cache(area, 0, b"of the file")
        outcome = uffd.try_copy(area.start, area.pattern(0))
        if kind in SHARED_KINDS:
            assert outcome == Outcome(0, errno.EEXIST)
        else:
            assert outcome == Outcome(area.page_size, 0)
            assert whole_page(area, 0) == area.pattern(0)
        assert in_file(area, 0)[:11] == b"of the file"


def test_a_transparent_huge_page_exists() -> None:
    with huge_area(1) as area, Userfaultfd() as uffd:
        area.memory.write(0, bytes(area.length))
        area.memory.madvise(Advice.COLLAPSE)
        uffd.register(area.memory)
        assert uffd.try_copy(area.page(7), area.pattern(7)) == Outcome(0, errno.EEXIST)


@pytest.mark.parametrize(
    "kind", [pytest.param(ANONYMOUS, marks=pytest.mark.needs_feature("WP_UNPOPULATED")), *KINDS[1:]], ids=str
)
def test_a_marker_of_write_protection_gives_way_and_is_forgotten(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(optional=Feature.WP_UNPOPULATED) as uffd:
        uffd.register(area.memory, mode=MISSING | WP)
        uffd.writeprotect(area.memory)
        assert protected(area.page(0))
        uffd.copy(area.page(0), area.pattern(0))
        assert not protected(area.page(0))
        area.memory.write(0, b"nobody is told")
        uffd.copy(area.page(1), area.pattern(1), write_protect=True)
        assert protected(area.page(1))
        assert uffd.read_events() == []


@pytest.mark.needs_feature("POISON")
@every_kind
def test_poison_gives_way(kind: MemoryKind) -> None:
    with registered(kind, 1) as (area, uffd):
        uffd.poison(area.start, area.page_size)
        uffd.copy(area.start, area.pattern(0))
        assert whole_page(area, 0) == area.pattern(0)


@pytest.mark.needs_linux("MADV_GUARD_INSTALL")
def test_a_guard() -> None:
    with registered() as (area, uffd), make_area(ANONYMOUS) as source:
        source.populate()
        area.memory.madvise(Advice.GUARD_INSTALL, 0, PAGE)
        answer = ask(uffd, Request.COPY, area.start, source.start, PAGE, 0)
        assert answer in documented("COPY over a guard")
        if answer.errno:
            area.memory.madvise(Advice.GUARD_REMOVE, 0, PAGE)
            uffd.copy(area.start, source.start, PAGE)
        assert area.head(0) == source.pattern(0)[:32]


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_a_source_that_cannot_be_read_ends_it_after_what_could() -> None:
    fault = Answer(errno.EFAULT, -errno.EFAULT)
    with registered() as (area, uffd), make_area(ANONYMOUS) as source:
        source.populate()
        source.memory.protect(Protection.NONE, PAGE, PAGE)
        source.memory.unmap(2 * PAGE, PAGE)
        assert ask(uffd, Request.COPY, area.start, source.start, 4 * PAGE, 0) == Answer(errno.EAGAIN, PAGE)
        for page in (1, 2):
            assert ask(uffd, Request.COPY, area.page(page), source.page(page), PAGE, 0) == fault
        with pytest.raises(BadAddressError, match="the source cannot be read"):
            uffd.copy(area.page(1), source.page(1), PAGE)
        # The page itself is fine.
        uffd.copy(area.page(1), source.start, PAGE)


@pytest.mark.needs_kernel_faults
def test_a_source_that_is_missing_itself_has_to_be_served() -> None:
    with registered() as (area, uffd), registered() as (source, handler):
        with Job(uffd.copy, area.start, source.start, PAGE) as copying:
            event = next_event(handler)
            assert isinstance(event, PageFault)
            assert event.address == source.start
            assert not copying.done
            handler.copy(source.start, source.pattern(5))
            assert copying.result() == PAGE
        assert area.head(0) == source.pattern(5)[:32]


def test_a_source_that_is_missing_cannot_be_served_user_mode_only() -> None:
    way = OpenWay.USER_MODE_ONLY
    with registered() as (area, uffd), make_area(ANONYMOUS) as source, Userfaultfd(way=way) as handler:
        handler.register(source.memory)
        answer = ask(uffd, Request.COPY, area.start, source.start, PAGE, 0)
        assert answer == Answer(errno.EFAULT, -errno.EFAULT)


@pytest.mark.parametrize("kind", SHARED_KINDS, ids=str)
def test_beyond_the_end_of_the_file(kind: MemoryKind) -> None:
    with registered(kind, 2) as (area, uffd), Mapping.anonymous(area.page_size) as source:
        assert area.memory.fd is not None
        os.ftruncate(area.memory.fd, area.page_size)
        answer = ask(uffd, Request.COPY, area.page(1), source.address, area.page_size, 0)
        assert answer in documented(f"COPY beyond the end of a file of {kind}")
        with pytest.raises((BadAddressError, NoMemoryError)):
            uffd.copy(area.page(1), source.address, area.page_size)
        uffd.copy(area.page(0), source.address, area.page_size)


def test_a_full_file_system_is_out_of_memory() -> None:
    with mounted("tmpfs", f"size={2 * PAGE}") as folder:
        fd = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, 4 * PAGE)
            with (
                Mapping.of_file(fd, 4 * PAGE) as memory,
                Userfaultfd() as uffd,
                make_area(ANONYMOUS) as source,
            ):
                source.populate()
                uffd.register(memory)
                partial = ask(uffd, Request.COPY, memory.address, source.start, 4 * PAGE, 0)
                assert partial == Answer(errno.EAGAIN, 2 * PAGE)
                answer = ask(uffd, Request.COPY, memory.address + 2 * PAGE, source.start, PAGE, 0)
                assert answer == Answer(errno.ENOMEM, -errno.ENOMEM)
                with pytest.raises(NoMemoryError, match="out of memory"):
                    uffd.copy(memory.address + 2 * PAGE, source.start, PAGE)
        finally:
            os.close(fd)


@pytest.mark.parametrize("kind", HUGE_KINDS, ids=str)
def test_huge_pages_are_copied_whole_from_anywhere(kind: MemoryKind) -> None:
    with registered(kind, 2) as (area, uffd):
        source = bytes(range(251)) * (HUGE // 250)
        with Mapping.anonymous(2 * HUGE) as memory:
            memory.write(0, source)
            for start, length in ((area.start, PAGE), (area.start + PAGE, HUGE), (area.start, HUGE + PAGE)):
                assert ask(uffd, Request.COPY, start, memory.address, length, 0) == INVALID
            with pytest.raises(InvalidRequestError, match="a huge page is cut"):
                uffd.copy(area.start, memory.address, PAGE)
            uffd.copy(area.start, memory.address + 3, HUGE)
            assert area.head(0) == source[3:35]
            assert bytes_at(area.start + HUGE - 32) == source[HUGE + 3 - 32 : HUGE + 3]


def test_pages_are_mapped_as_the_mapping_allows() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        area.memory.protect(Protection.READ)
        uffd.copy(area.start, area.pattern(0))
        assert area.head(0) == area.pattern(0)[:32]

        def write() -> None:
            from support.kernel import libc

            libc.memset(area.start, 0, 1)

    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        area.memory.protect(Protection.NONE)
        uffd.copy(area.start, area.pattern(0))
        info = signal_info(bytes_at, area.start)
        assert info is not None
        assert info.number == 11  # SIGSEGV


def test_all_of_a_partial_copy_can_be_had_by_going_on() -> None:
    with registered(pages=6) as (area, uffd), make_area(ANONYMOUS, 6) as source:
        source.populate()
        uffd.copy(area.page(3), source.page(3), PAGE)
        done, calls = 0, []
        while done < area.length:
            outcome = uffd.try_copy(area.start + done, source.start + done, area.length - done)
            calls.append(outcome)
            done += outcome.done if outcome.errno != errno.EEXIST else PAGE
        assert calls == [
            Outcome(3 * PAGE, errno.EAGAIN),
            Outcome(0, errno.EEXIST),
            Outcome(2 * PAGE, 0),
        ]
        assert [area.head(page) for page in range(6)] == [source.pattern(page)[:32] for page in range(6)]


def test_two_fills_at_once_give_one_page() -> None:
    with registered() as (area, uffd), Touch(area), Touch(area, offset=32):
        waiters(uffd, 2)
        first = Job(uffd.try_copy, area.start, area.pattern(1))
        second = Job(uffd.try_copy, area.start, area.pattern(2))
        outcomes = {first.result(), second.result()}
        assert outcomes == {Outcome(PAGE, 0), Outcome(0, errno.EEXIST)}
        uffd.wake(area.start, PAGE)
        assert whole_page(area, 0) in (area.pattern(1), area.pattern(2))
