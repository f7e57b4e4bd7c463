"""What `userfault doctor` says, here and where something is missing."""

from __future__ import annotations

import json

from support.cli import run_cli

_BROKEN = """
import errno
from userfault.kernel import _syscalls
def refuse(flags=0, path=""):
    raise OSError(errno.EPERM, "no")
_syscalls.open_by_syscall = _syscalls.open_by_device = refuse
from userfault.cli import main; main()
"""
# A process that may trap its own faults only.
_RESTRICTED = """
import errno
from userfault.kernel import _syscalls
real = _syscalls.open_by_syscall
def restricted(flags=0):
    if not flags & 1:
        raise OSError(errno.EPERM, "no")
    return real(flags)
def absent(flags=0, path=""):
    raise OSError(errno.EACCES, "no")
_syscalls.open_by_syscall, _syscalls.open_by_device = restricted, absent
from userfault.cli import main; main()
"""
_KEYS = {
    "name", "group", "memory", "since", "available", "status", "level", "negotiated", "enables", "evidence", "fix",
}  # fmt: skip


def test_json_has_every_finding() -> None:
    done = run_cli("doctor", "--json")
    values = json.loads(done.stdout)
    by_name = {finding["name"]: finding for finding in values["findings"]}
    assert {"arrays", "worker processes", "direct delivery", "userfaultfd", "missing pages", "MOVE"} <= set(
        by_name
    )
    assert done.returncode == (0 if values["usable"] else 1)
    for finding in by_name.values():
        assert set(finding) == _KEYS
        assert bool(finding["fix"]) is not finding["available"]
    assert json.loads(run_cli("doctor", "--all", "--json").stdout).keys() == values.keys()


def test_the_table_says_what_works_and_ends_with_a_verdict() -> None:
    done = run_cli("doctor")
    for text in ("since", "here", "what it is for", "missing pages", "Traps page faults of"):
        assert text in done.stdout
    works = {
        line.split()[0]: " yes " in line for line in done.stdout.splitlines() if "open(delivery=" in line
    }
    assert ("a system call on a page that is missing" in " ".join(done.stdout.split())) is works["direct"]
    for text in ("UFFDIO_WAKE", "PAGEFAULT_FLAG_WP", "private"):
        assert text not in done.stdout
    verdict = done.stdout.strip().splitlines()[-1]
    assert verdict.startswith("Arrays work here." if done.returncode == 0 else "Arrays do not work here")
    assert verdict.endswith("doctor --all")


def test_all_shows_everything() -> None:
    done = run_cli("doctor", "--all")
    for text in ("PAGEFAULT_FLAG_WP", "RWP_ASYNC", "requested", "offered", "COPY (MISSING)", "anonymous", "hugetlb",
                 "PAGEMAP_SCAN", "SOFT_DIRTY", "UFFDIO_WAKE", "process_madvise on self"):  # fmt: skip
        assert text in done.stdout
    assert max(map(len, done.stdout.split("What is missing")[0].splitlines())) <= 85
    assert done.stdout.strip().splitlines()[-1].startswith("Arrays ")


def test_without_userfaultfd_it_fails_and_says_what_to_do() -> None:
    done = run_cli("doctor", code=_BROKEN)
    assert done.returncode == 1
    assert "Traps no page faults" in done.stdout
    assert "Arrays do not work here" in done.stdout
    assert "→" in done.stdout
    assert "EPERM" in done.stdout
    assert json.loads(run_cli("doctor", "--json", code=_BROKEN).stdout)["usable"] is False


def test_with_its_own_faults_only_it_says_what_is_lost_and_how_to_gain_it() -> None:
    done = run_cli("doctor", code=_RESTRICTED)
    assert "its own only" in done.stdout
    missing = done.stdout.split("What is missing, and how to get it")[1]
    assert missing.split()[:3] == ["kernel-mode", "faults,", "device"]
    assert "EACCES" in missing
    assert "/dev/userfaultfd" in missing
