"""Objects as ranges of pages with a name."""

from __future__ import annotations

import array as arrays
import mmap
from typing import Any

import numpy as np
import pytest

import userfault
from support.tracking import PAGE, memory_of
from userfault.errors import RangeError, UntrackableError
from userfault.track._targets import Target, find_target, targets_of


def target_of(obj: Any) -> Target:
    (target,) = targets_of([obj], {})
    return target


def test_an_array_is_its_bytes_and_the_pages_that_hold_them() -> None:
    with memory_of("anonymous", 8) as raw:
        base = raw.ctypes.data
        whole = target_of(raw)
        assert (whole.address, whole.nbytes, whole.start, whole.end) == (
            base,
            8 * PAGE,
            base,
            base + 8 * PAGE,
        )
        assert whole.array is raw
        assert whole.memory is None
        part = target_of(raw[100 : PAGE + 1])
        assert (part.address, part.nbytes) == (base + 100, PAGE - 99)
        assert (part.start, part.end) == (base, base + 2 * PAGE)


VIEWS = {
    "upside down": (lambda a: a[::-1], 0, 64),
    "every other row": (lambda a: a[::2], 0, 56),
    "every other row, upside down": (lambda a: a[::-2], 8, 56),
    "mirrored": (lambda a: a[:, ::-1], 0, 64),
    "turned": (lambda a: a.T, 0, 64),
    "a part": (lambda a: a[2:4, 3:5], 19, 10),
    "with gaps": (lambda a: a[1::3, ::4], 8, 53),
    "without dimensions": (lambda a: a[5:6, 5:6].reshape(()), 45, 1),
    "repeated": (lambda a: np.broadcast_to(a[3], (100, 8)), 24, 8),
    "the last one": (lambda a: a[7:8, 7:8], 63, 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_bounds_of_views(name: str) -> None:
    view, first, length = VIEWS[name]
    a = np.zeros((8, 8), np.uint8)
    target = target_of(view(a))
    assert (target.address - a.ctypes.data, target.nbytes) == (first, length)


@pytest.mark.parametrize(
    ("start", "stop", "unit", "shared"),
    [
        (0, 4096, 4096, []),
        (0, 4095, 4096, [(0, 4096)]),
        (1, 4096, 4096, [(0, 4096)]),
        (10, 20, 4096, [(0, 4096)]),
        (4095, 8193, 4096, [(0, 4096), (8192, 12288)]),
        (4096, 8193, 4096, [(8192, 12288)]),
        (4096, 8192, 16384, [(0, 16384)]),
        (0, 16384, 16384, []),
    ],
)
def test_shared_pages(start: int, stop: int, unit: int, shared: list[tuple[int, int]]) -> None:
    target = Target("x", None, start, stop - start, start & ~4095, -(-stop // 4096) * 4096, None, None, None)
    assert target.shared_pages(unit) == shared


def test_paged_memories_are_shared_by_block_and_not_behind_their_end() -> None:
    nbytes = 3 * 65536 + 1000
    array = userfault.empty(nbytes, np.uint8, block="64 KiB")
    memory = userfault.memory_of(array)
    whole = target_of(array)
    assert whole.memory is memory
    assert whole.shared_pages(65536) == []
    tail = target_of(array[3 * 65536 + 10 :])
    assert tail.shared_pages(65536) == [(memory.address + 3 * 65536, memory.address + 4 * 65536)]
    assert target_of(array[65536:131072]).shared_pages(65536) == []
    assert target_of(memory).name == memory.name
    assert targets_of([], {"mine": memory})[0].name == "mine"
    del array, whole, tail


@pytest.mark.parametrize(
    "obj",
    [
        bytearray(100),
        memoryview(bytearray(100))[10:20],
        arrays.array("d", [1, 2, 3]),
        mmap.mmap(-1, PAGE),
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_buffers(obj: Any) -> None:
    target = target_of(obj)
    assert target.nbytes == memoryview(obj).nbytes
    assert target.array is None
    with pytest.raises(UntrackableError, match="contiguous"):
        target_of(memoryview(bytearray(100))[::2])


def test_objects_that_only_offer_the_array_interface() -> None:
    class Wrapper:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        @property
        def __array_interface__(self) -> dict[str, Any]:
            return self.array.__array_interface__

    array = np.zeros((10, 10))[2:5]
    target = target_of(Wrapper(array))
    assert target.address == array.ctypes.data
    assert target.nbytes == 240


def test_finding() -> None:
    a, b = np.zeros(100), np.zeros(100)
    targets = targets_of([a], {"b": b, "part": b[10:20]})
    assert [target.name for target in targets] == ["0", "b", "part"]
    assert find_target(targets, "part") is targets[2]
    assert find_target(targets, a) is targets[0]
    assert find_target(targets, b[10:20]) is targets[2], "another view of the same bytes"
    assert find_target(targets[:1], None) is targets[0]
    for which, message in (
        (None, "None is not tracked here; the objects are '0', 'b', 'part'"),
        ("a", "'a' is not tracked"),
        (np.zeros(3), "this ndarray is not tracked"),
    ):
        with pytest.raises(RangeError, match=message):
            find_target(targets, which)


def test_names_that_clash() -> None:
    with pytest.raises(RangeError, match="two objects are called '0'"):
        targets_of([bytearray(1)], {"0": bytearray(1)})
