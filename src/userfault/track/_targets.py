"""What is tracked: objects with memory, as ranges of pages with a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault.errors import RangeError, UntrackableError
from userfault.kernel._address import PAGE_MASK, span_of
from userfault.kernel.errors import UsageError
from userfault.kernel.mapping import Mapping as KernelMapping
from userfault.memory import PagedMemory, find

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

__all__ = ["Target", "find_target", "targets_of"]


@dataclass(frozen=True, eq=False)
class Target:
    """One object that is tracked.

    Attributes:
        name: What reports call it.
        obj: The object itself, kept alive.
        address: Its first byte; of an array with gaps between its elements, the lowest.
        nbytes: Bytes from there to behind its last one.
        start: Address of the first page that it has a byte in.
        end: Address behind the last.
        array: It as an array without copying, None if it is no array.
        memory: The paged memory that it lies in, None for all other memory.
        keep: What else must live as long.
    """

    name: str
    obj: Any
    address: int
    nbytes: int
    start: int
    end: int
    array: NDArray[Any] | None
    memory: PagedMemory | None
    keep: object = field(repr=False)

    def shared_pages(self, unit: int) -> list[tuple[int, int]]:
        """Return the first and the last page, as far as they hold bytes that are not the object's: (start, end).

        Args:
            unit: Size of the pages; those of a paged memory are its blocks, which end where it does.
        """
        origin, limit = 0, None
        if self.memory is not None:
            origin, limit = self.memory.address, self.memory.address + self.memory.nbytes
        stop = self.address + self.nbytes
        first = origin + (self.address - origin) // unit * unit
        last = origin + (stop - 1 - origin) // unit * unit
        pages = [(first, first + unit)] if self.address != first else []
        if stop not in (last + unit, limit) and (last, last + unit) not in pages:
            pages.append((last, last + unit))
        return pages


def _array_of(obj: Any) -> NDArray[Any] | None:
    if isinstance(obj, np.ndarray):
        return obj
    # PyTorch: a CPU tensor shares its memory; `detach` because one that has a gradient refuses otherwise.
    if hasattr(obj, "data_ptr") and hasattr(obj, "detach"):
        try:
            return np.asarray(obj.detach().numpy())
        except (RuntimeError, TypeError) as error:
            raise UntrackableError(
                f"this tensor has no memory of this process to track ({error}): give one on the CPU"
            ) from None
    if hasattr(obj, "__array_interface__"):
        shared = np.asarray(obj)
        if shared.__array_interface__["data"][0] == obj.__array_interface__["data"][0]:
            return shared
    return None


def _target(obj: Any, name: str) -> Target:
    if isinstance(obj, PagedMemory):
        address, nbytes = obj.address, obj.nbytes
        return Target(
            obj.name if name.isdigit() else name,
            obj,
            address,
            nbytes,
            address,
            _up(address + nbytes),
            None,
            obj,
            obj,
        )
    array = _array_of(obj)
    if array is not None:
        if array.dtype.hasobject:
            raise UntrackableError(
                f"{name}: an array of Python objects holds pointers only; what they point to lies elsewhere"
            )
        low, high = _bounds(array)
        keep: object = array
    else:
        try:
            low, length, keep = span_of(obj)
        except UsageError as error:
            raise UntrackableError(
                f"{name}: {error}; what can be tracked are arrays, CPU tensors, and objects with the buffer protocol"
            ) from None
        if isinstance(obj, KernelMapping):
            keep = obj.view()  # so that it cannot be closed meanwhile
        high = low + length
    if high <= low:
        raise UntrackableError(f"{name} has no bytes: there is nothing to track")
    return Target(name, obj, low, high - low, low & ~PAGE_MASK, _up(high), array, find(low), keep)


def _bounds(array: NDArray[Any]) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one behind the last."""
    if not array.size:
        return 0, 0
    first: int = array.__array_interface__["data"][0]
    reach = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    return first + sum(r for r in reach if r < 0), first + sum(r for r in reach if r > 0) + array.itemsize


def _up(address: int) -> int:
    return (address + PAGE_MASK) & ~PAGE_MASK


def targets_of(objects: Iterable[Any], named: Mapping[str, Any]) -> list[Target]:
    """Return the targets of objects, which are called by their place ("0", "1", ...), and of named ones.

    Raises:
        UntrackableError: An object has no memory that can be looked at.
        RangeError: There are none, or two have one name.
    """
    pairs = [(str(number), obj) for number, obj in enumerate(objects)] + list(named.items())
    if not pairs:
        raise RangeError("give at least one object to track: an array, a buffer, a PagedMemory")
    targets = [_target(obj, name) for name, obj in pairs]
    names = [target.name for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise RangeError(
                f"two objects are called {name!r}: name them, as in track_writes(left=a, right=b)"
            )
    return targets


def find_target(targets: Iterable[Target], which: Any) -> Target:
    """Return the target that `which` means: a name, the object itself, or another view of the same bytes.

    Raises:
        RangeError: None of them.
    """
    targets = list(targets)
    if which is None and len(targets) == 1:
        return targets[0]
    if isinstance(which, str):
        for target in targets:
            if target.name == which:
                return target
    elif which is not None:
        for target in targets:
            if target.obj is which:
                return target
        wanted = _target(which, "it")
        for target in targets:
            if (target.address, target.nbytes) == (wanted.address, wanted.nbytes):
                return target
    known = ", ".join(repr(target.name) for target in targets)
    what = repr(which) if isinstance(which, str) or which is None else f"this {type(which).__name__}"
    raise RangeError(f"{what} is not tracked here; the objects are {known}")
