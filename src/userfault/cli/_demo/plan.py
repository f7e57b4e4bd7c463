"""What the demo reads: single elements, overlapping windows, and everything, of one array or of many."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["Piece", "lookups", "pieces", "step_size", "windows"]

# What a step reads at most and at least: worth a step, but little enough for a progress bar.
_MOST, _LEAST = 16 << 20, 64 << 10
_STEPS: Final = 50
_SEED: Final = 7


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangular piece of one array.

    Attributes:
        name: Which array, "" if there is only one.
        index: One slice or integer per leading axis.
    """

    name: str
    index: tuple[slice | int, ...]


def lookups(arrays: Mapping[str, NDArray[Any]], count: int) -> list[Piece]:
    """Choose single elements at random, each byte as likely as any other; always the same ones."""
    random = np.random.default_rng(_SEED)
    names = [name for name, array in arrays.items() if array.size]
    if not names:
        return []
    sizes = np.array([arrays[name].nbytes for name in names], np.float64)
    chosen = random.choice(len(names), size=count, p=sizes / sizes.sum())
    found = []
    for number in chosen:
        array = arrays[names[number]]
        place = np.unravel_index(int(random.integers(array.size)), array.shape) if array.shape else ()
        found.append(Piece(names[number], tuple(int(i) for i in place)))
    return found


def step_size(nbytes: int, budget: int) -> int:
    """Choose how many bytes a step reads: some dozens of steps, each well within the budget."""
    return max(_LEAST, min(_MOST, nbytes // _STEPS, budget // 4))


def pieces(arrays: Mapping[str, NDArray[Any]], step_nbytes: int, align: int = 1) -> list[Piece]:
    """Cut all arrays into contiguous pieces of about `step_nbytes`, in the order of their memory.

    Args:
        arrays: C-contiguous arrays.
        step_nbytes: Size of a piece.
        align: Pieces of the first axis begin at multiples of this, so that no chunk is cut.
    """
    return [
        Piece(name, index)
        for name, array in arrays.items()
        if array.size
        for index in _cut(array.shape, array.itemsize, align, step_nbytes)
    ]


def _cut(shape: tuple[int, ...], itemsize: int, align: int, step_nbytes: int) -> Iterator[tuple[slice, ...]]:
    if not shape:
        yield ()
        return
    row = itemsize * prod(shape[1:])
    if row > step_nbytes and len(shape) > 1:
        for i in range(shape[0]):
            for rest in _cut(shape[1:], itemsize, 1, step_nbytes):
                yield (slice(i, i + 1), *rest)
        return
    rows = max(1, step_nbytes // row)
    rows = max(align, rows - rows % align)
    for i in range(0, shape[0], rows):
        yield (slice(i, min(i + rows, shape[0])),)


def windows(arrays: Mapping[str, NDArray[Any]], step_nbytes: int, align: int = 1) -> list[Piece]:
    """Slide a window over the middle third of the largest array, by half its length each time.

    Where the array has a second axis that is long enough, the window spans only the middle third of that,
    too.
    """
    if not any(array.size for array in arrays.values()):
        return []
    name = max(arrays, key=lambda key: arrays[key].nbytes)
    array = arrays[name]
    steps = list(_cut(array.shape, array.itemsize, align, step_nbytes))
    first, last = len(steps) // 3, max(len(steps) * 2 // 3, len(steps) // 3 + 1)
    found = []
    for here, ahead in zip(steps[first:last], [*steps[first + 1 : last], None], strict=False):
        found.append(Piece(name, _joined(here, ahead) if ahead is not None else here))
    return [Piece(name, _narrowed(piece.index, array.shape)) for piece in found]


def _joined(here: tuple[slice, ...], ahead: tuple[slice, ...]) -> tuple[slice, ...]:
    """Join two pieces that follow each other along their last cut axis; else keep the first."""
    if here and here[:-1] == ahead[:-1] and here[-1].stop == ahead[-1].start:
        return (*here[:-1], slice(here[-1].start, ahead[-1].stop))
    return here


def _narrowed(index: tuple[slice | int, ...], shape: tuple[int, ...]) -> tuple[slice | int, ...]:
    if len(index) < len(shape) and shape[len(index)] >= 3:
        length = shape[len(index)]
        return (*index, slice(length // 3, length * 2 // 3))
    return index
