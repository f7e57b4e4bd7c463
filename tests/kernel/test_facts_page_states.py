"""What surprises handlers of memory that is pinned, merged, charged, swapped or huge (docs/kernel-api.md, 5.7 to 5.14).

Unchecked: 7 for a polling thread of io_uring (its stall cannot be told from slowness), 8 for devices, 11 for the count
of reservations (all processes share it), 14 where the kernel is built without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.kernel import (
    HUGE,
    HUGE_KINDS,
    PAGE,
    Area,
    Link,
    Touch,
    available_features,
    in_child,
    make_area,
    next_event,
    protected,
    subject,
)
from support.kernel_facts import (
    Answer,
    Job,
    ask,
    entry,
    kernel_call,
    mapped_huge,
    registered,
    swap_out,
)
from support.kernel_releases import documented
from support.kernel_scenarios import huge_area
from support.machine import KSM, merging
from support.ring import ASYNC, READ_FIXED, RECEIVE, Ring, needs_io_uring
from support.waiting import wait_until
from userfault.kernel import (
    Feature,
    Outcome,
    PageFault,
    RegisterMode,
    Userfaultfd,
    pagemap,
    serving,
)
from userfault.kernel.abi import FaultFlag, PageCategory, PagemapBit, Request
from userfault.kernel.errors import (
    NoMemoryError,
    PageExistsError,
    RangeBusyError,
)
from userfault.kernel.mapping import Advice, Mapping, MemoryKind

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR


def point(number: int) -> pytest.MarkDecorator:
    return pytest.mark.fact(f"5.{number}")


# --- 7 and 8: io_uring and pins -------------------------------------------------------------------------------


@point(7)
@pytest.mark.needs_kernel_faults
@pytest.mark.parametrize("flags", [0, ASYNC], ids=["inline", "worker"])
def test_a_request_of_io_uring_waits_in_the_call_or_in_a_worker(flags: int) -> None:
    needs_io_uring()

    def run() -> tuple[bool, str, int]:
        with registered(features=Feature.THREAD_ID) as (area, uffd), Ring() as ring:
            receiver, sender = socket.socketpair()  # tried at once by all releases; pipes are not
            sender.send(b"x")
            job = Job(lambda: ring.submit(RECEIVE, receiver.fileno(), area.start, 1, flags=flags))
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            name = Path(f"/proc/self/task/{event.thread_id}/comm").read_text()
            own = event.thread_id == job.thread_id
            uffd.zeropage(area.start, PAGE)
            return own, name[:4], job.result()

    own, name, result = in_child(run)
    assert result == 1
    assert (own, name == "iou-") == (flags == 0, flags == ASYNC)


@point(7)
@pytest.mark.needs_kernel_faults
def test_registering_buffers_touches_all_pages_as_writes() -> None:
    needs_io_uring()

    def run() -> tuple[int, list[int]]:
        found = []
        with registered(pages=3) as (area, uffd), Ring() as ring:
            job = Job(ring.register, area.start, area.length)
            while not job.done:
                for event in uffd.read_events(timeout_s=0.01):
                    assert isinstance(event, PageFault)
                    assert event.flags == FaultFlag.WRITE
                    found.append((event.address - area.start) // PAGE)
                    uffd.zeropage(event.address, PAGE)
            try:
                job.result()
            except OSError as refusal:
                return refusal.errno or 0, found
        return 0, found

    assert in_child(run) in documented("registering missing pages with io_uring")


def _file_with(data: bytes) -> Mapping:
    file = Mapping.memfd(PAGE)
    file.write(0, data)
    return file


@point(7)
@pytest.mark.needs_feature("MOVE")
def test_pinned_pages_do_not_move() -> None:
    needs_io_uring()

    def run() -> tuple[Answer, Answer]:
        with registered() as (area, uffd), make_area(ANONYMOUS) as stash, Ring() as ring:
            stash.populate()
            ring.register(stash.start, PAGE)
            pinned = ask(uffd, Request.MOVE, area.start, stash.start, PAGE, 0)
            with pytest.raises(RangeBusyError, match="pinned"):
                uffd.move(area.start, stash.start, PAGE)
            ring.unregister()
            # The pin is dropped by a worker of the kernel's.
            wait_until(
                lambda: uffd.try_move(area.start, stash.start, PAGE).errno == 0, "the page is unpinned"
            )
            return pinned, ask(uffd, Request.MOVE, area.page(1), stash.page(1), PAGE, 0)

    assert in_child(run) == (Answer(errno.EBUSY, -errno.EBUSY), Answer(0, PAGE))


@point(7)
@pytest.mark.needs_feature("WP_ASYNC")
@pytest.mark.needs_linux("PAGEMAP_SCAN")
def test_writes_through_a_pin_are_not_tracked() -> None:
    needs_io_uring()

    def run() -> tuple[int, int, bytes]:
        with make_area(ANONYMOUS) as area, Userfaultfd(Feature.WP_ASYNC) as uffd, Ring() as ring:
            area.populate()
            uffd.register(area.memory, mode=WP)
            ring.register(area.start, PAGE)
            uffd.writeprotect(area.memory)
            with _file_with(b"past the tracking") as file:
                assert file.fd is not None
                done = ring.submit(READ_FIXED, file.fd, area.start, 17)
            written = pagemap.scan(area.memory, mask=PageCategory.WRITTEN).pages
            return done, written, area.head(0, 17)

    assert in_child(run) == (17, 0, b"past the tracking")


@point(8)
def test_a_page_that_is_dropped_while_pinned_is_another_one_afterwards() -> None:
    needs_io_uring()

    def run() -> tuple[int, bytes]:
        with make_area(ANONYMOUS) as area, Ring() as ring:
            area.populate()
            ring.register(area.start, PAGE)
            area.drop(0, 1)
            with _file_with(b"to the old page") as file:
                assert file.fd is not None
                return ring.submit(READ_FIXED, file.fd, area.start, 15), area.head(0)

    assert in_child(run) == (15, bytes(32))


# --- 9: KSM ---------------------------------------------------------------------------------------------------


def merged(area: Area) -> bool:
    """Whether two pages of an area are one: only root sees their frames."""
    frames = [int(number) & ((1 << 55) - 1) for number in pagemap.entries(area.start, 2 * PAGE)]
    return frames[0] == frames[1]


@contextlib.contextmanager
def same_on_both_pages() -> Iterator[Area]:
    with make_area(ANONYMOUS, 2) as area:
        same = os.urandom(PAGE)  # like no other page of the machine
        for page in (0, 1):
            area.memory.write(page * PAGE, same)
        yield area
        area.memory.madvise(Advice.UNMERGEABLE)


@point(9)
def test_merged_pages_lose_their_protection_count_as_written_and_do_not_move() -> None:
    features = available_features()
    with (
        merging(),
        same_on_both_pages() as area,
        same_on_both_pages() as tracked,
        same_on_both_pages() as stash,
        registered() as (target, mover),
        Userfaultfd() as uffd,
        Userfaultfd(features & Feature.WP_ASYNC) as tracker,
    ):
        uffd.register(area.memory, mode=WP)
        uffd.writeprotect(area.memory)
        tracker.register(tracked.memory, mode=WP)
        tracker.writeprotect(tracked.memory)
        areas = (area, tracked, stash)
        for found in areas:  # all at once: the kernel takes its time
            found.memory.madvise(Advice.MERGEABLE)

        def all_merged() -> bool:
            (KSM / "run").write_text("1")  # in case that another run of this test has just ended
            return all(merged(found) for found in areas)

        wait_until(all_merged, "the pages are merged")
        marks = [protected(area.page(page)) for page in (0, 1)]
        assert marks != [True, True]
        area.memory.write(marks.index(False) * PAGE, b"nobody is told")
        assert uffd.read_events() == []
        if Feature.WP_ASYNC in features:
            assert pagemap.scan(tracked.memory, mask=PageCategory.WRITTEN).pages > 0
        if Feature.MOVE in features:
            busy = Answer(errno.EBUSY, -errno.EBUSY)
            assert ask(mover, Request.MOVE, target.start, stash.start, PAGE, 0) == busy


# --- 10: control groups ---------------------------------------------------------------------------------------


def _make_group(root: Path, limits: str, limit: int) -> Path | None:
    """Make a control group with a limit, or say that it cannot be made."""
    group = root / f"userfault-test-{os.getpid()}"
    try:
        if limits == "memory.max":
            (root / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError:
        return None
    try:
        (group / limits).write_text(str(limit))
    except OSError:
        group.rmdir()
        return None
    with contextlib.suppress(OSError):  # no way out into swap
        (group / "memory.swap.max").write_text("0")
    return group


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group that may use so many bytes; skip where none can be made."""
    first = _make_group(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", limit)
    group = first or _make_group(Path("/sys/fs/cgroup"), "memory.max", limit)
    if group is None:
        pytest.skip("needs to make a memory control group")

    def removed() -> bool:
        with contextlib.suppress(OSError):
            group.rmdir()
        return not group.exists()

    try:
        yield group
    finally:
        wait_until(removed, "the control group is empty")


@point(10)
def test_copies_are_charged_to_the_target_which_dies_of_them() -> None:
    size = 32 << 20

    def run(link: Link) -> None:
        link.receive()  # in its group now
        with Mapping.anonymous(size) as memory, Userfaultfd() as uffd:
            uffd.register(memory)
            link.send(memory.address, (uffd.fd,))
            link.receive()

    with memory_group(8 << 20) as group, subject(run) as child:
        (group / "cgroup.procs").write_text(str(child.pid))
        child.send("go")
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd, Mapping.anonymous(PAGE) as source:
            outcomes = set()
            for offset in range(0, size, PAGE):
                outcome = uffd.try_copy(start + offset, source.address, PAGE)
                outcomes.add(outcome)
                if outcome.errno == errno.ESRCH:
                    break
            # Memory was short first, or the target gone at once.
            assert outcomes - {Outcome(0, errno.ENOMEM)} == {Outcome(PAGE, 0), Outcome(0, errno.ESRCH)}
            assert child.wait() == -signal.SIGKILL


# --- 11: huge pages -------------------------------------------------------------------------------------------


@point(11)
def test_an_empty_pool_of_huge_pages_says_that_the_page_exists() -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists():
        pytest.skip("needs 2 MiB huge pages")
    with contextlib.ExitStack() as stack:
        if taken := int(free.read_text()):
            stack.enter_context(Mapping.anonymous(taken * HUGE, huge_page_size=HUGE, populate=True))
        memory = stack.enter_context(Mapping.anonymous(HUGE, huge_page_size=HUGE, noreserve=True))
        uffd = stack.enter_context(Userfaultfd())
        uffd.register(memory)
        source = stack.enter_context(Mapping.anonymous(HUGE))
        answer = ask(uffd, Request.COPY, memory.address, source.address, HUGE, 0)
        assert answer in documented("COPY to huge pages from an empty pool")
        assert PagemapBit.PRESENT not in entry(memory.address)
        with pytest.raises(
            (PageExistsError, NoMemoryError), match=r"first look whether it really is|out of memory"
        ):
            uffd.copy(memory, source.address)
        # Who would wake and go on, as for small pages, would go on for ever.
        with pytest.raises(NoMemoryError):
            serving.copy_all(uffd, memory, source.address, page_size=HUGE, deadline_s=0)


@point(11)
@pytest.mark.parametrize("kind", HUGE_KINDS, ids=str)
def test_faults_of_huge_pages_are_told_by_their_beginning(kind: MemoryKind) -> None:
    with registered(kind, 2) as (area, uffd), Touch(area, 1, offset=HUGE - 64):
        assert next_event(uffd) == PageFault(area.page(1), FaultFlag(0), 0)
        uffd.copy(area.page(1), bytes(HUGE))


@point(11)
def test_dropping_huge_pages_spares_the_one_that_is_cut() -> None:
    with make_area(MemoryKind.PRIVATE_HUGETLB, 2) as area:
        area.populate()
        assert kernel_call("madvise", area.start, HUGE + PAGE, int(Advice.DONTNEED)) == 0
        assert PagemapBit.PRESENT not in entry(area.page(0))
        assert area.head(1) == area.pattern(1)[:32]


# --- 12: transparent huge pages -------------------------------------------------------------------------------


@point(12)
def test_what_is_registered_gets_no_huge_page_by_itself() -> None:
    with huge_area(1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory)
        with Touch(area, 3):
            next_event(uffd)
            uffd.zeropage(area.page(3), PAGE)
        present = pagemap.present(area.memory)
        assert [page for page in range(area.pages) if present[page]] == [3]


@point(12)
def test_a_collapse_before_registration_leaves_nothing_missing() -> None:
    with huge_area(1) as area, Userfaultfd() as uffd:
        area.memory.write(0, b"one page")
        area.memory.madvise(Advice.COLLAPSE)
        uffd.register(area.memory)
        assert area.head(100) == bytes(32)  # no fault: it was there
        assert uffd.read_events() == []


def collapse(area: Area) -> int:
    """Have a transparent huge page made of an area; return the error number."""
    return kernel_call("madvise", area.start, area.length, int(Advice.COLLAPSE))


@point(12)
def test_what_is_registered_collapses_only_when_it_is_full_and_unprotected() -> None:
    with huge_area(1) as area, Userfaultfd() as uffd:
        uffd.register(area.memory, mode=MISSING | WP)
        source = bytes(area.length)
        uffd.copy(area.page(1), source[PAGE:])
        assert collapse(area) in documented("MADV_COLLAPSE of registered memory with a hole")
        uffd.copy(area.start, source[:PAGE], write_protect=True)
        assert collapse(area) == errno.EINVAL  # a page that is protected
        uffd.writeprotect(area.memory, protect=False)
        assert not mapped_huge(area.start)  # copies are small pages
        area.memory.write(
            0, b"written"
        )  # one at least must be, and taking protection away makes none writable
        assert collapse(area) == 0
        assert mapped_huge(area.start)


# --- 13 and 14: swap, soft-dirty ------------------------------------------------------------------------------


@point(13)
def test_what_is_in_swap_is_not_missing() -> None:
    with registered() as (area, uffd):
        for page in range(area.pages):
            uffd.copy(area.page(page), area.pattern(page))
        swap_out(area)
        assert [area.head(page) for page in range(4)] == [area.pattern(page)[:32] for page in range(4)]
        assert uffd.read_events() == []


@point(14)
@pytest.mark.needs_feature("MOVE")
def test_pages_that_moved_are_soft_dirty() -> None:
    def run() -> tuple[bool, bool, bool]:
        with registered() as (area, uffd), make_area(ANONYMOUS) as stash:
            stash.populate()
            dirty = PagemapBit.SOFT_DIRTY in entry(stash.start)
            Path("/proc/self/clear_refs").write_text("4")
            clean = PagemapBit.SOFT_DIRTY not in entry(stash.start)
            uffd.move(area.start, stash.start, PAGE)
            return dirty, clean, PagemapBit.SOFT_DIRTY in entry(area.start)

    dirty, clean, moved = in_child(run)
    if not dirty:
        pytest.skip("needs CONFIG_MEM_SOFT_DIRTY")
    assert (clean, moved) == (True, True)
