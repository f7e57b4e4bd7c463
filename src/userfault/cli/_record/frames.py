"""Which variable of the running program holds an array: a look at all threads' frames."""

from __future__ import annotations

import dis
import os
import sys
import sysconfig
import threading
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from userfault import _allocations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["Holder", "Variable", "holders"]

# What one look costs at most: it runs with the GIL, at each tick. In numbers, so that it sees the same each time.
_MOST_FRAMES, _MOST_ITEMS, _MOST_VALUES = 24, 64, 5_000

_OWN = str(Path(__file__).resolve().parents[2]) + os.sep
_LIBRARIES = tuple(
    str(Path(path).resolve()) + os.sep
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    ModuleType,
    FunctionType,
    np.generic,
    threading.Thread,
)
_STORES = frozenset(
    {"STORE_FAST", "STORE_NAME", "STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "STORE_FAST_MAYBE_NULL"}
)


@dataclass(frozen=True, slots=True)
class Variable:
    """What is known of a variable that holds an array, without a reference to the array.

    Attributes:
        name: As one would write it.
        site: Where it was set.
        low: Address of the array's first byte.
        high: Address of the one behind its last.
        dtype: Its type.
        shape: Its shape.
        nbytes: Bytes of its elements.
        order: "F" if that is how they lie, else "C".
    """

    name: str
    site: str
    low: int
    high: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int
    order: Literal["C", "F"]


@dataclass(frozen=True, slots=True)
class Holder:
    """A variable, or an element or attribute of one, that holds an array.

    As long as there is one, the array has references that the program does not know of, and `ndarray.resize` refuses.
    So none is kept over anything that lets other threads run.

    Attributes:
        name: As one would write it: "grid", "self.field", "layers[0]", 'table["price"]'.
        site: Where it was set, or else where its function is: "stencil.py:41".
        array: The array, or a tensor as one.
        owner: The object itself.
    """

    name: str
    site: str
    array: NDArray[Any]
    owner: object

    @property
    def bounds(self) -> tuple[int, int]:
        """Addresses of the array's first byte and of the one behind its last, in whatever order its elements lie."""
        first: int = self.array.__array_interface__["data"][0]
        pairs = zip(self.array.shape, self.array.strides, strict=True)
        reach = [(length - 1) * stride for length, stride in pairs]
        low = first + sum(step for step in reach if step < 0)
        return low, first + sum(step for step in reach if step > 0) + self.array.itemsize

    def variable(self) -> Variable:
        """Return what can be kept."""
        array, flags = self.array, self.array.flags
        order: Literal["C", "F"] = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
        return Variable(self.name, self.site, *self.bounds, array.dtype, array.shape, array.nbytes, order)


def holders(least: int) -> Iterator[Holder]:
    """Yield the variables with arrays of at least `least` bytes: the main thread's first, and of outer frames first.

    Looked at are the frames of all threads but this one that belong to the program, not those of Python's and installed
    libraries; and the globals of their modules. One level into lists, tuples, dicts and instances.
    """
    seen: set[int] = set()
    left = [_MOST_VALUES]
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    for thread in sorted(frames, key=lambda thread: thread != main):
        for own in _frames_of(frames[thread]):
            if id(own.f_globals) not in seen:
                seen.add(id(own.f_globals))
                module = str(own.f_globals.get("__name__", "")).rpartition(".")[2]
                prefix = "" if module == "__main__" else f"{module}."
                yield from _in_names(own.f_globals.copy(), prefix, own, least, left)
            if own.f_code.co_name != "<module>":
                yield from _in_names(_allocations.frame_locals(own), "", own, least, left)


def _frames_of(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    frames.reverse()
    return [found for found in frames if _is_the_programs(found)][:_MOST_FRAMES]


def _is_the_programs(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.startswith(("<frozen", _OWN)):
        return False
    if frame.f_globals.get("__name__") == "__main__":
        return True
    return not file.startswith(_LIBRARIES) and "/site-packages/" not in file and "/dist-packages/" not in file


def _in_names(
    names: dict[str, Any], prefix: str, frame: FrameType, least: int, left: list[int]
) -> Iterator[Holder]:
    for name, value in names.items():
        if issubclass(type(value), _PLAIN) or name.startswith("__"):
            continue
        for text, array, owner in _arrays_in(prefix + name, value, least, left):
            yield Holder(text, _site(frame, text), array, owner)
        if left[0] <= 0:
            return


def _arrays_in(
    name: str, value: Any, least: int, left: list[int]
) -> Iterator[tuple[str, NDArray[Any], object]]:
    left[0] -= 1
    array = _as_array(value, least)
    if array is not None:
        yield name, array, value
        return
    for part, inner in _parts(value):
        left[0] -= 1
        array = _as_array(inner, least)
        if array is not None:
            yield name + part, array, inner


def _as_array(value: Any, least: int) -> NDArray[Any] | None:
    # By type: isinstance would ask `__class__`, and lazy proxies answer that with what they stand for.
    if issubclass(type(value), np.ndarray):
        return value if value.nbytes >= least and not value.dtype.hasobject else None
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "data_ptr"):
        try:
            tensor = np.asarray(value.detach().numpy())  # shares the memory; refuses what lies on a device
        except (RuntimeError, TypeError):
            return None
        return tensor if tensor.nbytes >= least else None
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) in (list, tuple):
        # By number: the list may change while it is looked at, by another thread.
        for number in range(min(len(value), _MOST_ITEMS)):
            try:
                yield f"[{number}]", value[number]
            except IndexError:
                return
    elif type(value) is dict:
        for key, inner in _first_items(value):
            if isinstance(key, str | int):
                yield f"[{key!r}]" if isinstance(key, int) else f'["{key}"]', inner
    elif type(value).__module__.partition(".")[0] == "pandas":
        yield from _columns(value)
    else:
        try:
            inner_names = object.__getattribute__(value, "__dict__")
        except (AttributeError, TypeError):
            return
        if type(inner_names) is dict:
            for key, inner in _first_items(inner_names):
                if isinstance(key, str):
                    yield f".{key}", inner


def _first_items(names: dict[Any, Any]) -> list[tuple[Any, Any]]:
    # Not of a copy, which would take long where the dict is large.
    try:
        return list(islice(names.items(), _MOST_ITEMS))
    except RuntimeError:  # another thread is changing it
        return []


def _columns(value: Any) -> Iterator[tuple[str, Any]]:
    # Columns lie in blocks of one type, several in each. There is no public way to see them without a copy.
    try:
        manager = value._mgr
        labels, blocks = manager.items, manager.blocks
        single = type(value).__name__ == "Series"
        for block in blocks:
            places = block.mgr_locs.as_array
            part = "" if single else f'["{labels[places[0]]}"]'
            if len(places) > 1 and not single:
                part = f'["{labels[places[0]]}", … {len(places)} columns]'
            values = block.values
            inner = values if isinstance(values, np.ndarray) else getattr(values, "_ndarray", None)
            while isinstance(inner, np.ndarray) and isinstance(inner.base, np.ndarray):
                inner = inner.base
            yield part, inner
    except (AttributeError, IndexError, TypeError):
        return


# --- where a variable was set


def _site(frame: FrameType, text: str) -> str:
    """Return the line that sets the variable, if the function has one; of several the last before the current one."""
    stores = _stores(frame.f_code)
    names = text.partition("[")[0].split(".")
    # `model.field` is set by `self.field = ` where that is `self`, and elsewhere with `model`.
    lines = stores.get(names[-1]) or stores.get(names[0]) or ()
    now = frame.f_lineno or frame.f_code.co_firstlineno
    line = max((line for line in lines if line <= now), default=min(lines, default=now))
    return f"{os.path.basename(frame.f_code.co_filename)}:{line}"


@lru_cache(maxsize=256)
def _stores(code: CodeType) -> dict[str, tuple[int, ...]]:
    found: dict[str, set[int]] = {}
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        position = instruction.positions
        line = position.lineno if position is not None and position.lineno is not None else line
        if instruction.opname.startswith("STORE_"):
            for name in (
                instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
            ):
                if isinstance(name, str):
                    found.setdefault(name, set()).add(line)
    return {name: tuple(sorted(lines)) for name, lines in found.items()}
