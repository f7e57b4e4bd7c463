"""What this kernel does differently from others, found out by trying."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache

from support.kernel import available_features
from support.page_model import PAGE, Release
from userfault.kernel import Feature, RegisterMode, Userfaultfd, pagemap
from userfault.kernel.errors import RangeBusyError, UffdError, UffdPermissionError
from userfault.kernel.mapping import Advice, Mapping, MemoryKind, Protection

__all__ = ["this_release"]

_GUARDED = (MemoryKind.ANONYMOUS, MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM)


@cache
def this_release() -> Release:
    """Try everything once."""
    with Userfaultfd() as uffd:
        kernel_faults = not uffd.user_mode_only
    return Release(
        features=available_features(),
        kernel_faults=kernel_faults,
        fork_events=_fork_events(),
        keeps_protection=_keeps_protection(),
        unregisters_others=_unregisters_others(),
        continue_protects=_continue_protects(),
        remap_clears=_remap_clears(),
        remaps_several=_remaps_several(),
        beyond_copy=_beyond(RegisterMode.MISSING),
        beyond_continue=_beyond(RegisterMode.MINOR),
        guards=frozenset(kind for kind in _GUARDED if _guards(kind)),
        copies_over_guards=_guards(MemoryKind.ANONYMOUS) and _copies_over_guards(),
        scans=_scans(),
    )


@contextlib.contextmanager
def _registered(mode: RegisterMode, *, pages: int = 1) -> Iterator[tuple[Userfaultfd, Mapping]]:
    with Userfaultfd() as uffd, Mapping.anonymous(pages * PAGE) as memory:
        uffd.register(memory, mode=mode)
        yield uffd, memory


def _fork_events() -> bool:
    try:
        Userfaultfd(Feature.EVENT_FORK).close()
    except UffdPermissionError:
        return False
    return True


def _keeps_protection() -> bool:
    with _registered(RegisterMode.WP) as (uffd, memory):
        try:
            uffd.register(memory, mode=RegisterMode.MISSING)
        except RangeBusyError:
            return True
    return False


def _unregisters_others() -> bool:
    with _registered(RegisterMode.MISSING) as (_, memory), Userfaultfd() as other:
        try:
            other.unregister(memory)
        except UffdError:
            return False
    return True


def _continue_protects() -> bool:
    with Userfaultfd() as uffd, Mapping.memfd(PAGE) as memory:
        assert memory.fd is not None
        os.pwrite(memory.fd, bytes(PAGE), 0)
        uffd.register(memory, mode=RegisterMode.MINOR | RegisterMode.WP)
        return uffd.try_continue(memory, write_protect=True).complete


def _remap_clears() -> bool:
    with _registered(RegisterMode.WP) as (uffd, memory), Mapping.anonymous(PAGE) as target:
        memory.write(0, b"x")
        uffd.writeprotect(memory)
        return not pagemap.protected(memory.remap(to=target))[0]


def _remaps_several() -> bool:
    with Mapping.anonymous(2 * PAGE) as memory, Mapping.anonymous(2 * PAGE) as target:
        memory.protect(Protection.READ, PAGE, PAGE)
        try:
            memory.remap(to=target)
        except UffdError:
            return False
    return True


def _beyond(mode: RegisterMode) -> int:
    with Userfaultfd() as uffd, Mapping.memfd(PAGE) as file:
        assert file.fd is not None
        with Mapping.of_file(file.fd, 2 * PAGE) as memory:
            uffd.register(memory, mode=mode)
            place = memory.address + PAGE
            if mode is RegisterMode.MINOR:
                return uffd.try_continue(place, PAGE).errno
            return uffd.try_copy(place, bytes(PAGE)).errno


def _guards(kind: MemoryKind) -> bool:
    try:
        with contextlib.ExitStack() as stack:
            if kind is MemoryKind.ANONYMOUS:
                memory = stack.enter_context(Mapping.anonymous(PAGE))
            else:
                memory = stack.enter_context(Mapping.memfd(PAGE, shared=kind is MemoryKind.SHMEM))
            memory.madvise(Advice.GUARD_INSTALL)
    except UffdError:
        return False
    return True


def _copies_over_guards() -> bool:
    with _registered(RegisterMode.MISSING) as (uffd, memory):
        memory.madvise(Advice.GUARD_INSTALL)
        return uffd.try_copy(memory, bytes(PAGE)).complete


def _scans() -> bool:
    with Mapping.anonymous(PAGE) as memory:
        try:
            pagemap.scan(memory, returns=pagemap.PageCategory.PRESENT)
        except UffdError:
            return False
    return True
