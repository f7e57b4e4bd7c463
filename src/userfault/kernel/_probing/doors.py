"""The ways to a userfaultfd, tried; and which of them the probe's trials take."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from userfault.kernel import abi
from userfault.kernel._probing.findings import Access
from userfault.kernel._probing.trials import Lab
from userfault.kernel._syscalls import ioctl

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Door", "Doors", "say"]


def say(error: int | None) -> str:
    """Put an error number into words."""
    if error is None:
        return "works"
    return f"{errno.errorcode.get(error, str(error))}: {os.strerror(error)}"


@dataclass(frozen=True, slots=True)
class Door:
    """One way to get a userfaultfd, and what came of it.

    Attributes:
        name: The device's path or the system call.
        opener: Opens one with these flags.
        user_mode_only: Whether that flag was given.
        error: What the kernel said, None if it opened.
    """

    name: str
    opener: Callable[[int], int]
    user_mode_only: bool
    error: int | None

    @property
    def is_open(self) -> bool:
        """Whether it opened."""
        return self.error is None

    def __str__(self) -> str:
        return f"{self.name}: {say(self.error)}"


def _try(name: str, opener: Callable[[int], int], *, user_mode_only: bool) -> Door:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (abi.OpenFlag.USER_MODE_ONLY if user_mode_only else 0)
    try:
        os.close(opener(flags))
    except OSError as failure:
        number = failure.errno if failure.errno is not None else errno.EIO
        return Door(name, opener, user_mode_only, number)
    return Door(name, opener, user_mode_only, None)


@dataclass(frozen=True, slots=True)
class Doors:
    """All of them.

    Attributes:
        device: The device, for all faults.
        syscall: The system call, for all faults.
        restricted: The system call, for user-mode faults only.
        restricted_device: The device, likewise.
    """

    device: Door
    syscall: Door
    restricted: Door
    restricted_device: Door

    @classmethod
    def tried(cls, by_device: Callable[[int], int], by_syscall: Callable[[int], int]) -> Doors:
        """Try all of them."""
        return cls(
            _try(abi.UFFD_DEVICE, by_device, user_mode_only=False),
            _try("userfaultfd(2)", by_syscall, user_mode_only=False),
            _try("userfaultfd(2)", by_syscall, user_mode_only=True),
            _try(abi.UFFD_DEVICE, by_device, user_mode_only=True),
        )

    @property
    def best(self) -> Door:
        """The one that a program gets: the order is that of `Userfaultfd` and of the engine."""
        return next((door for door in (self.device, self.syscall) if door.is_open), self.restricted)

    @property
    def access(self) -> Access:
        """Whose faults can be trapped through the best."""
        if not self.best.is_open:
            return Access.NONE
        return Access.USER_MODE if self.best.user_mode_only else Access.FULL

    @property
    def lab(self) -> Lab | None:
        """Where trials get theirs: restricted to user mode if possible, so that no system call ever waits."""
        for door in (self.restricted, self.restricted_device, self.best):
            if door.is_open:
                return Lab(door.opener, door.user_mode_only)
        return None

    def offered(self) -> abi.Feature:
        """Ask which features the kernel knows; a successful UFFDIO_API can be made once per descriptor."""
        lab = self.lab
        if lab is None:
            return abi.Feature(0)
        fd = lab.opener(os.O_CLOEXEC | (abi.OpenFlag.USER_MODE_ONLY if lab.user_mode_only else 0))
        try:
            answer = ioctl(fd, abi.Request.API, abi.API.pack(abi.UFFD_API, 0, 0))
        finally:
            os.close(fd)
        return abi.Feature(abi.API.unpack(answer)[1])
