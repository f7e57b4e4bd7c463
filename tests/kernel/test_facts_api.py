"""The handshake (docs/kernel-api.md, 2.1 and 3).

Unchecked: what other architectures do not offer; a failing copy of the answer cannot be told from a failing copy of
the question where both lie on one page, so it is tried with a page that can only be read.
"""

from __future__ import annotations

import ctypes
import errno
import platform

import pytest

from support.kernel import (
    PAGE,
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
    Job,
    ask,
    ask_at,
    drop_privileges,
    entry,
    filling,
    kernel_call,
    ordinary_file,
    registered,
)
from support.kernel_releases import release
from userfault.kernel import Feature, Fork, OpenWay, PageFault, RegisterMode, Remove, Unmap, Userfaultfd, abi
from userfault.kernel.abi import Operation, PagemapBit, Request
from userfault.kernel.errors import (
    FeatureError,
    InvalidRequestError,
    NotInitialisedError,
    UffdPermissionError,
    UsageError,
)
from userfault.kernel.mapping import Mapping, MemoryKind, Protection

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
NOTHING = Feature(0)
UNKNOWN = 1 << 40


def handshake(uffd: Userfaultfd, api: int = abi.UFFD_API, features: int = 0) -> tuple[int, tuple[int, ...]]:
    """The error number, and the structure afterwards; the field that is only answered is preset."""
    buffer = ctypes.create_string_buffer(abi.API.pack(api, features, 1), abi.API.size)
    number = ask_at(uffd.fd, Request.API, ctypes.addressof(buffer))
    return number, abi.API.unpack(buffer)


def bare() -> Userfaultfd:
    return Userfaultfd(handshake=False)


@pytest.mark.fact("2.1")
def test_what_is_refused_leaves_the_descriptor_as_it_was() -> None:
    with bare() as uffd:
        assert ask_at(uffd.fd, Request.API, 0) == errno.EFAULT
        assert handshake(uffd, api=0xAB) == (errno.EINVAL, (0, 0, 0))
        assert handshake(uffd, features=UNKNOWN) == (errno.EINVAL, (0, 0, 0))
        assert not uffd.fdinfo().initialised
        number, (api, features, operations) = handshake(uffd)
        assert (number, api) == (0, abi.UFFD_API)
        assert features == available_features()
        assert Operation.API | Operation.REGISTER | Operation.UNREGISTER in Operation(operations)
    with bare() as uffd:
        with pytest.raises(FeatureError, match="bit 40") as refusal:
            uffd.handshake(Feature(UNKNOWN))
        assert refusal.value.missing == UNKNOWN
        uffd.handshake()


@pytest.mark.fact("2.1")
def test_an_answer_that_cannot_be_written_is_no_handshake() -> None:
    with Mapping.anonymous(PAGE) as memory, bare() as uffd:
        memory.write(0, abi.API.pack(abi.UFFD_API, 0, 0))
        memory.protect(Protection.READ)
        assert ask_at(uffd.fd, Request.API, memory.address) == errno.EFAULT
        assert not uffd.fdinfo().initialised
        memory.protect(Protection.READ | Protection.WRITE)
        assert ask_at(uffd.fd, Request.API, memory.address) == 0


@pytest.mark.fact("2.1")
def test_success_is_final_even_without_features() -> None:
    with bare() as uffd:
        uffd.handshake()
        assert handshake(uffd) == (errno.EINVAL, (0, 0, 0))
        with pytest.raises(NotInitialisedError, match="already"):
            uffd.handshake()


@pytest.mark.fact("2.1")
def test_the_order_of_refusals_without_privilege() -> None:
    def run() -> dict[str, tuple[int, tuple[int, ...]]]:
        drop_privileges()
        with Userfaultfd(handshake=False, way=OpenWay.USER_MODE_ONLY) as uffd:
            answers = {
                "api": handshake(uffd, api=0xAB, features=Feature.EVENT_FORK),
                "fork": handshake(uffd, features=Feature.EVENT_FORK),
                "fork and unknown": handshake(uffd, features=Feature.EVENT_FORK | UNKNOWN),
            }
            with pytest.raises(UffdPermissionError, match="CAP_SYS_PTRACE"):
                uffd.handshake(Feature.EVENT_FORK)
            features = uffd.handshake(optional=Feature.EVENT_FORK | Feature.EVENT_REMAP)
            assert features == Feature.EVENT_REMAP
            return answers

    answers = in_child(run)
    assert answers["api"] == (errno.EINVAL, (0, 0, 0))
    assert answers["fork"] == (errno.EPERM, (0, 0, 0))
    assert answers["fork and unknown"] == (errno.EPERM, (0, 0, 0))


@pytest.mark.fact("2.1")
def test_a_userfaultfd_of_the_device_gives_no_right_to_forks() -> None:
    with make_area(ANONYMOUS), bare() as uffd:

        def run() -> int:
            drop_privileges()
            return handshake(uffd, features=Feature.EVENT_FORK)[0]

        assert in_child(run) == errno.EPERM


@pytest.mark.fact("2.1")
@pytest.mark.needs_feature("WP_ASYNC")
def test_the_answer_is_what_there_is_and_fdinfo_what_is_on() -> None:
    with bare() as uffd:
        assert uffd.fdinfo().features == NOTHING
        number, (_, features, _) = handshake(uffd, features=Feature.WP_ASYNC)
        assert number == 0
        assert features == available_features()
        info = uffd.fdinfo()
        assert info.initialised
        assert info.features == Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with Userfaultfd(Feature.WP_ASYNC) as uffd:
        assert uffd.features == uffd.fdinfo().features


@pytest.mark.fact("2.1")
def test_rwp_async_needs_rwp_in_the_same_call() -> None:
    with bare() as uffd:
        assert handshake(uffd, features=Feature.RWP_ASYNC) == (errno.EINVAL, (0, 0, 0))
        with pytest.raises(UsageError, match=r"RWP_ASYNC without RWP"):
            uffd.handshake(Feature.RWP_ASYNC)
        uffd.handshake(optional=Feature.RWP_ASYNC)
        assert uffd.features == NOTHING


@pytest.mark.fact("2.1")
@pytest.mark.needs_kernel_faults
@pytest.mark.needs_privilege("EVENT_FORK")
def test_the_userfaultfd_of_a_fork_event_is_initialised() -> None:
    def run(link: Link) -> None:
        with registered(features=Feature.EVENT_FORK) as (_, uffd):
            link.send(None, (uffd.fd,))
            assert in_child(int) == 0

    with subject(run) as child, child.receive_uffd() as uffd:
        event = next_event(uffd)
        assert isinstance(event, Fork)
        with event.child as forked:
            assert forked.initialised
            assert forked.fdinfo().features == Feature.EVENT_FORK
            assert handshake(forked)[0] == errno.EINVAL
        child.receive()


# --- 1.3 and 3 ------------------------------------------------------------------------------------------------


@pytest.mark.fact("1.3")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other architectures offer less")
def test_each_feature_came_with_its_release() -> None:
    def number(since: str) -> tuple[int, ...]:
        return tuple(int(part) for part in since.split("."))

    here = available_features()
    for feature, since in abi.FEATURE_SINCE.items():
        if feature in here:
            assert number(since) <= release(), feature
        elif number(since) <= release():
            # Built without it, or made for it later: only what the kernel's own configuration can leave out.
            assert feature in Feature.RWP | Feature.RWP_ASYNC, feature


@pytest.mark.fact("3")
def test_probing_needs_no_privilege_and_less_can_be_tried_on_one_descriptor() -> None:
    def run() -> tuple[int, int]:
        drop_privileges()
        with Userfaultfd(handshake=False, way=OpenWay.USER_MODE_ONLY) as probe:
            _, (_, features, _) = handshake(probe)
        with Userfaultfd(handshake=False, way=OpenWay.USER_MODE_ONLY) as uffd:
            assert handshake(uffd, features=features & ~Feature.EVENT_FORK | UNKNOWN)[0] == errno.EINVAL
            assert handshake(uffd, features=features & ~Feature.EVENT_FORK)[0] == 0
            return features, int(uffd.fdinfo().features)

    features, negotiated = in_child(run)
    assert features == available_features()
    assert negotiated == features & ~Feature.EVENT_FORK


@pytest.mark.fact("3")
def test_protection_and_minor_faults_work_unasked_for() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd:
        uffd.register(area.memory, mode=MISSING | WP)
        uffd.copy(area.start, area.pattern(0), write_protect=True)
        assert protected(area.start)
        with Touch(area, data=b"x"):
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.kind == "write-protect"
            uffd.writeprotect(area.memory, protect=False)
    with filling(Request.CONTINUE) as fill:
        assert fill.uffd.features == NOTHING
        with Touch(fill.area):
            event = next_event(fill.uffd)
            assert isinstance(event, PageFault)
            assert event.kind == "minor"
            fill.fill()


@pytest.mark.fact("3")
@pytest.mark.parametrize("which", ["POISON", "MOVE"])
def test_poison_and_move_work_unasked_for(which: str) -> None:
    with filling(Request[which]) as fill:
        if Feature[which] in available_features():
            assert fill.fill() == PAGE
        else:
            assert fill.ask().errno == errno.EINVAL  # a request that this kernel does not know
            with pytest.raises(InvalidRequestError, match="the kernel is older than Linux"):
                fill.fill()


@pytest.mark.fact("3")
def test_thread_ids_and_exact_addresses_are_for_those_who_ask() -> None:
    for features, thread, offset in (
        (NOTHING, False, 0),
        (Feature.THREAD_ID, True, 0),
        (Feature.EXACT_ADDRESS, False, 123),
    ):
        with registered(features=features) as (area, uffd), Touch(area, 1, offset=123) as touch:
            event = next_event(uffd)
            assert isinstance(event, PageFault)
            assert event.address == area.page(1) + offset
            assert event.thread_id == (touch._thread.native_id if thread else 0)
            uffd.zeropage(area.page(1), PAGE)


@pytest.mark.fact("3")
@pytest.mark.needs_feature("WP_UNPOPULATED")
def test_empty_anonymous_pages_are_protected_only_on_request() -> None:
    for features, marked in ((NOTHING, False), (Feature.WP_UNPOPULATED, True)):
        with registered(mode=WP, features=features) as (area, uffd):
            uffd.writeprotect(area.memory)
            assert protected(area.start) is marked
            assert (PagemapBit.SWAPPED in entry(area.start)) is marked  # how the pagemap shows a marker


@pytest.mark.fact("3")
def test_sigbus_goes_with_events() -> None:
    features = Feature.SIGBUS | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
    with registered(features=features) as (area, uffd):
        with Job(area.drop, 0, 1):
            assert next_event(uffd) == Remove(area.start, area.page(1))
        with Job(area.memory.unmap, 3 * PAGE, PAGE):
            assert next_event(uffd) == Unmap(area.page(3), area.page(4))
        assert kernel_call("open", area.start, 0) == errno.EFAULT


@pytest.mark.fact("3")
def test_files_are_protected_only_asynchronously_and_with_nothing_else() -> None:
    with ordinary_file() as fd, Mapping.of_file(fd, PAGE, shared=False) as memory:
        with Userfaultfd() as uffd, pytest.raises(InvalidRequestError):
            uffd.register(memory, mode=WP)
        if Feature.WP_ASYNC not in available_features():
            return
        with Userfaultfd(Feature.WP_ASYNC) as uffd:
            for mode in (MISSING, MINOR, MISSING | WP, WP | MINOR):
                with pytest.raises(InvalidRequestError):
                    uffd.register(memory, mode=mode)
            registration = uffd.register(memory, mode=WP)
            # It promises what it does not keep.
            assert Operation.COPY | Operation.ZEROPAGE in registration.operations
            assert ask(uffd, Request.COPY, memory.address, id(memory), PAGE, 0).errno == errno.EINVAL
