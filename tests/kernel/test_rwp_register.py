"""Registering for read-write protection: which memory, which modes together, and kernels that do not have it."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from support.kernel import KINDS, PAGE, Area, available_features, make_area
from support.kernel_facts import ask, ordinary_file
from support.rwp import ASYNC, SYNC, armed, protected_pages
from userfault.kernel import Feature, Mapping, RegisterMode, Userfaultfd, abi, pagemap
from userfault.kernel.abi import Operation, Request, RwprotectMode
from userfault.kernel.errors import (
    FeatureError,
    InvalidRequestError,
    NotRegisteredError,
    NotSupportedError,
    RangeBusyError,
    UffdPermissionError,
    UsageError,
)
from userfault.kernel.mapping import MapFlag, MemoryKind, Protection

needs_rwp = pytest.mark.needs_feature("RWP", "RWP_ASYNC")
every_kind = pytest.mark.parametrize("kind", KINDS)

MISSING, WP, MINOR, RWP = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR, RegisterMode.RWP
_BASIC = Operation.WAKE | Operation.COPY | Operation.POISON
_SMALL = _BASIC | Operation.ZEROPAGE | Operation.MOVE
HUGE_KINDS = (MemoryKind.HUGETLB, MemoryKind.PRIVATE_HUGETLB)


def _modes(area: Area) -> RegisterMode:
    """How the area is registered, by smaps."""
    (flags,) = pagemap.vm_flags(area.memory)
    named = {
        MISSING: flags.missing,
        WP: flags.write_protect,
        MINOR: flags.minor,
        RWP: flags.read_write_protect,
    }
    found = RegisterMode(0)
    for mode, is_on in named.items():
        found |= mode if is_on else RegisterMode(0)
    return found


# --- the handshake -------------------------------------------------------------------------------------------


@pytest.mark.fact("1.3")
def test_without_the_feature_everything_is_refused() -> None:
    """On kernels that do not have it, and where it was not asked for."""
    has = available_features() & Feature.RWP
    with make_area(MemoryKind.ANONYMOUS, 1) as area, Userfaultfd() as uffd:
        with pytest.raises(UsageError, match=r"RWP needs the feature: Userfaultfd\(Feature.RWP\), Linux 7.3"):
            uffd.register(area.memory, mode=RWP)
        assert ask(uffd, Request.REGISTER, area.start, area.length, RWP).errno == errno.EINVAL
        assert _modes(area) == RegisterMode(0)

        uffd.register(area.memory, mode=MISSING)
        for protect in (True, False):
            with pytest.raises(NotRegisteredError if has else InvalidRequestError, match=r"Linux 7\.3|RWP"):
                uffd.rwprotect(area.memory, protect=protect)
        refused = ask(uffd, Request.RWPROTECT, area.start, area.length, RwprotectMode.RWP).errno
        assert refused == (errno.ENOENT if has else errno.EINVAL)

        with pytest.raises(UsageError, match="RWP_ASYNC needs the feature RWP"):
            uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert ask(uffd, Request.SET_MODE, Feature.RWP_ASYNC, 0).errno == errno.EINVAL
        if has:
            uffd.set_mode(disable=Feature.RWP_ASYNC)
        else:
            with pytest.raises(NotSupportedError, match=r"came with Linux 7\.3"):
                uffd.set_mode(disable=Feature.RWP_ASYNC)
            for features in (SYNC, ASYNC):
                with pytest.raises(FeatureError, match=r"does not have: RWP \(Linux 7\.3\)") as refusal:
                    Userfaultfd(features)
                assert refusal.value.missing == features


@pytest.mark.fact("3")
@needs_rwp
def test_the_handshake() -> None:
    with pytest.raises(UsageError, match=r"Feature.RWP \| Feature.RWP_ASYNC"):
        Userfaultfd(Feature.RWP_ASYNC)
    with Userfaultfd(handshake=False) as uffd:
        assert ask(uffd, Request.API, abi.UFFD_API, Feature.RWP_ASYNC, 0).errno == errno.EINVAL
        # It can be tried again.
        uffd.handshake(ASYNC)
        assert uffd.features == ASYNC
        assert uffd.available_features & ASYNC == ASYNC
        assert uffd.available_operations == (
            Operation.API | Operation.REGISTER | Operation.UNREGISTER | Operation.SET_MODE
        )
        info = uffd.fdinfo()
        assert info.features == ASYNC
        assert info.operations & (Operation.RWPROTECT | Operation.SET_MODE) == (
            Operation.RWPROTECT | Operation.SET_MODE
        )
    with Userfaultfd(optional=Feature.RWP_ASYNC) as uffd:
        assert not uffd.features & Feature.RWP_ASYNC


# --- which memory --------------------------------------------------------------------------------------------


@pytest.mark.fact("1.4")
@needs_rwp
@every_kind
def test_what_a_registered_range_offers(kind: MemoryKind) -> None:
    basic = _BASIC if kind in HUGE_KINDS else _SMALL
    with make_area(kind, 1) as area, Userfaultfd(SYNC) as uffd:
        for mode, extra in (
            (RWP, Operation.RWPROTECT),
            (MISSING | RWP, Operation.RWPROTECT),
            (MINOR | RWP, Operation.RWPROTECT | Operation.CONTINUE),
            (MISSING | MINOR | RWP, Operation.RWPROTECT | Operation.CONTINUE),
        ):
            if mode & MINOR and kind is MemoryKind.ANONYMOUS:
                with pytest.raises(InvalidRequestError):
                    uffd.register(area.memory, mode=mode)
                assert _modes(area) == RegisterMode(0)
                continue
            assert uffd.register(area.memory, mode=mode).operations == basic | extra
            assert _modes(area) == mode
            uffd.unregister(area.memory)
            assert _modes(area) == RegisterMode(0)


@pytest.mark.fact("1.4")
@needs_rwp
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_a_file_of_another_file_system_is_refused(shared: bool) -> None:
    """Unlike write protection, which WP_ASYNC gives to all of them."""
    protection = Protection.READ if shared else Protection.READ | Protection.WRITE
    with ordinary_file() as fd, Mapping.of_file(fd, PAGE, shared=shared, protection=protection) as memory:
        assert memory.kind is MemoryKind.FILE
        for features in (SYNC, ASYNC, ASYNC | Feature.WP_ASYNC):
            with Userfaultfd(features) as uffd, pytest.raises(InvalidRequestError):
                uffd.register(memory, mode=RWP)


def _vdso() -> int:
    """The kernel's own page in this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            return int(line.partition("-")[0], 16)
    pytest.skip("needs a vDSO")


@pytest.mark.fact("1.4")
@needs_rwp
def test_other_memory() -> None:
    read, write = Protection.READ, Protection.READ | Protection.WRITE
    with contextlib.ExitStack() as stack:
        uffd = stack.enter_context(Userfaultfd(SYNC))
        droppable = stack.enter_context(Mapping.anonymous(PAGE, flags=MapFlag.DROPPABLE))
        with pytest.raises(InvalidRequestError):
            uffd.register(droppable, mode=RWP)
        with pytest.raises(InvalidRequestError):
            uffd.register(_vdso(), PAGE, mode=RWP)  # VM_DONTEXPAND
        # A shared mapping that may never be written; a private one may be, to its own copy.
        source = stack.enter_context(Mapping.memfd(PAGE))
        read_only = os.open(f"/proc/self/fd/{source.fd}", os.O_RDONLY)
        stack.callback(os.close, read_only)
        shared = stack.enter_context(Mapping.of_file(read_only, PAGE, protection=read))
        with pytest.raises(UffdPermissionError, match="may never become writable"):
            uffd.register(shared, mode=RWP)
        for fine in (
            stack.enter_context(Mapping.of_file(read_only, PAGE, shared=False, protection=write)),
            stack.enter_context(Mapping.anonymous(PAGE, shared=True)),
            stack.enter_context(Mapping.anonymous(PAGE, protection=read)),
        ):
            uffd.register(fine, mode=RWP)
            uffd.unregister(fine)
        locked = stack.enter_context(Mapping.anonymous(PAGE))
        locked.mlock()
        uffd.register(locked, mode=RWP)
        uffd.rwprotect(locked)
        assert pagemap.protected(locked).tolist() == [True]


@pytest.mark.fact("1.4")
@needs_rwp
@every_kind
def test_memory_that_may_not_be_accessed_is_refused(kind: MemoryKind) -> None:
    with make_area(kind, 2) as area, Userfaultfd(SYNC) as uffd:
        area.memory.protect(Protection.NONE, area.page_size, area.page_size)
        with pytest.raises(InvalidRequestError):
            uffd.register(area.memory, mode=RWP)
        for flags in pagemap.vm_flags(area.memory):
            assert not flags.registered
        uffd.register(area.memory, mode=MISSING)  # which does not mind
        uffd.unregister(area.memory)
        area.memory.protect(Protection.READ)
        uffd.register(area.memory, mode=RWP)


# --- registering again ---------------------------------------------------------------------------------------


# First, then, and what is registered at the end; None: refused, and nothing has changed.
AGAIN = (
    (WP, RWP, None),
    (RWP, WP, None),
    (RWP, MISSING, None),
    (MISSING | RWP, MISSING, None),
    (MISSING | RWP, MISSING | WP, None),
    (MISSING | WP, RWP, None),
    (MISSING | WP, MISSING | RWP, None),
    (RWP, MISSING | RWP, MISSING | RWP),
    (MISSING | RWP, RWP, MISSING | RWP),
    (MISSING, RWP, RWP),
    (RWP, RWP, RWP),
)


@pytest.mark.fact("2.2")
@needs_rwp
@every_kind
def test_registering_again(kind: MemoryKind) -> None:
    """What would drop WP or RWP is refused."""
    with make_area(kind, 1) as area, Userfaultfd(SYNC) as uffd:
        area.populate()
        for first, then, result in AGAIN:
            uffd.register(area.memory, mode=first)
            if first & RWP:
                uffd.rwprotect(area.memory)
            if result is None:
                with pytest.raises(
                    RangeBusyError, match=r"since Linux 7\.3, by this one .* unregister it first"
                ):
                    uffd.register(area.memory, mode=then)
            else:
                uffd.register(area.memory, mode=then)
            assert _modes(area) == (first if result is None else result)
            assert protected_pages(area) == [bool(first & RWP)]
            uffd.unregister(area.memory)
            assert protected_pages(area) == [False]


@pytest.mark.fact("2.2")
@needs_rwp
@pytest.mark.parametrize("kind", KINDS[1:])
def test_minor_goes_with_it(kind: MemoryKind) -> None:
    with make_area(kind, 1) as area, Userfaultfd(SYNC) as uffd:
        uffd.register(area.memory, mode=MINOR)
        uffd.register(area.memory, mode=MINOR | RWP)
        assert _modes(area) == MINOR | RWP
        uffd.register(area.memory, mode=MISSING | RWP)  # replaced
        assert _modes(area) == MISSING | RWP
        uffd.register(area.memory, mode=MISSING | MINOR | RWP)
        assert _modes(area) == MISSING | MINOR | RWP
        with pytest.raises(RangeBusyError):
            uffd.register(area.memory, mode=MINOR | WP)
        assert _modes(area) == MISSING | MINOR | RWP


@pytest.mark.fact("2.2")
@needs_rwp
def test_a_range_of_another_userfaultfd_is_busy() -> None:
    with armed(MemoryKind.SHMEM) as (area, _), Userfaultfd(SYNC) as other:
        with pytest.raises(RangeBusyError, match="another userfaultfd"):
            other.register(area.memory, mode=RWP)
        assert protected_pages(area) == [True, True]
