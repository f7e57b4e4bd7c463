"""Accesses of memory that changes, is locked or shared, and of memory that cannot be tracked."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import userfault
from support.accesses import NAMED, tracked
from support.kernel import PAGE, available_features
from userfault.errors import OptionError, PrivilegeError, TrackError, UntrackableError
from userfault.kernel import Feature, Mapping, RegisterMode, Userfaultfd, _mman, pagemap
from userfault.kernel.pagemap import PageCategory
from userfault.track import methods, shared_array, track_accesses, track_writes

needs_scans = pytest.mark.needs_feature("WP_ASYNC")
_MEMFD = NAMED["memfd-drop"]

_OTHER = """
    import mmap, sys
    memory = mmap.mmap(int(sys.argv[1]), 0)
    from userfault.kernel import pagemap
    print(sum(memory[page * mmap.PAGESIZE + 17] for page in range(64)), flush=True)
    for line in sys.stdin:
        before = int(pagemap.present(memory).sum())
        total = sum(memory[page * mmap.PAGESIZE + 17] for page in range(64))
        memory[5 * mmap.PAGESIZE + 1] = 99
        print(before, total, flush=True)
"""


@needs_scans
def test_another_process_is_not_disturbed_and_not_seen() -> None:
    mapping = Mapping.memfd(64 * PAGE)
    fd = mapping.fd
    assert fd is not None
    array = np.frombuffer(mapping.view(), np.uint8)
    array[17::PAGE] = range(64)
    command = [sys.executable, "-c", textwrap.dedent(_OTHER), str(fd)]
    with (
        subprocess.Popen(
            command, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
        track_accesses(array) as w,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        assert int(other.stdout.readline()) == sum(range(64))
        for _ in range(3):
            assert w.ranges() == []
            array[3 * PAGE + 2] = 1
            found = w.take()
            assert found.ranges() == found.ranges(kind="written") == [(3 * PAGE, 4 * PAGE)]
            print(file=other.stdin, flush=True)
            # All of its pages are still there, and hold what they held.
            assert other.stdout.readline().split() == ["64", str(sum(range(64)))]
        assert "other processes" in w.notes()[0]
        assert array[5 * PAGE + 1] == 99
        assert w.take().ranges(kind="read_only") == [(5 * PAGE, 6 * PAGE)]
        other.stdin.close()


@needs_scans
def test_without_the_registration_one_read_brings_its_neighbours() -> None:
    """The reason for it: the kernel fills in pages around one that is read."""
    with tracked(_MEMFD) as it:
        address, length = it.array.ctypes.data, len(it.array)
        _mman.madvise(address, length, _mman.Advice.DONTNEED)
        it.read(20)
        if pagemap.scan(it.array, mask=PageCategory.PRESENT).pages == 1:
            pytest.skip("needs a kernel that maps pages around a fault")
        with it.tracker() as w:
            it.read(20)
            it.check(w, {20}, set())


@needs_scans
def test_locked_memory() -> None:
    with tracked(_MEMFD) as it, it.tracker() as w:
        try:
            _mman.mlock(it.array.ctypes.data, 16 * PAGE, on_fault=False)
        except OSError:
            pytest.skip("needs leave to lock memory (RLIMIT_MEMLOCK)")
        it.check(w.take(), set(range(16)), set())  # to lock it is to have it there
        it.read(2)
        it.write(3)
        it.check(w.take(), {2}, {3})
        it.check(w.take(), set(), set())
        w.stop()
        assert it.intact()


@needs_scans
@pytest.mark.parametrize("name", ["memfd-drop", "file-drop"])
def test_what_was_written_is_told_although_the_kernel_took_it_back(name: str) -> None:
    """Of a page that was only read nothing is left in the page table then: a limit."""
    with tracked(NAMED[name]) as it, it.tracker() as w:
        it.read(3)
        it.write(4)
        _mman.madvise(it.array.ctypes.data, len(it.array), _mman.Advice.PAGEOUT)
        assert it.units_of(w, "written") == {4}
        assert it.units_of(w.take()) in ({3, 4}, {4})
        it.read(4)
        it.write(5)
        it.check(w.take(), {4}, {5})
        w.stop()
        assert it.intact()


@needs_scans
def test_memory_that_is_mapped_anew_is_blind() -> None:
    with tracked(_MEMFD) as it, it.tracker() as w:
        flags = _mman.MapFlag.FIXED | _mman.MapFlag.PRIVATE | _mman.MapFlag.ANONYMOUS
        _mman.mmap(it.array.ctypes.data + 8 * PAGE, 4 * PAGE, 3, flags)
        it.expected[8 * PAGE : 12 * PAGE] = 0
        it.write(9)
        it.read(2)
        it.write(30)
        for _ in range(2):
            found = w.take()
            assert found.blind() == [(8 * PAGE, 12 * PAGE)]
            assert it.units_of(found, "written") - {30} == {8, 9, 10, 11}
            # It is private now: to drop it would destroy what was written.
            it.read(9, 90)
        w.stop()
        assert it.intact()


@needs_scans
def test_memory_that_is_unmapped_meanwhile() -> None:
    flags = _mman.MapFlag.SHARED | _mman.MapFlag.ANONYMOUS
    address = _mman.mmap(0, 16 * PAGE, 3, flags)
    array = np.frombuffer((ctypes.c_uint8 * (16 * PAGE)).from_address(address), np.uint8)
    with track_accesses(array) as w:
        array[0] = 1
        _mman.munmap(address + 8 * PAGE, 8 * PAGE)
        assert w.take().ranges(kind="written") == [(0, PAGE)]
        array[PAGE].item()
        assert w.take().ranges() == [(PAGE, 2 * PAGE)]
        _mman.munmap(address, 8 * PAGE)
        assert w.take().ranges() == []


def test_methods_are_found_out_by_trying() -> None:
    found = {method.name: method for method in methods()}
    assert set(found) == {"wp-async", "drop", "stash", "rwp-async", "blocks"}
    features = available_features()
    for name, feature in [
        ("wp-async", Feature.WP_ASYNC),
        ("drop", Feature.WP_ASYNC),
        ("rwp-async", Feature.RWP_ASYNC),
    ]:
        assert found[name].available == bool(features & feature)
        assert found[name].available or found[name].since in found[name].needs
    assert found["blocks"].available
    assert [name for name, method in found.items() if not method.reads] == ["wp-async"]
    assert [name for name, method in found.items() if not method.writes] == ["rwp-async"]


def test_methods_say_what_a_user_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from userfault.kernel.errors import UffdPermissionError
    from userfault.track import _methods

    def refused() -> None:
        raise UffdPermissionError("no way to a userfaultfd: ask root")

    monkeypatch.setattr(_methods, "Userfaultfd", refused)
    assert {method.needs for method in methods()} == {"no way to a userfaultfd: ask root"}
    for method in (None, "drop"):
        with pytest.raises(PrivilegeError, match="needs a userfaultfd: no way to a userfaultfd: ask root"):
            track_accesses(shared_array(100), method=method).start()


def test_an_unknown_method() -> None:
    with pytest.raises(
        OptionError, match=r"'rwp' is no method that tells reads.*drop, stash, rwp-async, blocks"
    ):
        track_accesses(np.zeros(10), method="rwp")
    with pytest.raises(OptionError, match="'wp-async' is no method that tells reads"):
        track_accesses(np.zeros(10), method="wp-async")


@needs_scans
def test_a_method_that_is_not_for_the_memory() -> None:
    private = np.zeros(4 * PAGE, np.uint8)
    with pytest.raises(
        UntrackableError, match=r"mine: the method 'drop' is for shared memory in small pages"
    ):
        track_accesses(mine=private, method="drop").start()
    with pytest.raises(UntrackableError, match="'blocks' is for paged memory: make the array with"):
        track_accesses(private, method="blocks").start()
    paged = userfault.empty(4 * PAGE, "uint8")
    with pytest.raises(UntrackableError, match="'drop' is not for paged memory"):
        track_accesses(paged, method="drop").start()


@needs_scans
def test_a_drop_destroys_nothing_of_a_private_mapping() -> None:
    for memory in (Mapping.memfd(8 * PAGE, shared=False), Mapping.anonymous(8 * PAGE)):
        array = np.frombuffer(memory.view(), np.uint8)
        array[:] = 5
        with pytest.raises(UntrackableError):
            track_accesses(array, method="drop").start()
        assert (array == 5).all()


@needs_scans
def test_memory_that_only_newer_kernels_track_says_which() -> None:
    with tracked(NAMED["private-memfd-rwp-async"]) as it:
        if available_features() & Feature.RWP_ASYNC:
            with track_accesses(page=it.array) as w:
                assert w.method() == "rwp-async"
            return
        needs = r"'rwp-async' needs Linux 7\.3 or newer"
        with pytest.raises(UntrackableError, match=rf"page: nothing here can.*{needs}.*shared_array"):
            track_accesses(page=it.array).start()


@needs_scans
def test_a_file_that_is_open_for_reading_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * PAGE))
    with path.open("rb") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8)
    with pytest.raises(UntrackableError, match=r"0: .*open for reading only.*open it for writing too"):
        track_accesses(array).start()


@needs_scans
def test_mappings_of_different_kinds() -> None:
    with tracked(_MEMFD) as it:
        flags = _mman.MapFlag.FIXED | _mman.MapFlag.PRIVATE | _mman.MapFlag.ANONYMOUS
        _mman.mmap(it.array.ctypes.data + 8 * PAGE, 4 * PAGE, 3, flags)
        if available_features() & Feature.RWP_ASYNC:
            with track_accesses(it.array) as w:
                assert w.method() == "rwp-async"  # the only one for both
        else:
            with pytest.raises(
                UntrackableError, match=r"different kinds.*track its parts one by one|nothing here can"
            ):
                track_accesses(it.array).start()
        with track_accesses(it.array[: 8 * PAGE]) as w:
            assert w.method() == "drop"


@needs_scans
def test_several_mappings_of_one_kind() -> None:
    with tracked(_MEMFD) as it:
        _mman.madvise(it.array.ctypes.data + 8 * PAGE, 4 * PAGE, _mman.Advice.DONTDUMP)
        with it.tracker() as w:
            for unit in (7, 8, 11, 12):
                it.write(unit)
            it.read(13)
            it.check(w.take(), {13}, {7, 8, 11, 12})
            it.check(w.take(), set(), set())
        assert it.intact()


@needs_scans
def test_a_tracker_of_writes_is_in_the_way_and_named() -> None:
    with tracked(_MEMFD) as it, track_writes(it=it.array) as writes:
        with pytest.raises(
            TrackError, match=r"reads, but track_writes\(it\) tracks the same memory.*'wp-async'"
        ):
            it.tracker().start()
        it.write(3)
        assert it.units_of(writes, "written") == {3}


@needs_scans
def test_another_userfaultfd_is_in_the_way() -> None:
    with tracked(_MEMFD) as it, Userfaultfd() as uffd:
        uffd.register(it.array[8 * PAGE : 12 * PAGE], mode=RegisterMode.MISSING)
        with pytest.raises(UntrackableError, match="it: another userfaultfd has registered this memory"):
            it.tracker().start()
        # Nothing stays behind of what had begun.
        found = {flags.write_protect for flags in pagemap.vm_flags(it.array)}
        assert found == {False}
        assert it.intact()


@needs_scans
def test_descriptors_are_open_only_while_something_is_tracked() -> None:
    with tracked(_MEMFD, 4000) as it:
        before = set(os.listdir("/proc/self/fd"))
        with it.tracker() as w:
            it.array[:: 2 * PAGE].max()
            w.take()
            assert set(os.listdir("/proc/self/fd")) > before
        assert set(os.listdir("/proc/self/fd")) == before
