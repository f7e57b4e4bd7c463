"""`Userfaultfd`: opening, handshake, ranges, outcomes, reading. What the kernel does is in the other files here."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.kernel import PAGE, Area, Touch, available_features, make_area, next_event, waiters
from support.processes import run_python
from userfault.errors import ClosedError
from userfault.kernel import (
    Feature,
    Mapping,
    OpenWay,
    Outcome,
    PageFault,
    RegisterMode,
    Userfaultfd,
    _opening,
    abi,
)
from userfault.kernel.errors import (
    AgainError,
    FeatureError,
    InvalidRequestError,
    NotInitialisedError,
    NotRegisteredError,
    NotSupportedError,
    PageExistsError,
    UffdError,
    UffdPermissionError,
    UsageError,
)
from userfault.kernel.mapping import MemoryKind

UNKNOWN = Feature(1 << 40)  # of a kernel to come


@pytest.fixture
def area() -> Any:
    with make_area(MemoryKind.ANONYMOUS) as made:
        yield made


@pytest.fixture
def uffd() -> Any:
    with Userfaultfd() as opened:
        yield opened


# --- opening -------------------------------------------------------------------------------------------------------


def test_user_mode_only_is_open_to_everybody() -> None:
    with Userfaultfd(way=OpenWay.USER_MODE_ONLY) as uffd:
        assert uffd.user_mode_only is True
        assert uffd.initialised


@pytest.mark.needs_kernel_faults
def test_the_default_takes_the_best_way() -> None:
    with Userfaultfd() as uffd:
        assert uffd.user_mode_only is False


def _failing(number: int) -> Callable[[int], int]:
    def opener(flags: int) -> int:
        raise OSError(number, os.strerror(number))

    return opener


def _close_a_door(monkeypatch: pytest.MonkeyPatch, way: OpenWay, number: int) -> None:
    _, extra, path = _opening._OPENERS[way]
    monkeypatch.setitem(_opening._OPENERS, way, (_failing(number), extra, path))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENODEV, errno.EINVAL])
def test_any_error_of_a_way_leads_to_the_next(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    # Falling back on ENOENT alone is a known defect: in containers the device is there, and forbidden.
    _close_a_door(monkeypatch, OpenWay.DEVICE, number)
    _close_a_door(monkeypatch, OpenWay.SYSCALL, number)
    with Userfaultfd() as uffd:
        assert uffd.user_mode_only is True


def test_no_way_at_all_tells_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    _close_a_door(monkeypatch, OpenWay.DEVICE, errno.EACCES)
    _close_a_door(monkeypatch, OpenWay.SYSCALL, errno.EPERM)
    _close_a_door(monkeypatch, OpenWay.USER_MODE_ONLY, errno.EPERM)
    with pytest.raises(UffdPermissionError) as caught:
        Userfaultfd()
    message = str(caught.value)
    assert "/dev/userfaultfd: EACCES" in message
    assert message.count("EPERM") == 2
    assert "seccomp" in message
    assert "vm.unprivileged_userfaultfd" in message
    assert caught.value.errno == errno.EPERM


def test_a_chosen_way_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    _close_a_door(monkeypatch, OpenWay.DEVICE, errno.ENOENT)
    with pytest.raises(UffdError, match=r"/dev/userfaultfd: ENOENT.*6\.1"):
        Userfaultfd(way=OpenWay.DEVICE)
    with pytest.raises(ValueError, match="nowhere"):
        Userfaultfd(way="nowhere")  # type: ignore[arg-type]


@pytest.mark.parametrize("nonblocking", [True, False])
@pytest.mark.parametrize("cloexec", [True, False])
def test_flags_of_the_descriptor(nonblocking: bool, cloexec: bool) -> None:
    with Userfaultfd(nonblocking=nonblocking, cloexec=cloexec) as uffd:
        assert bool(fcntl.fcntl(uffd, fcntl.F_GETFL) & os.O_NONBLOCK) is nonblocking
        assert bool(fcntl.fcntl(uffd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC) is cloexec


# --- handshake -----------------------------------------------------------------------------------------------------


def test_required_features_are_on() -> None:
    with Userfaultfd(Feature.EVENT_REMOVE | Feature.THREAD_ID) as uffd:
        assert uffd.features == Feature.EVENT_REMOVE | Feature.THREAD_ID
        assert uffd.fdinfo().features == uffd.features
        assert uffd.available_features & uffd.features == uffd.features
        assert abi.Operation.REGISTER in uffd.available_operations


def test_a_missing_required_feature_is_named_and_leaves_the_descriptor_usable() -> None:
    with Userfaultfd(handshake=False) as uffd:
        with pytest.raises(FeatureError, match=r"bit 40 \(unknown to this library\)") as caught:
            uffd.handshake(UNKNOWN | Feature.THREAD_ID)
        assert caught.value.missing == UNKNOWN
        assert caught.value.available == available_features()
        assert isinstance(caught.value, NotImplementedError)
        assert not uffd.initialised
        assert uffd.handshake(Feature.THREAD_ID) == Feature.THREAD_ID


def test_a_feature_that_this_kernel_lacks_is_named_with_its_release() -> None:
    absent = [feature for feature in Feature if feature not in available_features()]
    if not absent:
        pytest.skip("this kernel has every feature")
    with pytest.raises(FeatureError) as caught:
        Userfaultfd(absent[0])
    assert f"{absent[0].name} (Linux {abi.FEATURE_SINCE[absent[0]]})" in str(caught.value)


def test_optional_features_are_taken_where_they_are() -> None:
    with Userfaultfd(Feature.THREAD_ID, optional=UNKNOWN | Feature.EVENT_UNMAP) as uffd:
        assert uffd.features == Feature.THREAD_ID | Feature.EVENT_UNMAP


@pytest.mark.needs_feature("WP_ASYNC")
def test_what_comes_along_is_told() -> None:
    with Userfaultfd(Feature.WP_ASYNC) as uffd:
        assert uffd.features == Feature.WP_ASYNC | Feature.WP_UNPOPULATED == uffd.fdinfo().features


@pytest.mark.needs_privilege("EVENT_FORK")
def test_fork_events_without_the_capability() -> None:
    # Dropped from the bounding set for a child of its own: the capability cannot be had back.
    run_python(
        """
        import ctypes, os
        from userfault.kernel import Feature, OpenWay, Userfaultfd
        from userfault.kernel.errors import UffdPermissionError

        device = os.open("/dev/userfaultfd", os.O_RDWR) if os.path.exists("/dev/userfaultfd") else None
        os.setresuid(65534, 65534, 65534)
        with Userfaultfd(Feature.THREAD_ID, optional=Feature.EVENT_FORK, way=OpenWay.USER_MODE_ONLY) as uffd:
            assert uffd.features == Feature.THREAD_ID, uffd.features
        try:
            Userfaultfd(Feature.EVENT_FORK, way=OpenWay.USER_MODE_ONLY)
        except UffdPermissionError as error:
            assert "CAP_SYS_PTRACE" in str(error), error
        else:
            raise AssertionError("EVENT_FORK without CAP_SYS_PTRACE")
        """
    ).check()


def test_rwp_async_without_rwp_is_refused_before_the_kernel_is_asked() -> None:
    with pytest.raises(UsageError, match="RWP_ASYNC without RWP"):
        Userfaultfd(Feature.RWP_ASYNC)


def test_a_second_handshake_is_refused(uffd: Userfaultfd) -> None:
    with pytest.raises(NotInitialisedError, match="once per descriptor"):
        uffd.handshake()


def _requests(uffd: Userfaultfd, place: int) -> list[Callable[[], object]]:
    return [
        lambda: uffd.register(place, PAGE),
        lambda: uffd.unregister(place, PAGE),
        lambda: uffd.copy(place, bytes(PAGE)),
        lambda: uffd.copy(place, place + PAGE, PAGE),
        lambda: uffd.try_copy(place, bytes(PAGE)),
        lambda: uffd.zeropage(place, PAGE),
        lambda: uffd.try_zeropage(place, PAGE),
        lambda: uffd.move(place, place + PAGE, PAGE),
        lambda: uffd.try_move(place, place + PAGE, PAGE),
        lambda: uffd.continue_(place, PAGE),
        lambda: uffd.try_continue(place, PAGE),
        lambda: uffd.poison(place, PAGE),
        lambda: uffd.try_poison(place, PAGE),
        lambda: uffd.writeprotect(place, PAGE),
        lambda: uffd.rwprotect(place, PAGE),
        lambda: uffd.wake(place, PAGE),
        lambda: uffd.set_mode(),
        lambda: uffd.read_events(),
        lambda: uffd.poll(timeout_s=0),
        lambda: uffd.drain(),
    ]


def test_everything_is_refused_before_the_handshake(area: Area) -> None:
    with Userfaultfd(handshake=False) as uffd:
        assert not uffd.fdinfo().initialised
        for request in _requests(uffd, area.start):
            with pytest.raises(NotInitialisedError, match="call handshake"):
                request()


def test_everything_is_refused_after_close(area: Area) -> None:
    uffd = Userfaultfd()
    uffd.close()
    uffd.close()
    assert uffd.closed
    assert "closed" in repr(uffd)
    for request in [*_requests(uffd, area.start), uffd.fdinfo, uffd.fileno, uffd.handshake, lambda: uffd.fd]:
        with pytest.raises((ClosedError, NotInitialisedError), match=r"closed|handshake"):
            request()
    with pytest.raises(ClosedError):
        uffd.read_events()


# --- from_fd -------------------------------------------------------------------------------------------------------


def test_from_fd_learns_what_was_negotiated(area: Area) -> None:
    with Userfaultfd(Feature.THREAD_ID) as uffd:
        with Userfaultfd.from_fd(os.dup(uffd.fd)) as copy:
            assert copy.features == Feature.THREAD_ID
            assert copy.initialised
            assert copy.user_mode_only is None
            copy.register(area.memory)
            assert copy.copy(area.start, bytes(PAGE)) == PAGE
        assert not uffd.closed
        with pytest.raises(PageExistsError):
            uffd.copy(area.start, bytes(PAGE))


def test_from_fd_before_the_handshake() -> None:
    with Userfaultfd(handshake=False) as uffd, Userfaultfd.from_fd(os.dup(uffd.fd)) as copy:
        assert not copy.initialised
        copy.handshake(Feature.THREAD_ID)
        assert uffd.fdinfo().features == Feature.THREAD_ID


def test_from_fd_refuses_other_files_and_leaves_them_open() -> None:
    receiver, sender = os.pipe()
    try:
        with pytest.raises(UsageError, match=f"descriptor {receiver} is no userfaultfd"):
            Userfaultfd.from_fd(receiver)
        os.fstat(receiver)
    finally:
        os.close(receiver)
        os.close(sender)
    with pytest.raises(UsageError, match="is not open"):
        Userfaultfd.from_fd(receiver)


def test_from_fd_knows_a_blocking_descriptor() -> None:
    with (
        Userfaultfd(nonblocking=False) as uffd,
        Userfaultfd.from_fd(os.dup(uffd.fd)) as copy,
        pytest.raises(UsageError, match="nonblocking=True"),
    ):
        copy.poll(timeout_s=0)


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "length", "message"),
    [
        (1, PAGE, "0x1 is not a multiple of the page size"),
        (PAGE * 16 + 7, PAGE, "begins 7 bytes into the page"),
        (PAGE * 16, 0, "length 0 is not positive"),
        (PAGE * 16, -PAGE, "is not positive"),
        (PAGE * 16, PAGE + 1, f"length {PAGE + 1} is not a multiple"),
        (PAGE * 16, None, "needs a length"),
        (-PAGE, PAGE, "outside of the address space"),
        (2**64 - PAGE, 2 * PAGE, "outside of the address space"),
        (2**70, PAGE, "outside of the address space"),
    ],
)
def test_impossible_ranges_are_refused_naming_the_value(
    uffd: Userfaultfd, start: int, length: int | None, message: str
) -> None:
    for request in (
        uffd.register, uffd.unregister, uffd.wake, uffd.zeropage, uffd.continue_, uffd.poison,
        uffd.try_poison, uffd.writeprotect, uffd.rwprotect,
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            request(start, length)


def test_copy_refuses_impossible_ranges_on_every_path(uffd: Userfaultfd, area: Area) -> None:
    # Whole and valid addresses take a shorter way: the others must not slip through it.
    uffd.register(area.memory)
    source = area.start + PAGE
    for dst, src, length, message in (
        (area.start + 1, source, PAGE, "target.*not a multiple"),
        (area.start, source, 0, "source: length 0"),
        (area.start, source, PAGE - 1, "not a positive multiple"),
        (area.start, -5, PAGE, "source.*outside"),
        (area.start, 2**64 - PAGE, 2 * PAGE, "outside"),
        (-PAGE, source, PAGE, "outside"),
        (area.start, bytes(PAGE), 2 * PAGE, f"more than the {PAGE} bytes"),
        (area.start, bytes(PAGE - 1), None, "pad the last page"),
        (area.start, source, None, "needs a length"),
        (area.memory, bytes(PAGE), None, f"source: length {4 * PAGE} is more"),
        (area.start, object(), None, "object is no range"),
        (object(), bytes(PAGE), None, "object is no range"),
        (area.start, memoryview(bytearray(4 * PAGE))[::2], None, "not contiguous"),
    ):
        for copy in (uffd.copy, uffd.try_copy):
            with pytest.raises(UsageError, match=message):
                copy(dst, src, length)


def test_addresses_beyond_the_kernels_limit_are_the_kernels_to_refuse(uffd: Userfaultfd) -> None:
    with pytest.raises(InvalidRequestError):
        uffd.copy(2**63, bytes(PAGE))
    with pytest.raises(InvalidRequestError):
        uffd.register(2**63, PAGE)


def test_ranges_may_be_objects(uffd: Userfaultfd, area: Area) -> None:
    whole = uffd.register(area.memory)
    assert (whole.start, whole.length, whole.end) == (area.start, area.length, area.start + area.length)
    with mmap.mmap(-1, 2 * PAGE) as memory:
        part = uffd.register(memory, PAGE)
        assert part.length == PAGE
        uffd.copy(memory, bytes(PAGE), PAGE)
        uffd.unregister(memory)
    closed = Mapping.anonymous(PAGE)
    closed.close()
    with pytest.raises(ClosedError):
        uffd.register(closed)


@pytest.mark.parametrize(
    "source",
    [
        b"\x07" * PAGE,
        bytearray(b"\x07" * PAGE),
        memoryview(b"\x07" * (PAGE + 3))[3:],
        np.full(PAGE, 7, np.uint8),
        np.full((PAGE // 8, 8), 7, np.uint8, order="F"),
    ],
    ids=["bytes", "bytearray", "unaligned view", "array", "Fortran array"],
)
def test_any_bytes_may_be_copied(uffd: Userfaultfd, area: Area, source: Any) -> None:
    uffd.register(area.memory)
    assert uffd.copy(area.start, source) == PAGE
    assert area.head(0) == b"\x07" * 32


def test_a_mapping_may_be_copied_and_its_address(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    with Mapping.anonymous(area.length) as source:
        source.write(0, b"one")
        source.write(PAGE, b"two")
        assert uffd.copy(area.page(0), source, PAGE) == PAGE
        assert uffd.copy(area.page(1), source.address + PAGE, PAGE) == PAGE
    assert (area.head(0, 3), area.head(1, 3)) == (b"one", b"two")


def test_an_address_that_numpy_calculated_is_an_address(uffd: Userfaultfd, area: Area) -> None:
    pages = np.arange(4, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(area.start)
    assert uffd.register(pages[0], area.length).start == area.start
    assert uffd.copy(pages[2], b"n" * PAGE) == PAGE
    assert uffd.copy(pages[1], pages[2], PAGE) == PAGE
    assert area.head(1) == b"n" * 32
    with pytest.raises(UsageError, match="needs a length"):
        uffd.wake(pages[0])


def test_a_buffer_cannot_be_resized_while_it_is_copied(area: Area) -> None:
    # The copy waits in its own source, a missing page: meanwhile the object must stay what it is.
    with Userfaultfd() as uffd, make_area(MemoryKind.ANONYMOUS) as other:
        if uffd.user_mode_only:
            pytest.skip("needs kernel-mode page faults")
        uffd.register(area.memory)
        uffd.register(other.memory)
        view = other.memory.view()
        thread = threading.Thread(target=uffd.copy, args=(area.start, view, PAGE))
        thread.start()
        waiters(uffd, 1)
        with pytest.raises(BufferError):
            other.memory.close()
        uffd.copy(other.start, b"s" * PAGE)
        thread.join()
        view.release()
        assert area.head(0) == b"s" * 32


# --- register ------------------------------------------------------------------------------------------------------


def test_a_registration_tells_what_it_is(uffd: Userfaultfd, area: Area) -> None:
    registration = uffd.register(area.memory, mode=RegisterMode.MISSING)
    assert registration.mode == RegisterMode.MISSING
    assert abi.Operation.COPY | abi.Operation.ZEROPAGE | abi.Operation.WAKE in registration.operations


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (RegisterMode(0), "traps nothing"),
        (RegisterMode.WP | RegisterMode.RWP, "exclude each other"),
        (RegisterMode.RWP, "needs the feature"),
    ],
)
def test_impossible_modes_are_refused(
    uffd: Userfaultfd, area: Area, mode: RegisterMode, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        uffd.register(area.memory, mode=mode)


def test_a_mode_of_a_kernel_to_come_is_the_kernels_to_refuse(uffd: Userfaultfd, area: Area) -> None:
    with pytest.raises(InvalidRequestError):
        uffd.register(area.memory, mode=RegisterMode.MISSING | RegisterMode(1 << 20))


def test_unregister_wakes_whoever_waits(area: Area) -> None:
    # The kernel itself wakes only where MISSING is registered.
    with Userfaultfd(optional=Feature.WP_UNPOPULATED) as uffd:
        area.populate()
        uffd.register(area.memory, mode=RegisterMode.WP)
        uffd.writeprotect(area.memory)
        with Touch(area, data=b"written") as touch:
            waiters(uffd, 1)
            assert not touch.done
            uffd.unregister(area.memory)
            touch.result()
        assert area.head(0, 7) == b"written"


# --- outcomes ------------------------------------------------------------------------------------------------------


def test_partial_progress_is_kept(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    uffd.zeropage(area.page(2), PAGE)
    assert uffd.try_copy(area.start, b"x" * area.length) == Outcome(2 * PAGE, errno.EAGAIN)
    assert uffd.try_copy(area.page(2), b"x" * 2 * PAGE) == Outcome(0, errno.EEXIST)
    assert uffd.try_zeropage(area.page(3), PAGE) == Outcome(PAGE, 0)
    assert uffd.try_zeropage(area.page(3), PAGE).complete is False


def test_the_exception_carries_the_progress(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    uffd.zeropage(area.page(2), PAGE)
    with pytest.raises(AgainError, match=f"EAGAIN.*after {2 * PAGE} bytes") as caught:
        uffd.copy(area.start, b"x" * area.length)
    assert caught.value.done == 2 * PAGE
    assert caught.value.errno == errno.EAGAIN
    assert (caught.value.call, caught.value.address) == ("UFFDIO_COPY", area.start)
    assert caught.value.length == area.length
    assert isinstance(caught.value, BlockingIOError)


def test_so_it_does_on_the_short_way(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    uffd.zeropage(area.page(2), PAGE)
    with Mapping.anonymous(area.length) as source:
        with pytest.raises(AgainError) as partial:
            uffd.copy(area.start, source.address, area.length)
        assert partial.value.done == 2 * PAGE
        with pytest.raises(PageExistsError) as exists:
            uffd.copy(area.start, source.address, area.length)
        assert exists.value.done == 0


def test_each_fill_says_what_it_did(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    assert uffd.copy(area.start, bytes(PAGE)) == PAGE
    assert uffd.zeropage(area.page(1), 3 * PAGE) == 3 * PAGE
    with pytest.raises(PageExistsError):
        uffd.zeropage(area.page(1), PAGE)
    with pytest.raises(InvalidRequestError, match="anonymous memory has no page cache"):
        uffd.continue_(area.page(1), PAGE)
    assert uffd.try_continue(area.page(1), PAGE) == Outcome(0, errno.EINVAL)


@pytest.mark.needs_feature("MOVE")
def test_move_and_poison(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    with Mapping.anonymous(area.length) as stash:
        stash.write(PAGE, b"moved")
        assert uffd.move(area.page(1), stash.address + PAGE, PAGE) == PAGE
        assert uffd.try_move(area.page(0), stash, PAGE) == Outcome(0, errno.ENOENT)
        with pytest.raises(NotRegisteredError, match="allow_holes"):
            uffd.move(area.page(0), stash, PAGE)
        assert uffd.move(area.page(0), stash, PAGE, allow_holes=True) == PAGE
    assert uffd.poison(area.page(2), 2 * PAGE) == 2 * PAGE
    assert uffd.try_poison(area.page(2), PAGE) == Outcome(0, errno.EEXIST)
    assert uffd.copy(area.page(2), b"c" * PAGE) == PAGE
    assert area.head(1, 5) == b"moved"
    assert area.head(2, 5) == b"ccccc"


def test_wake_false_leaves_them_waiting(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    with Touch(area) as touch:
        waiters(uffd, 1)
        uffd.copy(area.start, b"w" * PAGE, wake=False)
        assert uffd.fdinfo().total == 1
        uffd.wake(area.start, PAGE)
        assert touch.result() == b"w" * 32


# --- set_mode ------------------------------------------------------------------------------------------------------


def test_set_mode_refuses_what_cannot_be(uffd: Userfaultfd) -> None:
    with pytest.raises(UsageError, match="only RWP_ASYNC"):
        uffd.set_mode(enable=Feature.MOVE)
    with pytest.raises(UsageError, match="on and off"):
        uffd.set_mode(enable=Feature.RWP_ASYNC, disable=Feature.RWP_ASYNC)
    with pytest.raises(UsageError, match="needs the feature RWP"):
        uffd.set_mode(enable=Feature.RWP_ASYNC)


def test_set_mode_on_an_older_kernel_says_so(uffd: Userfaultfd) -> None:
    if abi.Feature.RWP in available_features():
        uffd.set_mode()
        uffd.set_mode(disable=Feature.RWP_ASYNC)
    else:
        with pytest.raises(NotSupportedError, match=r"Linux 7\.3"):
            uffd.set_mode()


# --- reading -------------------------------------------------------------------------------------------------------


def test_reading_with_nothing_there(uffd: Userfaultfd) -> None:
    assert uffd.read_events() == []
    assert uffd.read_events(timeout_s=0.001) == []
    assert uffd.poll(timeout_s=0) is False
    assert uffd.poll(timeout_s=0.001) is False
    with pytest.raises(UsageError, match="max_events"):
        uffd.read_events(0)


def test_faults_come_as_page_faults(area: Area) -> None:
    with Userfaultfd(Feature.THREAD_ID) as uffd:
        uffd.register(area.memory)
        with Touch(area, 1) as reader, Touch(area, 2, data=b"w") as writer:
            waiters(uffd, 2)
            assert uffd.poll() is True
            found = uffd.read_events()
            assert len(found) == 2
            faults = {event.address: event for event in found if isinstance(event, PageFault)}
            assert faults[area.page(1)].kind == "missing"
            assert faults[area.page(1)].write is False
            assert faults[area.page(2)].write is True
            assert faults[area.page(1)].thread_id != faults[area.page(2)].thread_id
            assert all(fault.thread_id > 0 for fault in faults.values())
            uffd.zeropage(area.memory)
            assert reader.result() == bytes(32)
            writer.result()


def test_reading_in_batches(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    touches = [Touch(area, index) for index in range(4)]
    waiters(uffd, 4)
    found = uffd.read_events(3)
    assert len(found) == 3
    found += uffd.read_events(3)
    assert {event.address for event in found if isinstance(event, PageFault)} == {
        area.page(index) for index in range(4)
    }
    uffd.zeropage(area.memory)
    for touch in touches:
        touch.result()


def test_a_blocking_descriptor(area: Area) -> None:
    with Userfaultfd(nonblocking=False) as uffd:
        uffd.register(area.memory)
        with pytest.raises(UsageError, match="deadline"):
            uffd.read_events(timeout_s=1)
        with pytest.raises(UsageError, match="poll"):
            uffd.poll(timeout_s=0)
        with Touch(area) as touch:
            (fault,) = uffd.read_events(timeout_s=None)
            assert isinstance(fault, PageFault)
            uffd.copy(fault.address, b"b" * PAGE)
            assert touch.result() == b"b" * 32


@pytest.mark.needs_linux("RWF_NOWAIT")
def test_a_blocking_descriptor_is_read_without_waiting(area: Area) -> None:
    with Userfaultfd(nonblocking=False) as uffd:
        uffd.register(area.memory)
        assert uffd.read_events() == []
        with Touch(area, 1):
            waiters(uffd, 1)
            assert len(uffd.read_events()) == 1
            uffd.zeropage(area.page(1), PAGE)


def test_drained_events_come_first(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    with Touch(area, 0), Touch(area, 1):
        waiters(uffd, 2)
        assert uffd.drain() == 2
        assert uffd.backlog == 2
        assert uffd.drain() == 2  # nothing is lost, nothing comes twice
        assert uffd.poll() is True
        assert len(uffd.read_events(1)) == 1
        assert uffd.backlog == 1
        assert len(uffd.read_events()) == 1
        assert uffd.poll(timeout_s=0) is False
        uffd.zeropage(area.page(0), 2 * PAGE)


def test_two_readers_get_each_message_once(uffd: Userfaultfd) -> None:
    pages, found, stop = 64, [], threading.Event()
    with make_area(MemoryKind.ANONYMOUS, pages) as area:
        uffd.register(area.memory)

        def read() -> None:
            while not stop.is_set():
                for event in uffd.read_events(timeout_s=0.02):
                    assert isinstance(event, PageFault)
                    found.append(event.address)
                    uffd.zeropage(event.address, PAGE)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for thread in readers:
            thread.start()
        for index in range(pages):
            with Touch(area, index):
                pass
        stop.set()
        for thread in readers:
            thread.join()
        assert sorted(found) == [area.page(index) for index in range(pages)]


def test_next_event_of_the_helper_waits(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.memory)
    with Touch(area, 3):
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.address == area.page(3)
        uffd.zeropage(event.address, PAGE)


def test_an_object_that_is_forgotten_closes_its_descriptor() -> None:
    uffd = Userfaultfd()
    fd = uffd.fd
    del uffd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
