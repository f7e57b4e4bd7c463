"""The end of descriptors, handlers, mappings and processes (docs/kernel-api.md, 4.4).

Messages that a dead handler had read, and closing one of two duplicates: test_facts_register.py (WAKE) and
test_facts_object_model.py.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys

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
    waiters,
)
from support.kernel_facts import (
    UNTOUCHED,
    Answer,
    SignalInfo,
    ask,
    exited_owner,
    kernel_call,
    registered,
    signal_info,
    tell_signals,
    vma,
)
from support.kernel_releases import documented
from userfault.kernel import FaultKind, Feature, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import Request
from userfault.kernel.errors import NotRegisteredError
from userfault.kernel.mapping import Advice, Mapping, MemoryKind

ANONYMOUS, SHMEM = MemoryKind.ANONYMOUS, MemoryKind.SHMEM
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR

pytestmark = pytest.mark.fact("4.4")


# --- the last descriptor --------------------------------------------------------------------------------------


def test_with_the_last_descriptor_all_waiters_go_on_as_if_it_had_never_been() -> None:
    with make_area(SHMEM) as area, make_area(ANONYMOUS) as anonymous:
        assert area.memory.fd is not None
        os.pwrite(area.memory.fd, b"of the file", 0)
        anonymous.memory.write(PAGE, b"there")
        with Userfaultfd() as uffd:
            uffd.register(area.memory, mode=MISSING | MINOR)
            uffd.register(anonymous.memory, mode=MISSING | WP)
            uffd.writeprotect(anonymous.page(1), PAGE)
            minor, hole = Touch(area, 0), Touch(area, 1)
            missing, write = Touch(anonymous, 0), Touch(anonymous, 1, data=b"written")
            waiters(uffd, 4)
            uffd.read_events(2)  # read or not
        assert minor.result()[:11] == b"of the file"
        assert hole.result() == bytes(32)
        assert missing.result() == bytes(32)  # silently
        assert write.result() == b"written"
        assert not vma(area.start).registered
        assert not vma(anonymous.start).registered


def test_while_another_descriptor_lives_they_wait_on() -> None:
    with make_area(ANONYMOUS) as area, Userfaultfd() as uffd, Userfaultfd.from_fd(os.dup(uffd.fd)) as kept:
        uffd.register(area.memory)
        with Touch(area):
            next_event(uffd)
            uffd.close()
            assert kept.fdinfo().total == 1
            kept.zeropage(area.start, PAGE)


def test_a_handler_process_that_dies_leaves_them_waiting_and_its_messages_are_had_again() -> None:
    with registered() as (area, uffd), Touch(area, 2):
        waiters(uffd, 1)
        assert in_child(lambda: len(uffd.read_events())) == 1
        assert (uffd.fdinfo().pending, uffd.fdinfo().total) == (0, 1)
        assert not uffd.poll(0)
        uffd.wake(area.memory)
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        assert event.address == area.page(2)
        uffd.zeropage(area.page(2), PAGE)


def test_whom_nobody_serves_only_a_fatal_signal_ends() -> None:
    def run(link: Link) -> None:
        with registered() as (area, uffd):
            link.send(None, (uffd.fd,))
            area.head(0)

    with subject(run) as child, child.receive_uffd() as uffd:
        waiters(uffd, 1)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert uffd.fdinfo().total == 0


# --- fork -----------------------------------------------------------------------------------------------------


def test_a_forked_child_is_not_registered_without_fork_events() -> None:
    with registered(mode=MISSING | WP) as (area, uffd):
        uffd.copy(area.start, area.pattern(0), write_protect=True)

        def look() -> tuple[bool, bytes, bytes]:
            area.memory.write(0, b"child")  # not protected
            return vma(area.start).registered, area.head(0), area.head(1)

        assert in_child(look) == (False, b"child" + area.pattern(0)[5:32], bytes(32))
        assert vma(area.start).missing
        assert area.head(0) == area.pattern(0)[:32]


def test_memory_that_children_do_not_get_or_get_wiped() -> None:
    with registered() as (area, uffd):
        uffd.copy(area.start, area.pattern(0))
        area.memory.madvise(Advice.WIPEONFORK)
        assert in_child(area.head, 0) == bytes(32)
        area.memory.madvise(Advice.DONTFORK)
        info = signal_info(area.head, 0)
        assert info is not None
        assert info.number == 11  # SIGSEGV
        assert vma(area.start).missing


# --- exit and exec --------------------------------------------------------------------------------------------


def test_when_the_owner_has_exited() -> None:
    with exited_owner() as gone, make_area(ANONYMOUS) as source:
        source.populate()
        uffd, start = gone.uffd, gone.start
        no_process = Answer(errno.ESRCH, UNTOUCHED)
        assert ask(uffd, Request.COPY, start, source.start, PAGE, 0) == no_process
        assert ask(uffd, Request.ZEROPAGE, start, PAGE, 0) == no_process
        assert ask(uffd, Request.CONTINUE, start, PAGE, 0) == no_process
        assert ask(uffd, Request.WRITEPROTECT, start, PAGE, 0).errno == errno.ESRCH
        if Feature.POISON in available_features():
            assert ask(uffd, Request.POISON, start, PAGE, 0) == no_process
        if Feature.MOVE in available_features():
            assert ask(uffd, Request.MOVE, start, source.start, PAGE, 0) == Answer(errno.EINVAL, UNTOUCHED)
        assert ask(uffd, Request.REGISTER, start, PAGE, MISSING) == Answer(errno.ENOMEM, UNTOUCHED)
        assert ask(uffd, Request.UNREGISTER, start, PAGE).errno == errno.ENOMEM
        assert ask(uffd, Request.WAKE, start, PAGE).errno == 0
        # There is no end of file: only a pidfd tells of it.
        poller = select.poll()
        poller.register(uffd.fd, select.POLLIN | select.POLLHUP | select.POLLERR)
        assert poller.poll(0) == []
        assert kernel_call("read", uffd.fd, bytes(32), 32) == errno.EAGAIN


_PROGRAM = """
import fcntl, os, sys
fd, start = int(sys.argv[1]), int(sys.argv[2])
def ask(request, *values):
    try:
        fcntl.ioctl(fd, request, b"".join(value.to_bytes(8, sys.byteorder) for value in values))
    except OSError as refusal:
        return refusal.errno
    return 0
def read():
    try:
        os.read(fd, 32)
    except OSError as refusal:
        return refusal.errno
copy, zero, register, unregister, wake = (int(word) for word in sys.argv[3:])
page = os.sysconf("SC_PAGE_SIZE")
print(ask(copy, start, start, page, 0, 0), ask(zero, start, page, 0, 0), ask(register, start, page, 1, 0),
      ask(unregister, start, page), ask(wake, start, page), read())
"""


def test_a_program_that_takes_the_place_of_the_owner_can_do_nothing_with_it() -> None:
    def run(link: Link, output: int) -> None:
        memory = Mapping.anonymous(PAGE)
        uffd = Userfaultfd(Feature.EVENT_UNMAP, cloexec=False)
        uffd.register(memory)
        link.send(None, (uffd.fd,))
        os.dup2(output, 1)
        words = (Request.COPY, Request.ZEROPAGE, Request.REGISTER, Request.UNREGISTER, Request.WAKE)
        arguments = [uffd.fd, memory.address, *map(int, words)]
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, arguments)])

    reading, writing = os.pipe()
    with open(reading) as output, subject(run, writing) as child, child.receive_uffd() as uffd:
        os.close(writing)
        answers = [int(word) for word in output.read().split()]
        assert answers == [errno.ESRCH, errno.ESRCH, errno.ENOMEM, errno.ENOMEM, 0, errno.EAGAIN]
        assert child.wait() == 0
        assert uffd.read_events() == []  # that its memory went was no event


# --- mremap and munmap ----------------------------------------------------------------------------------------


def test_what_moves_unfollowed_is_not_registered() -> None:
    with registered(mode=MISSING | WP) as (area, uffd), Mapping.anonymous(area.length) as target:
        uffd.copy(area.start, area.pattern(0), write_protect=True)
        area.memory.remap(to=target)
        assert not vma(area.start).registered
        assert protected(area.start) in documented("protection of moved memory that nobody follows")
        area.memory.write(16, b"nobody is told")
        assert [area.head(0, 16), area.head(1)] == [area.pattern(0)[:16], bytes(32)]


def test_what_moves_and_leaves_its_place_mapped_leaves_the_registration_there() -> None:
    with registered() as (area, uffd):
        uffd.copy(area.start, area.pattern(0))
        with area.memory.remap(dontunmap=True) as moved:
            assert moved.read(0, 32) == area.pattern(0)[:32]
            assert not vma(moved.address).registered
            assert vma(area.start).missing
            with Touch(area, 0):
                event = next_event(uffd)
                assert isinstance(event, PageFault)
                assert event.kind is FaultKind.MISSING
                uffd.zeropage(area.start, PAGE)


def _move_two_mappings(*, follow: bool) -> int:
    may_move_fixed = 1 | 2
    with make_area(ANONYMOUS) as area, Mapping.anonymous(area.length) as target, Userfaultfd() as uffd:
        area.memory.madvise(Advice.DONTDUMP, 2 * PAGE, 2 * PAGE)
        if follow:
            uffd.register(area.memory)
        return kernel_call("mremap", area.start, area.length, area.length, may_move_fixed, target.address)


def test_several_mappings_with_a_registered_one_do_not_move_together() -> None:
    assert in_child(lambda: _move_two_mappings(follow=False)) in documented("mremap of several mappings")
    assert in_child(lambda: _move_two_mappings(follow=True)) == errno.EFAULT


def _wait_in_what_goes(link: Link, features: Feature, call: str) -> object:
    kept = tell_signals(link)
    with make_area(ANONYMOUS) as area, Userfaultfd(features) as uffd:
        uffd.register(area.memory)
        link.send(area.start, (uffd.fd,))
        touch = Touch(area)
        link.receive()
        if call == "munmap":
            assert kernel_call("munmap", area.start, area.length) == 0
        else:
            target = Mapping.anonymous(area.length)
            assert kernel_call("mremap", area.start, area.length, area.length, 3, target.address) == 0
        link.send("gone")
        return touch.result(), kept


@pytest.mark.parametrize("call", ["munmap", "mremap"])
@pytest.mark.parametrize(
    "features", [Feature(0), Feature.EVENT_UNMAP | Feature.EVENT_REMAP], ids=["silent", "event"]
)
def test_who_waits_in_what_goes_has_to_be_woken_to_fail(call: str, features: Feature) -> None:
    with subject(_wait_in_what_goes, features, call) as child:
        start, (fd,) = child.receive_with_fds()
        with Userfaultfd.from_fd(fd) as uffd:
            next_event(uffd)
            child.send("go")
            if features:
                for _ in range(1 if call == "munmap" else 2):
                    next_event(uffd)
            assert child.receive() == "gone"
            assert uffd.fdinfo().total == 1  # still
            assert child.status is None
            with pytest.raises(NotRegisteredError):
                uffd.zeropage(start, PAGE)
            uffd.wake(start, PAGE)
            end = child.receive()
            assert isinstance(end, SignalInfo)
            assert (end.number, end.address) == (signal.SIGSEGV, start)


def test_what_is_dropped_unfollowed_is_missing_again() -> None:
    with registered() as (area, uffd):
        uffd.copy(area.start, area.pattern(0))
        area.drop(0, 1)
        with Touch(area, 0) as touch:
            assert next_event(uffd) == PageFault(area.start, 0, 0)  # type: ignore[arg-type]
            uffd.zeropage(area.start, PAGE)
            assert touch.result() == bytes(32)
