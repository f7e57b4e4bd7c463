"""The exact step that makes a missing thing work, as text for people: one step a line.

Version numbers are compared here and nowhere else: they choose words, never behaviour.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

__all__ = ["Surroundings", "for_device", "for_full_access", "for_huge_pages", "for_no_access", "for_trial"]

_DOCKER = "docker run --device /dev/userfaultfd ...   (podman, Kubernetes: docs/privileges.md)"
_SECCOMP = (
    "a seccomp profile that allows userfaultfd: docker run --security-opt seccomp=profile.json ...\n"
    "or, from Linux 6.1 on, the device: " + _DOCKER
)
_SYSCTL = "sudo sysctl -w vm.unprivileged_userfaultfd=1"
_FOR_NOW = "sudo setfacl -m u:$USER:rw /dev/userfaultfd   (until the next boot)"
_UDEV = (
    'echo "KERNEL==\\"userfaultfd\\", GROUP=\\"$(id -gn)\\", MODE=\\"0660\\"" |'
    " sudo tee /etc/udev/rules.d/99-userfaultfd.rules &&"
    " sudo udevadm control --reload && sudo udevadm trigger /dev/userfaultfd   (for good)"
)
_CAPABILITY = (
    "run it with CAP_SYS_PTRACE: as root, with AmbientCapabilities=CAP_SYS_PTRACE in its systemd unit,"
    " or docker run --cap-add SYS_PTRACE ..."
)
_EXHAUSTED = {
    errno.EMFILE: "close descriptors, or raise their limit: ulimit -n 4096",
    errno.ENFILE: "sudo sysctl -w fs.file-max=1000000",
    errno.ENOMEM: "free some memory, then run it again",
    errno.ENOSPC: "free some memory or shared memory, then run it again",
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What decides on the words.

    Attributes:
        release: Kernel release, as uname has it.
        filtered: Whether a seccomp filter is on the process.
        container: Whether this looks like a container.
        misc_minor: Minor number of the userfaultfd device, None if the kernel has no such driver.
    """

    release: str
    filtered: bool = False
    container: bool = False
    misc_minor: int | None = None

    def is_older_than(self, since: str) -> bool:
        """Tell whether this release came before another."""
        return _version(self.release) < _version(since)

    def needs(self, since: str) -> str:
        """Say which release it would have to be."""
        return f"Linux {since} or newer (this is {self.release})"


def _version(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)?", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def for_exhaustion(error: int | None) -> str:
    """Say what to do where a trial ended for want of something; "" if that was not why."""
    return _EXHAUSTED.get(error or 0, "")


def for_trial(name: str, since: str, lacking: str, error: int | None, here: Surroundings) -> str:
    """Say how to get a thing that did not work in its trial."""
    if name in ("EVENT_FORK", "fork events") and error == errno.EPERM:
        return _CAPABILITY
    if here.is_older_than(since):
        return here.needs(since)
    if error == errno.ENOENT:
        return "/proc mounted, with this process in it: sudo mount -t proc proc /proc"
    if here.filtered and error in (errno.EPERM, errno.ENOSYS, errno.EACCES):
        return "a seccomp profile that allows the call: docker run --security-opt seccomp=profile.json ..."
    return lacking or "a kernel that does what its release should; please report this one"


def for_no_access(error: int | None, here: Surroundings) -> str:
    """Say how to get any userfaultfd at all.

    Args:
        error: What userfaultfd(2) said with `UFFD_USER_MODE_ONLY`, which asks for no privilege.
        here: Where this is.
    """
    if here.filtered or here.container:
        return _SECCOMP
    if error == errno.ENOSYS:
        return "a kernel built with CONFIG_USERFAULTFD=y"
    if error == errno.EINVAL:
        return f"{_SYSCTL}\nor root, or {here.needs('5.11')}"
    if error in (errno.EMFILE, errno.ENFILE):
        return _EXHAUSTED[error]
    return "a rule of the security module (SELinux: anon_inode, [userfaultfd]) that allows it: sudo ausearch -m avc"


def for_full_access(device_error: int | None, here: Surroundings) -> str:
    """Say how to trap faults of system calls too."""
    if device_error == errno.ENOENT and not here.container and here.is_older_than("6.1"):
        return _SYSCTL
    return for_device(device_error, here)


def for_device(error: int | None, here: Surroundings) -> str:
    """Say how to get the device."""
    if error in (errno.EMFILE, errno.ENFILE):
        return _EXHAUSTED[error]
    if here.is_older_than("6.1"):
        return here.needs("6.1")
    if error in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        if here.container:
            return _DOCKER
        if here.misc_minor is not None:
            # The driver is there, its file is not: no devtmpfs, or a /dev of somebody's own making.
            return f"sudo mknod -m 600 /dev/userfaultfd c 10 {here.misc_minor}"
        return "a kernel built with CONFIG_USERFAULTFD=y"
    if error == errno.EPERM and here.container:  # by the container's device rules, not by the file's mode
        return _DOCKER
    if here.container:
        return f"{_FOR_NOW}\nif that is refused, the same on the host, before the container starts"
    return f"{_FOR_NOW}\n{_UDEV}"


def for_huge_pages(setting: str | None) -> str:
    """Say how to allow transparent huge pages to programs that ask for them."""
    if setting is None:
        return "a kernel built with CONFIG_TRANSPARENT_HUGEPAGE=y"
    return "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
