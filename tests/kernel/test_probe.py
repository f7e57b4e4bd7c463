"""The probe on this kernel, and its words for kernels and containers that are not here."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from userfault.kernel import Access, Level, _facts, _remedies, abi, probe
from userfault.kernel.probe import KernelReport

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def report() -> KernelReport:
    return probe()


def _finding_names(report: KernelReport) -> list[str]:
    return [finding.name for finding in report.findings]


def test_names_are_unique_and_the_required_ones_are_there(report: KernelReport) -> None:
    names = _finding_names(report)
    assert len(names) == len(set(names))
    required = {finding.name for finding in report.findings if finding.level is Level.REQUIRED}
    assert required == {"userfaultfd", "missing pages"}


def test_a_fix_is_given_exactly_where_something_is_missing(report: KernelReport) -> None:
    for finding in report.findings:
        assert bool(finding.fix) is not finding.available, finding
        assert finding.enables
        assert finding.evidence
        assert finding.since[0].isdigit()


def test_usable_follows_from_the_required_findings(report: KernelReport) -> None:
    missing = [f for f in report.findings if f.level is Level.REQUIRED and not f.available]
    assert report.usable is not bool(missing)
    assert report.usable or report.access is Access.NONE or missing


def test_what_worked_was_offered(report: KernelReport) -> None:
    bits = {"poison": abi.Feature.POISON, "move": abi.Feature.MOVE, "write tracking": abi.Feature.WP_ASYNC,
            "access tracking": abi.Feature.RWP_ASYNC, "sigbus delivery": abi.Feature.SIGBUS}  # fmt: skip
    for finding in report.findings:
        if finding.available and finding.name in bits:
            assert bits[finding.name] in report.features


def test_the_report_is_json(report: KernelReport) -> None:
    values = json.loads(json.dumps(report.as_dict()))
    assert values["access"] in list(Access)
    assert values["page_size"] == os.sysconf("SC_PAGE_SIZE")
    assert [f["name"] for f in values["findings"]] == _finding_names(report)


def test_it_leaves_no_descriptor_and_no_mapping_behind() -> None:
    def state() -> tuple[set[str], int]:
        with open("/proc/self/smaps", encoding="ascii") as smaps:
            registered = sum(line.startswith("VmFlags") and " um" in line for line in smaps)
        return set(os.listdir("/proc/self/fd")), registered

    before = state()
    probe()
    assert state() == before


def test_it_imports_neither_numpy_nor_anything_compiled_of_ours() -> None:
    code = (
        "import sys; import userfault.kernel; userfault.kernel.probe();"
        "bad = [m for m in sys.modules if m.split('.')[0] == 'numpy' or m == 'userfault._engine'];"
        "print(bad)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_without_any_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(flags: int = 0, path: str = "") -> int:
        raise OSError(errno.EPERM, "no")

    module = sys.modules["userfault.kernel.probe"]
    monkeypatch.setattr(module, "open_by_syscall", refuse)
    monkeypatch.setattr(module, "open_by_device", refuse)
    report = probe()
    assert report.access is Access.NONE
    assert not report.usable
    assert report.features == 0
    by_name = {finding.name: finding for finding in report.findings}
    assert "EPERM" in by_name["userfaultfd"].evidence
    assert by_name["move"].fix == "a userfaultfd, see above"


def test_before_linux_5_11_the_trials_are_guarded_by_sigbus(
    monkeypatch: pytest.MonkeyPatch, report: KernelReport
) -> None:
    if report.access is not Access.FULL:
        pytest.skip(
            "a kernel without USER_MODE_ONLY is played with a full userfaultfd, which this user may not have"
        )
    module = sys.modules["userfault.kernel.probe"]

    def old(opener_name: str) -> None:
        real = getattr(module, opener_name)

        def opener(flags: int) -> int:
            if flags & abi.OpenFlag.USER_MODE_ONLY:
                raise OSError(errno.EINVAL, "no such flag")
            return int(real(flags))

        monkeypatch.setattr(module, opener_name, opener)

    old("open_by_syscall")
    old("open_by_device")
    seen = probe()
    assert seen.usable
    assert {f.name for f in seen.findings if f.available} >= {
        "missing pages",
        "zero pages",
        "sigbus delivery",
    }


@pytest.mark.parametrize(
    ("release", "name", "since", "error", "expected"),
    [
        ("6.1.0-18-amd64", "move", "6.8", errno.EINVAL, "Linux 6.8 or newer (this is 6.1.0-18-amd64)"),
        ("5.10", "shared memory, minor", "5.14", errno.EINVAL, "Linux 5.14 or newer (this is 5.10)"),
        ("6.18.44", "shared memory, minor", "5.14", errno.EINVAL, "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR"),
        ("7.3", "access tracking", "7.3", errno.EINVAL, "CONFIG_USERFAULTFD_RWP"),
        ("6.18.44", "fork events", "4.11", errno.EPERM, "CAP_SYS_PTRACE"),
    ],
)
def test_remedies_for_features(release: str, name: str, since: str, error: int, expected: str) -> None:
    assert expected in _remedies.for_feature(name, since, release, error)


def test_remedies_for_access() -> None:
    sysctl = "sudo sysctl -w vm.unprivileged_userfaultfd=1"
    assert _remedies.for_full_access(device_error=errno.EACCES, filtered=False, container=False) == sysctl
    in_docker = _remedies.for_full_access(device_error=errno.ENOENT, filtered=True, container=True)
    assert "--device /dev/userfaultfd" in in_docker
    assert "chmod" in _remedies.for_full_access(device_error=errno.EACCES, filtered=True, container=True)
    assert "CONFIG_USERFAULTFD" in _remedies.for_no_access(errno.ENOSYS, filtered=False, container=False)
    assert "seccomp" in _remedies.for_no_access(errno.ENOSYS, filtered=True, container=True)
    assert "6.1 or newer" in _remedies.for_device(errno.ENOENT, "5.15.0", container=False)
    assert "madvise" in _remedies.for_huge_pages("never")


def _groups(tmp_path: Path, membership: str, files: dict[str, str]) -> int | None:
    (tmp_path / "cgroup").write_text(membership)
    for name, value in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value)
    return _facts.memory_limit(str(tmp_path / "fs"), str(tmp_path / "cgroup"))


def test_memory_limit_is_the_smallest_of_all_ancestors(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "max\n", "a/memory.max": "1073741824\n", "memory.max": "4294967296\n"}
    assert _groups(tmp_path, "0::/a/b\n", files) == 1 << 30


def test_memory_limit_in_a_container_is_the_roots(tmp_path: Path) -> None:
    assert _groups(tmp_path, "0::/system.slice/docker-1\n", {"memory.max": "536870912\n"}) == 512 << 20


def test_memory_limit_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/x/memory.limit_in_bytes": "268435456\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert _groups(tmp_path, "4:memory:/x\n1:name=systemd:/\n", files) == 256 << 20


def test_no_memory_limit(tmp_path: Path) -> None:
    assert _groups(tmp_path, "0::/\n", {"memory.max": "max\n"}) is None
