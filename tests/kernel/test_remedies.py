"""The words for kernels, users and containers that are not here."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from userfault.kernel._probing import facts, remedies
from userfault.kernel._probing.remedies import Surroundings

MODERN = Surroundings("6.18.44")
CONTAINER = Surroundings("6.18.44", filtered=True, container=True)


@pytest.mark.parametrize(
    ("release", "since", "lacking", "error", "expected"),
    [
        ("6.1.0-18-amd64", "6.8", "", errno.EINVAL, "Linux 6.8 or newer (this is 6.1.0-18-amd64)"),
        ("5.10", "5.14", "an architecture", errno.EINVAL, "Linux 5.14 or newer (this is 5.10)"),
        ("6.18.44", "5.14", "an architecture", errno.EINVAL, "an architecture"),
        ("7.2.9", "7.3", "CONFIG_USERFAULTFD_RWP", errno.EINVAL, "Linux 7.3 or newer (this is 7.2.9)"),
        ("7.3.0-rc7", "7.3", "CONFIG_USERFAULTFD_RWP", errno.EINVAL, "CONFIG_USERFAULTFD_RWP"),
        ("10.0", "7.3", "", None, "please report this one"),
        ("6.18.44", "6.7", "", errno.ENOENT, "/proc mounted"),
    ],
)
def test_features(release: str, since: str, lacking: str, error: int | None, expected: str) -> None:
    assert expected in remedies.for_trial("move", since, lacking, error, Surroundings(release))


def test_fork_events_need_a_capability_however_new_the_kernel() -> None:
    for name in ("EVENT_FORK", "fork events"):
        for release in ("4.10", "7.3"):
            fix = remedies.for_trial(name, "4.11", "", errno.EPERM, Surroundings(release))
            assert "CAP_SYS_PTRACE" in fix


def test_calls_that_a_filter_refuses() -> None:
    fix = remedies.for_trial("batched eviction", "6.13", "a kernel", errno.EPERM, CONTAINER)
    assert "seccomp profile" in fix
    fix = remedies.for_trial("batched eviction", "6.13", "a kernel", errno.EINVAL, CONTAINER)
    assert fix == "a kernel"


@pytest.mark.parametrize(
    ("error", "here", "expected"),
    [
        (errno.ENOSYS, MODERN, ["CONFIG_USERFAULTFD=y"]),
        (errno.ENOSYS, CONTAINER, ["seccomp", "--device /dev/userfaultfd"]),
        (errno.EPERM, CONTAINER, ["seccomp", "--device /dev/userfaultfd"]),
        (errno.EPERM, Surroundings("6.18", filtered=True), ["seccomp"]),
        (errno.EPERM, MODERN, ["SELinux"]),
        (errno.EINVAL, Surroundings("5.4"), ["vm.unprivileged_userfaultfd=1", "Linux 5.11 or newer"]),
        (errno.EMFILE, MODERN, ["ulimit -n"]),
    ],
)
def test_no_userfaultfd_at_all(error: int, here: Surroundings, expected: list[str]) -> None:
    fix = remedies.for_no_access(error, here)
    assert all(part in fix for part in expected), fix


@pytest.mark.parametrize(
    ("error", "here", "expected"),
    [
        (errno.EACCES, MODERN, ["sudo setfacl", "99-userfaultfd.rules", "udevadm trigger"]),
        (errno.EPERM, MODERN, ["sudo setfacl"]),
        (errno.EACCES, CONTAINER, ["sudo setfacl", "on the host"]),
        (errno.EPERM, CONTAINER, ["--device /dev/userfaultfd"]),
        (errno.ENOENT, CONTAINER, ["--device /dev/userfaultfd"]),
        (errno.ENOENT, MODERN, ["CONFIG_USERFAULTFD=y"]),
        (errno.ENOENT, Surroundings("6.18", misc_minor=257), ["mknod -m 600 /dev/userfaultfd c 10 257"]),
        (errno.ENXIO, Surroundings("6.18", misc_minor=257), ["mknod"]),
        (errno.ENOENT, Surroundings("5.15.0"), ["Linux 6.1 or newer (this is 5.15.0)"]),
        (errno.ENFILE, MODERN, ["fs.file-max"]),
    ],
)
def test_the_device(error: int, here: Surroundings, expected: list[str]) -> None:
    fix = remedies.for_device(error, here)
    assert all(part in fix for part in expected), fix
    if not here.is_older_than("6.1"):
        assert remedies.for_full_access(error, here) == fix


def test_full_access_before_the_device_existed() -> None:
    old = Surroundings("5.15.0")
    assert remedies.for_full_access(errno.ENOENT, old) == "sudo sysctl -w vm.unprivileged_userfaultfd=1"


def test_huge_pages() -> None:
    assert "madvise" in remedies.for_huge_pages("never")
    assert "CONFIG_TRANSPARENT_HUGEPAGE" in remedies.for_huge_pages(None)


def test_commands_are_whole_lines() -> None:
    """Each line of a remedy can be pasted, or says what to do; none is cut for a table."""
    rule = remedies.for_device(errno.EACCES, MODERN).splitlines()[1]
    assert rule.startswith(
        'echo "KERNEL==\\"userfaultfd\\", GROUP=\\"$(id -gn)\\", MODE=\\"0660\\"" | sudo tee '
    )


def test_the_device_number_is_found(tmp_path: Path) -> None:
    misc = tmp_path / "misc"
    misc.write_text("234 btrfs-control\n  7 userfaultfd2\n257 userfaultfd\n")
    assert facts.misc_minor(str(misc)) == 257
    misc.write_text("234 btrfs-control\n")
    assert facts.misc_minor(str(misc)) is None
    assert facts.misc_minor(str(tmp_path / "none")) is None
