"""From an array to its memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from userfault.errors import RangeError
from userfault.memory import PagedMemory, find

__all__ = ["memory_of"]


def memory_of(obj: Any) -> PagedMemory:
    """Return the memory that `obj` is in: an array of `userfault.open`, or any view of it.

    Args:
        obj: Anything with an address: a NumPy array, a `memoryview`, a PyTorch tensor, an Arrow buffer; or
            the mapping that `userfault.open` returns for a `.safetensors` file.

    Raises:
        RangeError: It is not in any open memory: an array without elements, a copy, or memory that was
            closed.

    Example:
        >>> a = userfault.open("climate.zarr/t2m")  # doctest: +SKIP
        >>> userfault.memory_of(a[100:200]).prefetch(a[100:200])  # doctest: +SKIP
    """
    if isinstance(obj, PagedMemory):
        return obj
    held = getattr(obj, "memory", None)
    if isinstance(held, PagedMemory):
        return held
    address = _address(obj)
    memory = None if address is None else find(address)
    if memory is None:
        what = f"{type(obj).__name__} at {address:#x}" if address else f"this {type(obj).__name__}"
        raise RangeError(
            f"{what} is in no open memory of userfault: a copy has its own, an empty array has none"
        )
    return memory


def _address(obj: Any) -> int | None:
    """Return where the first element is, None if there is none or it has no address."""
    interface = getattr(obj, "__array_interface__", None)
    if interface is not None and interface.get("data") is not None:
        return None if 0 in interface["shape"] else int(interface["data"][0])
    for name in ("data_ptr", "address"):
        value = getattr(obj, name, None)
        if value is not None:
            return int(value() if callable(value) else value)
    try:
        view = memoryview(obj)
    except TypeError:
        return None
    if view.nbytes == 0:
        return None
    return int(np.asarray(view).__array_interface__["data"][0])
