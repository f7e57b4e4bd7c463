"""What tracking writes does not see, or sees coarsely: as documented in docs/tracking.md, and said in the notes."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import pytest

from support.kernel import HUGE, Area, huge_pages, in_child
from support.kernel_facts import mapped_huge, swap_out
from support.kernel_scenarios import huge_area
from support.machine import KSM, merging
from support.ring import READ_FIXED, Ring, needs_io_uring
from support.tracking import PAGE, memory_of, pages, poke
from support.waiting import wait_until
from userfault.errors import ExportedError, PrivilegeError, UntrackableError
from userfault.kernel import Feature, Mapping, RegisterMode, Userfaultfd, pagemap
from userfault.kernel.errors import FeatureError, UffdPermissionError
from userfault.kernel.mapping import Advice, MemoryKind
from userfault.track import shared_array, track_writes

pytestmark = pytest.mark.needs_feature("WP_ASYNC")


# --- pages of other sizes -------------------------------------------------------------------------------------


def test_transparent_huge_pages_are_cut_where_they_are_written() -> None:
    with huge_area(4) as area:
        array = np.frombuffer(area.memory.view(), np.uint8)
        array[:] = 1
        if not mapped_huge(area.start):
            pytest.skip("needs transparent huge pages")
        with track_writes(array) as w:
            assert w.ranges() == []
            assert mapped_huge(area.start), "to arm and to look cuts nothing"
            array[5 * PAGE] = 2
            array[2 * HUGE + 7 * PAGE] = 2
            assert w.granularity() == PAGE
            assert pages(w.take().ranges()) == [5, 2 * HUGE // PAGE + 7]
            array[0] = 2
            array[HUGE] = 2
            assert pages(w.take().ranges()) == [0, HUGE // PAGE]
        # One that only a part is tracked of is cut at once; the rest of it does not count.
        array2 = array[3 * HUGE + 9 * PAGE :]
        with track_writes(array2) as w:
            array[3 * HUGE] = 3
            array2[PAGE] = 3
        assert pages(w.ranges()) == [1]
        del array, array2, w


@pytest.mark.parametrize("shared", [True, False])
def test_huge_pages_are_told_as_a_whole(shared: bool) -> None:
    with huge_pages(8), Mapping.memfd(4 * HUGE, shared=shared, huge_page_size=HUGE) as memory:
        array = np.frombuffer(memory.view(), np.uint8)
        with track_writes(all=array, part=array[HUGE + PAGE : HUGE + 3 * PAGE]) as w:
            assert w.granularity("all") == w.granularity("part") == HUGE
            array[HUGE + 100 * PAGE] = 1
            assert w.ranges("all") == [(HUGE, 2 * HUGE)]
            assert w.ranges("part") == w.shared("part") == [(0, 2 * PAGE)]
            assert w.shared("all") == []
            assert w.mask("all").tolist() == [False, True, False, False]
            assert w.take().mask("part").tolist() == [True]
            array[:] = 0
            assert w.take().nbytes["all"] == 4 * HUGE
            assert w.nbytes == {"all": 0, "part": 0}
        with track_writes(array[100:200]) as w:
            array[PAGE] = 1
        assert w.ranges() == w.shared() == [(0, 100)]
        del array, w


def test_huge_shared_array() -> None:
    with huge_pages(2):
        array = shared_array(1000, "u1", huge=True, name="test huge")
        with track_writes(array) as w:
            array[999] = 1
        assert w.granularity() == HUGE
        assert w.ranges() == [(0, 1000)]
        assert w.mask().tolist() == [True]
        del array, w


# --- what comes and goes --------------------------------------------------------------------------------------


def test_pages_in_swap_keep_what_is_known_of_them() -> None:
    with Mapping.anonymous(8 * PAGE) as memory:
        array = np.frombuffer(memory.view(), np.uint8)
        array[:] = 1
        with track_writes(array) as w:
            array[3 * PAGE] = 2
            swap_out(Area(MemoryKind.ANONYMOUS, memory, 8))
            assert pages(w.ranges()) == [3]
            assert array.sum() == 8 * PAGE + 1
            array[5 * PAGE] = 2
            assert pages(w.take().ranges()) == [3, 5]
        del array, w


def test_merged_pages_pass_for_written_and_a_note_says_so() -> None:
    with merging(), Mapping.anonymous(2 * PAGE) as memory:
        array = np.frombuffer(memory.view(), np.uint8)
        array[:PAGE] = np.frombuffer(os.urandom(PAGE), np.uint8)
        array[PAGE:] = array[:PAGE]
        with track_writes(array) as w:
            assert w.notes() == ()
            memory.madvise(Advice.MERGEABLE)

            def merged() -> bool:
                (KSM / "run").write_text("1")
                frames = [int(number) & ((1 << 55) - 1) for number in pagemap.entries(memory)]
                return frames[0] == frames[1]

            wait_until(merged, "the pages are merged")
            assert pages(w.ranges()) != []
        assert "KSM" in " ".join(w.notes()), "found when it ended"
        with track_writes(array) as again:
            assert "KSM" in " ".join(again.notes()), "and when it began"
        memory.madvise(Advice.UNMERGEABLE)
        del array, w, again


def test_writes_through_a_pin_are_not_seen_and_a_note_says_that_there_are_pins() -> None:
    needs_io_uring()

    def run() -> tuple[int, list[int], str, str]:
        with Mapping.anonymous(8 * PAGE) as memory, Mapping.memfd(PAGE) as file, Ring() as ring:
            array = np.frombuffer(memory.view(), np.uint8)
            array[:] = 1
            assert file.fd is not None
            file.write(0, b"past the tracking")
            with track_writes(array) as w:
                before = " ".join(w.notes())
                ring.register(memory.address + 2 * PAGE, PAGE)  # this is seen: pinning for writing is a write
                w.take()
                done = ring.submit(READ_FIXED, file.fd, memory.address + 2 * PAGE, 17)
                found = pages(w.ranges())
            after = " ".join(w.notes())
            assert bytes(array[2 * PAGE : 2 * PAGE + 17]) == b"past the tracking"
            del array, w
            return done, found, before, after

    done, found, before, after = in_child(run)
    assert (done, found) == (17, [])
    assert "pinned" not in before
    assert "pinned" in after


# --- shared memory --------------------------------------------------------------------------------------------


def test_other_ways_to_the_same_file_are_not_seen_and_a_note_says_so() -> None:
    with Mapping.memfd(8 * PAGE) as memory, memory.alias() as second:
        array = np.frombuffer(memory.view(), np.uint8)
        with track_writes(array) as w:
            second.write(PAGE, b"another mapping")
            assert memory.fd is not None
            os.pwrite(memory.fd, b"the file", 2 * PAGE)

            def child() -> None:
                second.write(3 * PAGE, b"another process")

            in_child(child)
            array[5 * PAGE] = 1
            assert bytes(array[PAGE : PAGE + 7]) == b"another"
            assert pages(w.ranges()) == [5]
            assert any(note.startswith("shared memory") for note in w.notes())
        del array, w


def test_private_memory_has_no_notes() -> None:
    with memory_of("private memfd", 2) as array, track_writes(array) as w:
        assert w.notes() == ()


# --- memory that is not ours any more -------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _map_anew(start: int, length: int) -> None:
    fixed, anonymous = 0x10, 0x20
    flags = mmap.MAP_PRIVATE | fixed | anonymous
    assert _libc.mmap(start, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == start


@pytest.mark.parametrize("ask", ["peek", "take"])
def test_what_was_mapped_anew_is_blind(ask: str) -> None:
    with memory_of("anonymous", 16) as array, track_writes(array) as w:
        array[PAGE] = 1
        _map_anew(array.ctypes.data + 4 * PAGE, 2 * PAGE)
        array[9 * PAGE] = 1
        found = getattr(w, ask)()
        assert found.blind() == [(4 * PAGE, 6 * PAGE)]
        assert pages(found.ranges()) == [1, 4, 5, 9]
        assert pages(w.take().ranges()) == ([1, 4, 5, 9] if ask == "peek" else [4, 5])


def test_what_another_has_registered_since_is_blind() -> None:
    with memory_of("anonymous", 8) as array, Userfaultfd(Feature.WP_ASYNC) as other:
        with track_writes(array) as w:
            _map_anew(array.ctypes.data + 4 * PAGE, 2 * PAGE)
            other.register(array.ctypes.data + 4 * PAGE, 2 * PAGE, mode=RegisterMode.MISSING)
            array[PAGE] = 1
            found = w.take()
            assert found.blind() == [(4 * PAGE, 6 * PAGE)]
            assert pages(found.ranges()) == [1, 4, 5]
        (there,) = pagemap.vm_flags(array.ctypes.data + 4 * PAGE)
        assert there.missing, "what is another's stays"


def test_memory_that_is_gone_is_no_error() -> None:
    def run() -> list[int]:
        with memory_of("anonymous", 64) as array:
            array[:] = 1
            with track_writes(array) as w:
                array[PAGE] = 1
                assert _libc.munmap(array.ctypes.data + 8 * PAGE, 8 * PAGE) == 0
                return pages(w.take().ranges())

    assert in_child(run) == [1]


def test_a_mapping_cannot_be_closed_while_it_is_tracked() -> None:
    with Mapping.anonymous(4 * PAGE) as memory:
        with track_writes(memory) as w:
            memory.write(PAGE, b"x")
            with pytest.raises(ExportedError):
                memory.close()
        assert w.ranges() == [(PAGE, 2 * PAGE)]
        del w


@pytest.mark.parametrize("where", [0, 5])
def test_memory_that_another_userfaultfd_has(where: int) -> None:
    with memory_of("anonymous", 8) as array, Userfaultfd() as other, memory_of("anonymous", 2) as free:
        other.register(array.ctypes.data + where * PAGE, PAGE)
        with pytest.raises(UntrackableError, match=r"^mine: another userfaultfd .* unregister it"):
            track_writes(free=free, mine=array).start()
        assert [v.write_protect for v in pagemap.vm_flags(free.ctypes.data)] == [False]
        other.unregister(array.ctypes.data + where * PAGE, PAGE)
        with track_writes(array) as w:
            poke(array, where * PAGE)
        assert pages(w.ranges()) == [where]


def test_memory_that_no_kernel_tracks() -> None:
    # MAP_DROPPABLE, Linux 6.11: userfaultfd takes no such mapping.
    try:
        memory = Mapping.anonymous(4 * PAGE, flags=0x08)
    except ValueError:
        pytest.skip("needs MAP_DROPPABLE (Linux 6.11)")
    with memory, pytest.raises(UntrackableError, match=r"^secret: .*copy it to ordinary memory"):
        track_writes(secret=memory).start()


# --- kernels and privileges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (
            FeatureError("no", missing=Feature.WP_ASYNC, available=Feature(0)),
            UntrackableError,
            r"^a: this needs Linux 6\.7 .*WP_ASYNC",
        ),
        (UffdPermissionError("not allowed", errno=1), PrivilegeError, "not allowed"),
    ],
)
def test_what_the_kernel_or_the_privileges_lack(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception], message: str
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr("userfault.track._registering.Userfaultfd", refuse)
    with pytest.raises(error, match=message):
        track_writes(a=np.zeros(10)).start()
