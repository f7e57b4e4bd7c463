"""ZEROPAGE, CONTINUE and POISON (docs/kernel-api.md, 2.6 to 2.8).

Unchecked: EIO for a page that the hardware broke (a page broken on purpose is lost to the machine until it boots);
the write barrier in CONTINUE (no test could tell that it was not needed); what POISON makes the kernel log.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from support.kernel import (
    HUGE,
    HUGE_KINDS,
    KINDS,
    PAGE,
    SHARED_KINDS,
    Area,
    Touch,
    in_child,
    make_area,
    next_event,
    protected,
)
from support.kernel_facts import (
    UNTOUCHED,
    Answer,
    Job,
    ask,
    ask_at,
    exited_owner,
    fill_cache,
    in_file,
    kernel_reads,
    registered,
    signal_info,
    swap_out,
)
from support.kernel_releases import documented
from userfault.kernel import (
    FaultKind,
    Feature,
    OpenWay,
    Outcome,
    PageFault,
    RegisterMode,
    Userfaultfd,
    pagemap,
)
from userfault.kernel.abi import PageCategory, Request
from userfault.kernel.errors import (
    BadAddressError,
    HardwareError,
    InvalidRequestError,
    NotRegisteredError,
    PageExistsError,
    TargetExitedError,
)
from userfault.kernel.mapping import Advice, Mapping, MemoryKind, Protection

ANONYMOUS, SHMEM, PRIVATE_SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM
SMALL_KINDS = (ANONYMOUS, SHMEM, PRIVATE_SHMEM)
CACHED_KINDS = KINDS[1:]
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
EXISTS = Answer(errno.EEXIST, -errno.EEXIST)
INVALID = Answer(errno.EINVAL, -errno.EINVAL)
NOT_FOUND = Answer(errno.ENOENT, -errno.ENOENT)
REFUSED = Answer(errno.EINVAL, UNTOUCHED)
EHWPOISON = 133

zeropage = pytest.mark.fact("2.6")
continue_ = pytest.mark.fact("2.7")


def poison(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.fact("2.8")(pytest.mark.needs_feature("POISON")(function))  # type: ignore[no-any-return]


def blocks(area: Area) -> int:
    """How many bytes its file has."""
    assert area.memory.fd is not None
    return os.fstat(area.memory.fd).st_blocks * 512


def poisoned(address: int) -> bool:
    """Whether a system call cannot have the byte. Where it is missing instead, this would wait."""
    return kernel_reads(address) == errno.EFAULT


def common(request: Request, kind: MemoryKind, mode: RegisterMode) -> None:
    """What is the same for all three: the arguments, what is no target, an owner that has exited."""
    with exited_owner() as gone:
        assert ask_at(gone.uffd.fd, request, 0) == errno.EFAULT
        assert ask(gone.uffd, request, gone.start + 1, PAGE, 0) == REFUSED
        assert ask(gone.uffd, request, gone.start, PAGE, 1 << 2) == REFUSED
        assert ask(gone.uffd, request, gone.start, PAGE, 0) == Answer(errno.ESRCH, UNTOUCHED)
        call = getattr(gone.uffd, "continue_" if request == Request.CONTINUE else request.name.lower())
        with pytest.raises(TargetExitedError, match="exited"):
            call(gone.start, PAGE)
    with make_area(kind) as area, Userfaultfd() as uffd:
        if kind is not ANONYMOUS:
            fill_cache(area, 0, bytes(area.length))
        call = getattr(uffd, "continue_" if request == Request.CONTINUE else request.name.lower())
        assert ask(uffd, request, area.start, PAGE, 0) == NOT_FOUND  # not registered
        with pytest.raises(NotRegisteredError, match="not registered"):
            call(area.start, PAGE)
        uffd.register(area.memory, mode=mode)
        area.memory.protect(Protection.READ, 2 * PAGE, 2 * PAGE)
        assert ask(uffd, request, area.start, 3 * PAGE, 0) == NOT_FOUND  # two mappings
        area.memory.unmap(3 * PAGE, PAGE)
        assert ask(uffd, request, area.page(3), PAGE, 0) == NOT_FOUND  # not mapped


# --- 2.6: ZEROPAGE --------------------------------------------------------------------------------------------


@zeropage
def test_the_arguments_and_targets_of_zeropage() -> None:
    common(Request.ZEROPAGE, ANONYMOUS, MISSING)
    with registered(mode=WP) as (area, uffd):
        assert ask(uffd, Request.ZEROPAGE, area.start, PAGE, 1 << 1) == REFUSED  # there is no WP mode


@zeropage
@pytest.mark.parametrize("kind", SMALL_KINDS, ids=str)
def test_zeros_are_there_and_writable(kind: MemoryKind) -> None:
    with registered(kind) as (area, uffd):
        with Touch(area) as touch:
            next_event(uffd)
            assert uffd.zeropage(area.start, 2 * PAGE) == 2 * PAGE
            assert touch.result() == bytes(32)
        # Shared memory gets a page of its own in the file, private memory shares the zero page.
        if kind is not ANONYMOUS:
            assert blocks(area) == (2 * PAGE if kind is SHMEM else 0)
        area.memory.write(0, b"written")
        assert uffd.read_events() == []
        assert (area.head(0)[:7], area.head(1)) == (b"written", bytes(32))
        if kind is SHMEM:
            assert in_file(area, 0)[:7] == b"written"


@zeropage
@pytest.mark.needs_linux("PAGEMAP_SCAN")
def test_private_memory_shares_the_zero_page() -> None:
    for kind, zero in ((ANONYMOUS, True), (PRIVATE_SHMEM, True), (SHMEM, False)):
        with registered(kind) as (area, uffd):
            uffd.zeropage(area.start, 2 * PAGE)
            area.memory.write(PAGE, b"written")
            found = pagemap.scan(area.memory, mask=PageCategory.PRESENT | PageCategory.PFNZERO)
            assert found.ranges() == ([(area.start, area.page(1))] if zero else []), kind


@zeropage
@pytest.mark.parametrize("kind", HUGE_KINDS, ids=str)
def test_huge_pages_have_no_zero_page(kind: MemoryKind) -> None:
    with registered(kind, 1) as (area, uffd):
        assert ask(uffd, Request.ZEROPAGE, area.start, area.length, 0) == INVALID
        with pytest.raises(InvalidRequestError, match="huge pages have no zero page"):
            uffd.zeropage(area.memory)


@zeropage
def test_zeropage_gives_way_to_everything() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(optional=Feature.WP_UNPOPULATED) as uffd:
        uffd.register(area.memory, mode=MISSING | WP)
        uffd.copy(area.page(0), area.pattern(0))
        there = [0]
        if Feature.WP_UNPOPULATED in uffd.features:
            uffd.writeprotect(area.page(1), PAGE)
            there.append(1)
        if Feature.POISON in uffd.available_features:
            uffd.poison(area.page(2), PAGE)
            there.append(2)
        for page in there:
            assert ask(uffd, Request.ZEROPAGE, area.page(page), PAGE, 0) == EXISTS
        with pytest.raises(PageExistsError):
            uffd.zeropage(area.start, PAGE)
        assert area.head(0) == area.pattern(0)[:32]


@zeropage
@pytest.mark.needs_linux("MADV_GUARD_INSTALL")
def test_zeropage_gives_way_to_a_guard() -> None:
    with registered() as (area, uffd):
        area.memory.madvise(Advice.GUARD_INSTALL, 0, PAGE)
        assert ask(uffd, Request.ZEROPAGE, area.start, PAGE, 0) == EXISTS


@zeropage
@pytest.mark.parametrize("kind", SMALL_KINDS[1:], ids=str)
def test_zeros_over_a_page_of_the_file(kind: MemoryKind) -> None:
    with registered(kind) as (area, uffd):
        fill_cache(area, 0, b"of the file")
        outcome = uffd.try_zeropage(area.start, PAGE)
        if kind is SHMEM:
            assert outcome == Outcome(0, errno.EEXIST)
            uffd.unregister(area.memory)
            assert area.head(0)[:11] == b"of the file"
        else:
            assert outcome == Outcome(PAGE, 0)
            assert area.head(0) == bytes(32)  # hidden
        assert in_file(area, 0)[:11] == b"of the file"


@zeropage
@pytest.mark.parametrize("mode", [MINOR, WP], ids=["MINOR", "WP"])
def test_zeros_whatever_is_trapped(mode: RegisterMode) -> None:
    with registered(SHMEM, mode=mode) as (area, uffd):
        assert uffd.zeropage(area.memory) == area.length


# --- 2.7: CONTINUE --------------------------------------------------------------------------------------------


@continue_
def test_the_arguments_and_targets_of_continue() -> None:
    common(Request.CONTINUE, SHMEM, MINOR)
    with registered() as (area, uffd):
        assert ask(uffd, Request.CONTINUE, area.start, PAGE, 0) == INVALID
        with pytest.raises(InvalidRequestError, match="anonymous memory has no page cache"):
            uffd.continue_(area.start, PAGE)


@continue_
@pytest.mark.parametrize("kind", CACHED_KINDS, ids=str)
def test_continue_maps_what_the_file_has(kind: MemoryKind) -> None:
    with registered(kind, 2, MINOR) as (area, uffd):
        fill_cache(area, 0, b"of the file")
        with Touch(area) as touch:
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert (event.kind, event.address) == (FaultKind.MINOR, area.start)
            fill_cache(area, 0, b"changed since")  # through another mapping, which traps nothing
            assert uffd.continue_(area.start, area.page_size) == area.page_size
            assert touch.result()[:13] == b"changed since"
        assert ask(uffd, Request.CONTINUE, area.start, area.page_size, 0) == EXISTS
        hole = ask(uffd, Request.CONTINUE, area.page(1), area.page_size, 0)
        assert hole == Answer(errno.EFAULT, -errno.EFAULT)
        with pytest.raises(BadAddressError, match="a hole"):
            uffd.continue_(area.page(1), area.page_size)
        # A later write reaches the file, or a private copy: without a message.
        area.memory.write(0, b"written")
        assert uffd.read_events() == []
        assert in_file(area, 0)[:7] == (b"written" if kind in SHARED_KINDS else b"changed")


@continue_
@pytest.mark.parametrize("kind", CACHED_KINDS, ids=str)
def test_continue_needs_no_minor_mode(kind: MemoryKind) -> None:
    with registered(kind, 1) as (area, uffd):
        fill_cache(area, 0, b"of the file")
        uffd.continue_(area.memory)
        assert area.head(0)[:11] == b"of the file"


@continue_
@pytest.mark.parametrize("kind", [SHMEM, MemoryKind.HUGETLB], ids=str)
def test_a_minor_fault_is_one_of_the_file_and_a_hole_is_missing_or_nothing(kind: MemoryKind) -> None:
    for mode in (MINOR, MINOR | MISSING):
        with registered(kind, 2, mode) as (area, uffd):
            fill_cache(area, 0, b"of the file")
            with Touch(area, 0):
                event = next_event(uffd)
                assert isinstance(event, PageFault)
                assert event.kind is FaultKind.MINOR
                uffd.continue_(area.start, area.page_size)
            with Touch(area, 1) as touch:
                if mode == MINOR:
                    assert touch.result() == bytes(32)
                    assert uffd.read_events() == []
                else:
                    event = next_event(uffd)
                    assert isinstance(event, PageFault)
                    assert event.kind is FaultKind.MISSING
                    uffd.copy(area.page(1), bytes(area.page_size))


@continue_
def test_a_page_that_is_allocated_but_not_written_is_in_the_file() -> None:
    with registered(SHMEM, mode=MINOR | MISSING) as (area, uffd):
        assert area.memory.fd is not None
        os.posix_fallocate(area.memory.fd, 0, PAGE)
        with Touch(area):
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.kind is FaultKind.MINOR
            uffd.continue_(area.start, PAGE)


@continue_
@pytest.mark.needs_feature("WP_UNPOPULATED")  # came with the mode
@pytest.mark.parametrize("kind", CACHED_KINDS, ids=str)
def test_continue_write_protected(kind: MemoryKind) -> None:
    with registered(kind, 1, MINOR) as (area, uffd):
        fill_cache(area, 0, b"of the file")
        assert ask(uffd, Request.CONTINUE, area.start, area.page_size, 2) == INVALID
        with pytest.raises(InvalidRequestError, match="not registered for WP"):
            uffd.continue_(area.memory, write_protect=True)
        uffd.register(area.memory, mode=MINOR | WP)
        uffd.continue_(area.memory, write_protect=True)
        assert protected(area.start)
        with Touch(area, data=b"written"):
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.kind is FaultKind.WRITE_PROTECT
            uffd.writeprotect(area.memory, protect=False)


@continue_
def test_continue_beyond_the_end_of_the_file() -> None:
    with registered(SHMEM, mode=MINOR) as (area, uffd):
        assert area.memory.fd is not None
        os.ftruncate(area.memory.fd, PAGE)
        answer = ask(uffd, Request.CONTINUE, area.page(1), PAGE, 0)
        assert answer in documented("CONTINUE beyond the end of the file")
        with pytest.raises((BadAddressError, InvalidRequestError)):
            uffd.continue_(area.page(1), PAGE)


@continue_
@pytest.mark.parametrize("kind", HUGE_KINDS, ids=str)
def test_huge_pages_are_continued_whole(kind: MemoryKind) -> None:
    with registered(kind, 1, MINOR) as (area, uffd):
        fill_cache(area, 0, b"of the file")
        for start, length in ((area.start, PAGE), (area.start + PAGE, HUGE - PAGE)):
            assert ask(uffd, Request.CONTINUE, start, length, 0) == INVALID


@continue_
def test_a_page_of_the_file_in_swap_is_a_minor_fault_and_continue_reads_it() -> None:
    with make_area(SHMEM) as area, Userfaultfd() as uffd:
        area.populate()
        swap_out(area)
        uffd.register(area.memory, mode=MINOR | MISSING)
        with Touch(area, 2) as touch:
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.kind is FaultKind.MINOR
            uffd.continue_(area.page(2), PAGE)
            assert touch.result() == area.pattern(2)[:32]


# --- 2.8: POISON ----------------------------------------------------------------------------------------------


@poison
def test_the_arguments_and_targets_of_poison() -> None:
    common(Request.POISON, ANONYMOUS, MISSING)
    with registered(MemoryKind.HUGETLB, 1) as (area, uffd):
        for start, length in ((area.start, PAGE), (area.start + PAGE, HUGE - PAGE)):
            assert ask(uffd, Request.POISON, start, length, 0) == INVALID


@poison
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_poison_fails_loudly_wherever_it_is_touched(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area:
        inside = area.page(1) + area.page_size - 100

        def touch() -> None:
            with Userfaultfd() as uffd:
                uffd.register(area.memory)
                uffd.poison(area.page(1), area.page_size)
                area.memory.read(inside - area.start, 1)

        info = signal_info(touch)
        assert info is not None
        assert (info.number, info.address) == (7, inside)  # SIGBUS
        # BUS_MCEERR_AR with the size of what is broken, or BUS_ADRERR without CONFIG_MEMORY_FAILURE
        assert (info.code, info.lsb) in ((4, area.page_size.bit_length() - 1), (2, 0))
        with Userfaultfd() as uffd:
            uffd.register(area.memory)
            uffd.poison(area.page(1), area.page_size)
            assert ask(uffd, Request.POISON, area.page(1), area.page_size, 0) == EXISTS
            assert poisoned(inside)
            if kind not in HUGE_KINDS:
                with pytest.raises(HardwareError) as refusal:
                    area.memory.madvise(Advice.POPULATE_READ, area.page_size, area.page_size)
                assert refusal.value.errno == EHWPOISON


@poison
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_forked_child_inherits_the_poison_of_private_memory(kind: MemoryKind) -> None:
    with registered(kind, 2) as (area, uffd):
        uffd.poison(area.memory)
        info = signal_info(area.head, 1)
        if kind in SHARED_KINDS:
            assert info is None  # its page tables are not copied, but filled from the file
        else:
            assert info is not None
            assert info.number == 7  # SIGBUS


@poison
def test_who_waits_is_woken_to_fail() -> None:
    def run() -> None:
        with registered() as (area, uffd):
            job = Job(area.head, 1)
            next_event(uffd)
            uffd.poison(area.page(1), PAGE)
            job.result()

    info = signal_info(run)
    assert info is not None
    assert info.number == 7


@poison
def test_poison_gives_way_to_everything() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(Feature.WP_UNPOPULATED) as uffd:
        uffd.register(area.memory, mode=MISSING | WP)
        uffd.copy(area.page(0), area.pattern(0))
        uffd.writeprotect(area.page(1), PAGE)
        for page in (0, 1):
            assert ask(uffd, Request.POISON, area.page(page), PAGE, 0) == EXISTS
        with pytest.raises(PageExistsError):
            uffd.poison(area.start, PAGE)
        assert area.head(0) == area.pattern(0)[:32]


@poison
@pytest.mark.needs_linux("MADV_GUARD_INSTALL")
def test_poison_gives_way_to_a_guard() -> None:
    with registered() as (area, uffd):
        area.memory.madvise(Advice.GUARD_INSTALL, 0, PAGE)
        assert ask(uffd, Request.POISON, area.start, PAGE, 0) == EXISTS


@poison
@pytest.mark.parametrize("kind", [SHMEM, PRIVATE_SHMEM], ids=str)
def test_poison_is_of_one_mapping_and_not_of_the_file(kind: MemoryKind) -> None:
    with registered(kind) as (area, uffd):
        fill_cache(area, 0, b"of the file")
        uffd.poison(area.start, PAGE)
        assert in_file(area, 0)[:11] == b"of the file"
        assert poisoned(area.start)


@poison
def test_poison_outlives_all_but_what_frees_the_page() -> None:
    with make_area(ANONYMOUS, 6) as area:
        with Userfaultfd() as uffd:
            uffd.register(area.memory)
            uffd.poison(area.memory)
            uffd.unregister(area.memory)
            assert poisoned(area.page(0))
            uffd.register(area.memory)
        assert poisoned(area.page(0))  # closed
        assert in_child(poisoned, area.page(0))
        area.memory.remap(to=Mapping.anonymous(area.length))
        assert poisoned(area.page(0))
        area.drop(0, 1)
        assert area.head(0) == bytes(32)
        with Userfaultfd() as uffd:
            uffd.register(area.memory)
            uffd.copy(area.page(1), area.pattern(1))
        assert area.head(1) == area.pattern(1)[:32]
        address = area.page(2)
        area.memory.unmap(2 * PAGE, PAGE)
        with Mapping.anonymous(PAGE, address=address) as fresh:
            assert fresh.read(0, 32) == bytes(32)
        assert poisoned(area.page(3))


@poison
@pytest.mark.parametrize("way", [OpenWay.ANY, OpenWay.USER_MODE_ONLY], ids=str)
def test_poison_is_no_message(way: OpenWay) -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd(way=way) as uffd:
        uffd.register(area.memory)
        uffd.poison(area.memory)
        assert poisoned(area.start)
        assert uffd.read_events() == []
