"""The probe on this kernel, and behind doors that are closed: faked ones, a real seccomp filter, another user."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.kernel import huge_pages
from support.processes import run_python
from userfault.kernel import Access, Feature, KernelReport, Level, abi, probe
from userfault.kernel._probing.areas import UntriedError, area, filled
from userfault.kernel._probing.catalogue import SUBJECTS
from userfault.kernel._probing.examination import examine
from userfault.kernel._syscalls import open_by_device, open_by_syscall
from userfault.kernel.mapping import MemoryKind
from userfault.kernel.probe import Group, Negotiation, Status

Opener = Callable[[int], int]


@pytest.fixture(scope="module")
def report() -> KernelReport:
    return probe()


def titles(report: KernelReport) -> list[tuple[str, str]]:
    return [(finding.group, finding.title) for finding in report.findings]


# ---- what is asked


def test_everything_has_its_question() -> None:
    asked = {(subject.group, subject.name) for subject in SUBJECTS}
    assert {name for group, name in asked if group is Group.FEATURE} == {bit.name for bit in Feature}
    assert {name for group, name in asked if group is Group.PAGEMAP} == {
        *(category.name for category in abi.PageCategory),
        "WP_MATCHING",
    }
    operations = {name.partition(" ")[0] for group, name in asked if group in (Group.MEMORY, Group.CALL)}
    fixed = {"API", "REGISTER", "UNREGISTER"}  # what every other trial begins and ends with
    for operation in abi.Operation:
        assert operation.name in operations | fixed or f"UFFDIO_{operation.name}" in operations
    modes = {name.partition("(")[2].rstrip(")") for group, name in asked if group is Group.MEMORY}
    assert modes == {mode.name for mode in abi.RegisterMode}


def test_each_is_asked_once_and_each_name_is_one_line(report: KernelReport) -> None:
    assert len(set(titles(report))) == len(report.findings) == len(SUBJECTS)
    for finding in report.findings:
        assert finding.since[0].isdigit()
        assert finding.evidence
        assert finding.enables
        # What is for people to read is to fit a terminal of 80 columns beside the rest.
        assert len(finding.enables) <= 44, finding.enables
        assert len(finding.name) <= 26


def test_only_the_kernels_own_impossibilities_are_left_out() -> None:
    asked = {(subject.name, subject.memory) for subject in SUBJECTS if subject.group is Group.MEMORY}
    kinds = {kind.value for kind in MemoryKind}
    possible = {
        "COPY (MISSING)": kinds - {"file"},
        "ZEROPAGE (MISSING)": {"anonymous", "shmem", "private shmem"},
        "POISON (MISSING)": kinds - {"file"},
        "MOVE (MISSING)": {"anonymous"},
        "CONTINUE (MINOR)": kinds - {"file", "anonymous"},
        "WRITEPROTECT (WP)": kinds - {"file"},
        "WP_ASYNC (WP)": kinds,
        "RWPROTECT (RWP)": kinds - {"file"},
        "RWP_ASYNC (RWP)": kinds - {"file"},
    }
    assert asked == {(name, kind) for name, those in possible.items() for kind in those}


# ---- what is found here


def test_names_of_what_is_required(report: KernelReport) -> None:
    required = {finding.name for finding in report.findings if finding.level is Level.REQUIRED}
    assert required == {"userfaultfd", "missing pages"}
    missing = [f for f in report.findings if f.level is Level.REQUIRED and not f.available]
    assert report.usable is not bool(missing)
    assert report.usable or report.access is Access.NONE or missing


def test_a_fix_is_given_exactly_where_something_does_not_work(report: KernelReport) -> None:
    for finding in report.findings:
        assert bool(finding.fix) is (finding.status is not Status.WORKS), finding


def test_what_the_kernel_offers_works_and_what_works_is_offered(report: KernelReport) -> None:
    """The bits and the trials must agree, on every kernel; EVENT_FORK is offered to those who may not have it."""
    for bit in Feature:
        finding = report.find(str(bit.name))
        assert finding.group is Group.FEATURE
        if bit is Feature.EVENT_FORK:
            assert finding.available is report.ptrace_capability
        else:
            assert finding.available is bool(bit & report.features), finding


def test_an_operation_works_on_all_its_memory_or_on_none(report: KernelReport) -> None:
    """What this kernel can do depends on its age alone, so a hole in the table is a trial that fails."""
    works: dict[tuple[str, str], set[Status]] = {}
    for finding in report.findings:
        if finding.group is Group.MEMORY and finding.status is not Status.UNTRIED:
            works.setdefault((finding.name, finding.since), set()).add(finding.status)
    assert all(len(statuses) == 1 for statuses in works.values()), works


@pytest.mark.needs_feature("RWP")
def test_access_tracking_works_where_the_kernel_has_it(report: KernelReport) -> None:
    names = {"access tracking", "access traps", "RWP", "RWP_ASYNC", "RWPROTECT (RWP)", "RWP_ASYNC (RWP)",
             "UFFDIO_SET_MODE", "ACCESSED"}  # fmt: skip
    found = [f for f in report.findings if f.name in names and f.status is not Status.UNTRIED]
    assert {finding.name for finding in found} == names
    assert all(finding.available for finding in found)


@pytest.mark.needs_privilege("huge pages")
def test_huge_pages_are_tried_where_some_are_free(report: KernelReport) -> None:
    with huge_pages(4):
        for finding in probe().findings:
            if "hugetlb" in finding.memory:
                assert finding.available is report.find(finding.name).available, finding
                assert "huge pages are free" not in finding.evidence


def test_without_free_huge_pages_they_are_not_tried(report: KernelReport, tmp_path: Path) -> None:
    from userfault.kernel._probing.areas import _free_huge_page_size

    with pytest.raises(UntriedError, match="no pool") as caught:
        _free_huge_page_size(str(tmp_path))
    assert "CONFIG_HUGETLBFS" in caught.value.fix
    for size_kib, free, promised in ((2048, 3, 2), (1 << 20, 8, 0), (65536, 4, 0), (32768, 2, 0)):
        pool = tmp_path / f"hugepages-{size_kib}kB"
        pool.mkdir()
        (pool / "free_hugepages").write_text(f"{free}\n")
        (pool / "resv_hugepages").write_text(f"{promised}\n")
        if size_kib != 32768:
            continue
        assert _free_huge_page_size(str(tmp_path)) == 32 << 20
    for pool in tmp_path.iterdir():
        (pool / "free_hugepages").write_text("1\n")
    with pytest.raises(UntriedError, match="no two huge pages are free") as caught:
        _free_huge_page_size(str(tmp_path))
    assert "vm.nr_hugepages" in caught.value.fix


def test_findings_are_found_by_name(report: KernelReport) -> None:
    assert report.find("COPY (MISSING)", "private hugetlb").since == "4.11"
    assert report.find("MOVE").negotiated is Negotiation.OFFERED
    assert report.find("WP_ASYNC").negotiated is Negotiation.REQUESTED
    with pytest.raises(LookupError, match="no finding 'MOVE' with memory 'shmem'"):
        report.find("MOVE", "shmem")


def test_the_report_is_json(report: KernelReport) -> None:
    values = json.loads(json.dumps(report.as_dict()))
    assert values["access"] in list(Access)
    assert values["page_size"] == os.sysconf("SC_PAGE_SIZE")
    assert [f["name"] for f in values["findings"]] == [f.name for f in report.findings]
    assert all(f["available"] is (f["status"] == "works") for f in values["findings"])
    assert values["unknown_feature_bits"] == []


# ---- it leaves nothing and waits for nothing


def test_it_leaves_no_descriptor_mapping_thread_or_child_behind() -> None:
    def state() -> tuple[set[str], int, int, str]:
        with open("/proc/self/smaps", encoding="ascii") as smaps:
            registered = sum(line.startswith("VmFlags") and " um" in line for line in smaps)
        children = Path("/proc/self/task", str(os.getpid()), "children").read_text()
        return set(os.listdir("/proc/self/fd")), registered, threading.active_count(), children

    probe()  # loads what it needs
    before = state()
    probe()
    assert state() == before


def test_it_imports_neither_numpy_nor_anything_compiled_of_ours() -> None:
    code = (
        "import sys; import userfault.kernel; before = set(sys.modules); userfault.kernel.probe();"
        "print([m for m in sys.modules if m.split('.')[0] == 'numpy' or m == 'userfault._engine'])"
        "; print('userfault.kernel._probing.trials' in before)"
    )
    assert run_python(code).check().split() == ["[]", "False"]


def test_many_at_once_do_not_disturb_each_other(report: KernelReport) -> None:
    def statuses(report: KernelReport) -> list[tuple[str, Status]]:
        # Huge pages that one of them takes are not free for the others.
        return [(f.title, f.status) for f in report.findings if "hugetlb" not in f.memory]

    found: list[list[tuple[str, Status]]] = []

    def run() -> None:
        found.append(statuses(probe()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [statuses(report)] * 4


def test_messages_that_do_not_come_end_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that promises events and sends none: the trial gives up, and lets its thread go."""
    from userfault.kernel._probing import message_trials

    monkeypatch.setattr(message_trials, "_DEADLINE_S", 0.05)
    monkeypatch.setattr(message_trials.select, "poll", DeafPoll)
    report = probe()
    assert report.find("THREAD_ID").evidence == "no message came"
    assert report.find("UFFDIO_WAKE").status is Status.MISSING
    assert report.find("EVENT_REMOVE").status is Status.MISSING
    assert report.find("missing pages").available


class DeafPoll:
    """A poll that waits and hears nothing."""

    def register(self, fd: int, mask: int) -> None:
        self.fd = fd

    def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
        threading.Event().wait(timeout_ms / 1000)
        return []


def test_memory_that_a_thread_may_still_touch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from userfault.kernel._probing import areas

    kept: list[Any] = []
    monkeypatch.setattr(areas, "_abandoned", kept)
    with area(MemoryKind.ANONYMOUS) as pages:
        pages.abandoned = True
    assert kept == [pages]
    assert not pages.memory.closed
    pages.memory.close()
    with area(MemoryKind.ANONYMOUS) as pages:
        pass
    assert pages.memory.closed


@pytest.mark.parametrize("kind", ["anonymous", "shmem", "private shmem"])
def test_trial_memory_is_touched_by_the_kernel_alone(kind: str) -> None:
    with filled(MemoryKind(kind)) as pages:
        assert pages.read() == b"userfault probe."
        assert pages.memory[:16] == b"userfault probe."
        assert pages.size == mmap.PAGESIZE


# ---- closed doors, faked


def closed(number: int) -> Opener:
    def refuse(flags: int) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def without_user_mode_only(opener: Opener) -> Opener:
    def open_old(flags: int) -> int:
        if flags & abi.OpenFlag.USER_MODE_ONLY:
            raise OSError(errno.EINVAL, "no such flag")
        return opener(flags)

    return open_old


def user_mode_only(opener: Opener) -> Opener:
    def open_restricted(flags: int) -> int:
        if not flags & abi.OpenFlag.USER_MODE_ONLY:
            raise PermissionError(errno.EPERM, "no")
        return opener(flags)

    return open_restricted


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EINVAL, errno.EMFILE])
def test_without_any_userfaultfd(number: int) -> None:
    report = examine(closed(errno.ENOENT), closed(number))
    assert report.access is Access.NONE
    assert report.opened_by == ""
    assert not report.usable
    assert report.features == 0
    assert errno.errorcode[number] in report.find("userfaultfd").evidence
    assert "ENOENT" in report.find("device").evidence
    for name in ("move", "MOVE", "COPY (MISSING)", "WRITTEN", "UFFDIO_WAKE"):
        assert report.find(name).status is Status.UNTRIED
        assert report.find(name).fix == "a userfaultfd, see there"
    # What needs none was tried all the same.
    assert report.find("PRESENT").evidence != "not tried"
    assert report.find("batched eviction").evidence != "not tried"


def test_with_user_mode_faults_only() -> None:
    report = examine(closed(errno.EACCES), user_mode_only(open_by_syscall))
    assert report.access is Access.USER_MODE
    assert report.opened_by == "userfaultfd(2)"
    assert report.usable
    full = report.find("kernel-mode faults")
    assert full.status is Status.MISSING
    assert "EACCES" in full.evidence
    assert "EPERM" in full.evidence
    assert "/dev/userfaultfd" in full.fix


def test_the_system_call_alone(report: KernelReport) -> None:
    alone = examine(closed(errno.ENOENT), open_by_syscall)
    if report.ptrace_capability or report.unprivileged_userfaultfd:
        assert (alone.access, alone.opened_by) == (Access.FULL, "userfaultfd(2)")
    else:
        assert alone.access is Access.USER_MODE


@pytest.mark.needs_kernel_faults
def test_before_linux_5_11_the_trials_are_guarded_by_sigbus() -> None:
    report = examine(without_user_mode_only(open_by_device), without_user_mode_only(open_by_syscall))
    assert report.usable
    assert report.access is Access.FULL
    for name in ("missing pages", "ZEROPAGE (MISSING)", "SIGBUS", "shared memory"):
        assert report.find(name).available, report.find(name)
    # A thread that touches a page would be killed: the bits are only asked for.
    assert report.find("THREAD_ID").evidence == "granted by UFFDIO_API"


def test_resources_that_run_out_are_not_taken_for_missing_abilities() -> None:
    calls = 0

    def exhausted(flags: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.EMFILE, "too many")
        return open_by_syscall(flags)

    report = examine(closed(errno.ENOENT), user_mode_only(exhausted))
    wake = report.find("UFFDIO_WAKE")
    assert (wake.status, wake.evidence) == (Status.UNTRIED, "EMFILE: Too many open files")
    assert "ulimit -n" in wake.fix


# ---- closed doors, real ones

_FILTERED = """
import ctypes, json, struct, sys
from userfault.kernel._architecture import syscall_number

# What container engines do: a filter that answers userfaultfd(2) with EPERM (or ENOSYS), and lets all else pass.
answer = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
LD_NR, EQUAL, RETURN = 0x20, 0x15, 0x06
program = b"".join(struct.pack("=HBBI", *step) for step in (
    (LD_NR, 0, 0, 0),
    (EQUAL, 0, 1, syscall_number()),
    (RETURN, 0, 0, 0x00050000 | answer),
    (RETURN, 0, 0, 0x7FFF0000),
))
buffer = ctypes.create_string_buffer(program)
filter = struct.pack("HP", 4, ctypes.addressof(buffer))  # struct sock_fprog
assert libc.prctl(38, 1, 0, 0, 0) == 0                    # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()   # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

import errno
from userfault.kernel import _syscalls, probe
def absent(flags):
    raise FileNotFoundError(errno.ENOENT, "no device here")
if sys.argv[2] == "without device":
    _syscalls.open_by_device = absent
print(json.dumps(probe().as_dict()))
"""


def probe_filtered(number: int, device: str) -> dict[str, Any]:
    done = run_python(_FILTERED, arguments=[str(number), device])
    values: dict[str, Any] = json.loads(done.check())
    return values


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_behind_a_seccomp_filter_as_in_docker(number: int) -> None:
    values = probe_filtered(number, "without device")
    assert values["seccomp_filtered"] is True
    assert (values["access"], values["usable"]) == ("none", False)
    found = next(f for f in values["findings"] if f["name"] == "userfaultfd")
    assert errno.errorcode[number] in found["evidence"]
    assert "--security-opt seccomp=" in found["fix"]
    assert "--device /dev/userfaultfd" in found["fix"]


@pytest.mark.needs_kernel_faults
def test_the_device_goes_round_a_seccomp_filter() -> None:
    try:
        os.close(open_by_device())
    except OSError:
        pytest.skip("needs /dev/userfaultfd for this user")
    values = probe_filtered(errno.EPERM, "with device")
    assert (values["access"], values["opened_by"], values["usable"]) == ("full", "/dev/userfaultfd", True)
    works = {f["name"] for f in values["findings"] if f["available"]}
    assert {"missing pages", "COPY (MISSING)", "UFFDIO_WAKE", "THREAD_ID"} <= works


@pytest.mark.needs_privilege("becoming another user")
def test_as_a_user_without_privileges(report: KernelReport) -> None:
    """In a child that drops everything after its imports: the package may lie where that user cannot read."""
    code = """
    import json, os
    from userfault.kernel import probe
    import userfault.kernel._probing.examination
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    import ctypes
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)   # PR_SET_DUMPABLE: /proc/self is this user's, as after exec
    print(json.dumps(probe().as_dict()))
    """
    values = json.loads(run_python(code).check())
    by_title = {(f["group"], f["name"], f["memory"]): f for f in values["findings"]}
    assert values["usable"] is report.usable
    assert values["ptrace_capability"] is False
    if not report.unprivileged_userfaultfd and values["access"] != "full":
        assert values["access"] == "user mode"
        assert "EPERM" in by_title["ability", "kernel-mode faults", ""]["evidence"]
    fork = by_title["feature", "EVENT_FORK", ""]
    assert fork["status"] == "missing"
    assert "CAP_SYS_PTRACE" in fork["fix"]
    privileged = {"EVENT_FORK", "fork events", "kernel-mode faults", "device"}
    for finding in report.findings:
        # Files may be out of this user's reach; everything else works as it does for root.
        if finding.name not in {*privileged, "RWF_NOWAIT on files"} and finding.memory != "file":
            theirs = by_title[finding.group, finding.name, finding.memory]
            assert theirs["status"] == finding.status, theirs
