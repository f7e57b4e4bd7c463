"""What `open()` was asked, checked; and what it found."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np

from userfault._blocks import block_size
from userfault.errors import FormatError, ModeError
from userfault.memory import Delivery, Mode
from userfault.sizes import parse_size
from userfault.sources._abc import Order, Recipe
from userfault.sources._dtypes import dtype_to_text
from userfault.sources._layout import ArrayLayout, raw_layout
from userfault.sources._location import Client
from userfault.sources._native import FileData, MemoryData
from userfault.sources._remote_file import RawOptions
from userfault.sources._safetensors import TensorTable
from userfault.sources._worker_data import WorkerData

__all__ = ["Format", "Request", "Target", "check_delivery", "check_format", "check_mode", "check_sizes"]

Format = Literal["npy", "safetensors", "raw", "zarr"]
_FORMATS = ("npy", "safetensors", "raw", "zarr")
_MODES: tuple[Mode, ...] = ("r", "r+", "c", "w+")


@dataclass(frozen=True)
class Request:
    """The arguments of `open()` that say what to read.

    Attributes:
        dtype: Type of raw elements.
        shape: Shape of a raw array.
        offset: First byte of a raw array.
        order: Order of the memory.
        format: What the file is.
        storage_options: For the library that reads a URL.
        client: That library.
        stack: Closed when the memory is made: what is needed no longer than that.
        mode: What will be done with it; `"w+"` means that it was created a moment ago.
    """

    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None
    offset: int
    order: Order | None
    format: Format | None
    storage_options: Mapping[str, Any] | None
    client: Client | None
    stack: contextlib.ExitStack
    mode: Mode = "r"

    @property
    def writes_back(self) -> bool:
        """Whether changes are to go back to the source."""
        return self.mode in ("r+", "w+")

    def refuse_write(self, what: str, why: str) -> None:
        """Check that nobody wants to write `what` back, which cannot be.

        Raises:
            ModeError: Somebody does.
        """
        if self.writes_back:
            raise ModeError(
                f"mode {self.mode!r}: {what} {why}. Mode 'c' keeps changes private to this process"
            )

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return `recipe` for this mode. What it makes in the worker tells whether it can be written."""
        known: Any = recipe
        if self.writes_back and any(field.name == "mode" for field in dataclasses.fields(known)):
            known = dataclasses.replace(known, mode="r+")
        return known  # type: ignore[no-any-return]

    def refuse_raw(self, what: str) -> None:
        """Check that nothing was said of raw bytes about `what`, which speaks for itself.

        Raises:
            FormatError: Something was.
        """
        given = [
            f"{name}="
            for name, value in (("dtype", self.dtype), ("shape", self.shape), ("offset", self.offset or None))
            if value is not None
        ]
        if given:
            raise FormatError(f"{what} says its dtype, shape and place itself: leave {', '.join(given)} out")

    def refuse_order(self, what: str, order: Order) -> None:
        """Check that no other order was asked for than the one that `what` has.

        Raises:
            FormatError: One was.
        """
        if self.order not in (None, order):
            raise FormatError(f"{what} is in order {order!r}; order={self.order!r} is not its own")

    def raw_layout(self, available: int, name: str) -> ArrayLayout:
        """Return where a raw array lies among `available` bytes; see `sources._layout.raw_layout`."""
        dtype: np.dtype[Any] = np.dtype(np.uint8) if self.dtype is None else self.dtype
        return raw_layout(dtype, self.shape, self.offset, self.order or "C", available, name)

    def raw_options(self) -> RawOptions:
        """Return the same as text for a worker."""
        dtype = None if self.dtype is None else dtype_to_text(self.dtype)
        return RawOptions(dtype, self.shape, self.offset, self.order or "C")


@dataclass(frozen=True)
class Target:
    """What to map.

    Attributes:
        data: The bytes.
        name: What to call them.
        layout: The array in them; None if the worker tells.
        table: The tensors in them, of a `.safetensors` file.
    """

    data: FileData | MemoryData | WorkerData
    name: str
    layout: ArrayLayout | None = None
    table: TensorTable | None = None


def check_mode(mode: str) -> Mode:
    """Return a mode.

    Raises:
        ModeError: It is not known.
    """
    for known in _MODES:
        if mode == known:
            return known
    raise ModeError(f"mode {mode!r} is not known; the modes are 'r', 'r+', 'c' and 'w+', as in numpy.memmap")


def check_delivery(delivery: str | None) -> Delivery:
    """Return a delivery; `"thread"` for None.

    Raises:
        ModeError: It is not known.
    """
    if delivery is None or delivery == "thread":
        return "thread"
    if delivery == "direct":
        return "direct"
    raise ModeError(f"delivery={delivery!r} is not known; give 'thread' or 'direct'")


def check_sizes(memory: SupportsIndex | str | None, block: SupportsIndex | str | None) -> None:
    """Check what can be checked of the sizes before anything is opened.

    Raises:
        BudgetError: One of them is no size.
    """
    if memory is not None:
        parse_size(memory, what="memory")
    block_size(block)


def check_format(value: str | None) -> Format | None:
    """Return a format.

    Raises:
        FormatError: It is not known.
    """
    for known in _FORMATS:
        if value == known:
            return known  # type: ignore[return-value]
    if value is None:
        return None
    raise FormatError(f"format={value!r} is not known; give one of {', '.join(map(repr, _FORMATS))}")
