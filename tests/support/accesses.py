"""Memory of every kind with every method that tells its reads, and ways to read and write it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import userfault
from support.kernel import HUGE, PAGE, huge_pages
from userfault.kernel import Mapping
from userfault.track import AccessTracker, Touched, WriteTracker, shared_array, track_accesses

__all__ = [
    "CASES",
    "DROPPED",
    "EMPTIED",
    "NAMED",
    "Case",
    "Tracked",
    "copy",
    "read_file_into",
    "tracked",
    "write_to_file",
]


@dataclass(frozen=True)
class Case:
    """A kind of memory and a method; `name` is what pytest shows."""

    memory: str
    method: str
    marks: tuple[pytest.MarkDecorator, ...]

    @property
    def name(self) -> str:
        return f"{self.memory}-{self.method}"


_SCANS = (pytest.mark.needs_feature("WP_ASYNC"),)
_MOVES = (pytest.mark.needs_feature("MOVE"), pytest.mark.needs_kernel_faults)
_NOTES = (pytest.mark.needs_feature("RWP", "RWP_ASYNC"),)
_ALL = [
    *(Case(memory, "drop", _SCANS) for memory in ("memfd", "shared-mmap", "dev-shm", "file", "shared-array")),
    Case("anonymous", "stash", _MOVES),
    Case("numpy", "stash", _MOVES),
    *(Case(memory, "rwp-async", _NOTES) for memory in ("anonymous", "memfd", "hugetlb", "private-memfd")),
    Case("paged", "blocks", ()),
]
CASES = [pytest.param(case, id=case.name, marks=case.marks) for case in _ALL]
NAMED = {case.name: case for case in _ALL}
DROPPED = [param for param in CASES if "drop" in str(param.id)]
# Those where pages can be taken away altogether, without a handler.
EMPTIED = [
    param
    for param in CASES
    if str(param.id).startswith(("anonymous", "memfd", "private-memfd", "shared-array"))
]


@dataclass
class Tracked:
    """Memory in units that are told apart, each filled with bytes of its own.

    Attributes:
        array: Its bytes.
        unit: Bytes that are told apart.
        method: How it is to be tracked.
        expected: What it holds, kept up by `write`.
    """

    array: NDArray[np.uint8]
    unit: int
    method: str
    expected: NDArray[np.uint8]

    @property
    def units(self) -> int:
        return len(self.array) // self.unit

    @property
    def tells_writes(self) -> bool:
        return self.method != "rwp-async"

    def tracker(self, **named: Any) -> AccessTracker:
        """A tracker of it by its method."""
        return track_accesses(**(named or {"it": self.array}), method=self.method)

    def read(self, index: int, offset: int = 17) -> None:
        at = index * self.unit + offset
        assert self.array[at] == self.expected[at]

    def write(self, index: int, value: int = 201, offset: int = 90) -> None:
        at = index * self.unit + offset
        self.array[at] = self.expected[at] = value

    def intact(self) -> bool:
        """Whether it holds what was written to it: reads all of it."""
        return bool((self.array == self.expected).all())

    def units_of(self, found: AccessTracker | WriteTracker | Touched, kind: Any = "accessed") -> set[int]:
        """The numbers of the units that were touched; the mask and the ranges must agree."""
        mask = set(np.flatnonzero(found.mask("it", kind)).tolist())
        ranges = {
            number
            for start, stop in found.ranges("it", kind)
            for number in range(start // self.unit, -(-stop // self.unit))
        }
        assert mask == ranges
        return mask

    def check(self, found: AccessTracker | WriteTracker | Touched, read: set[int], written: set[int]) -> None:
        """Compare with the truth, whatever the method tells."""
        blind = self._blind(found)
        assert self.units_of(found) - blind == (read | written) - blind, found.blind("it")
        if self.tells_writes:
            assert self.units_of(found, "written") - blind == written - blind, found.blind("it")
            assert self.units_of(found, "read_only") - blind == (read - written) - blind, found.blind("it")

    def _blind(self, found: AccessTracker | WriteTracker | Touched) -> set[int]:
        """Units that could not be taken away just then: somebody else in the kernel had them (reclaim, migration)."""
        if self.method != "stash":
            return set()
        blind = {
            number
            for start, stop in found.blind("it")
            for number in range(start // self.unit, -(-stop // self.unit))
        }
        assert len(blind) <= self.units // 8, blind
        return blind


@contextlib.contextmanager
def tracked(case: Case, units: int = 64) -> Iterator[Tracked]:
    """Make memory of a case, all of it there and filled."""
    with contextlib.ExitStack() as stack:
        unit = {"hugetlb": HUGE, "paged": 16 * PAGE}.get(case.memory, PAGE)
        if case.memory == "hugetlb":
            units = min(units, 8)
        array = _MAKERS[case.memory](stack, units * unit)
        rng = np.random.default_rng(units)
        array[:] = rng.integers(0, 200, len(array), np.uint8)
        it = Tracked(array, unit, case.method, array.copy())
        del array
        try:
            yield it
        finally:
            it.array = np.empty(0, np.uint8)  # the memory goes with the last view of it


def _mapped(mapping: Mapping) -> NDArray[np.uint8]:
    return np.frombuffer(mapping.view(), np.uint8)


def _anonymous(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    return _mapped(Mapping.anonymous(nbytes))


def _memfd(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    return _mapped(Mapping.memfd(nbytes))


def _private_memfd(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    return _mapped(Mapping.memfd(nbytes, shared=False))


def _hugetlb(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    stack.enter_context(huge_pages(nbytes // HUGE))
    return _mapped(Mapping.memfd(nbytes, huge_page_size=HUGE))


def _shared_mmap(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def _file(folder: str | None) -> Callable[[contextlib.ExitStack, int], NDArray[np.uint8]]:
    def make(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.truncate(nbytes)
            return np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)

    return make


def _numpy(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    whole = np.zeros(nbytes + PAGE, np.uint8)
    skip = -whole.ctypes.data % PAGE
    return whole[skip : skip + nbytes]


def _shared_array(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    return shared_array(nbytes, "uint8")


def _paged(stack: contextlib.ExitStack, nbytes: int) -> NDArray[np.uint8]:
    return np.asarray(userfault.empty(nbytes, "uint8", block=16 * PAGE))


_MAKERS: dict[str, Callable[[contextlib.ExitStack, int], NDArray[np.uint8]]] = {
    "anonymous": _anonymous,
    "memfd": _memfd,
    "private-memfd": _private_memfd,
    "hugetlb": _hugetlb,
    "shared-mmap": _shared_mmap,
    "dev-shm": _file("/dev/shm"),
    "file": _file(None),
    "numpy": _numpy,
    "shared-array": _shared_array,
    "paged": _paged,
}


def copy(target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
    """memcpy, without the GIL."""
    ctypes.memmove(target.ctypes.data, source.ctypes.data, len(target))


def read_file_into(array: NDArray[np.uint8], data: bytes) -> None:
    """read(2): the kernel writes the array."""
    reader, writer = os.pipe()
    try:
        assert os.write(writer, data) == len(data)
        assert os.readv(reader, [array.data]) == len(data)
    finally:
        os.close(reader)
        os.close(writer)


def write_to_file(array: NDArray[np.uint8]) -> bytes:
    """write(2): the kernel reads the array."""
    with tempfile.TemporaryFile(buffering=0) as file:
        assert file.write(array.data) == len(array)
        return os.pread(file.fileno(), len(array), 0)
