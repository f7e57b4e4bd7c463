"""Arrays from every kind of source, all with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import userfault
from support.page_sources import PatternSource, pattern

__all__ = ["KINDS", "NBYTES", "expected", "open_kind"]

NBYTES = (2 << 20) + (300 << 10)
KINDS = ("memory", "npy", "raw", "safetensors", "zarr", "source")


def expected() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the numbers."""
    return np.frombuffer(pattern(0, NBYTES), np.uint8)


def open_kind(kind: str, folder: Path, **options: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Write the numbers to a file in `folder` if need be, and open them from there."""
    array: np.ndarray[Any, np.dtype[np.uint8]] = _OPENERS[kind](folder, options)
    return array


def _memory(folder: Path, options: dict[str, Any]) -> Any:
    return userfault.open(expected().copy(), **options)


def _npy(folder: Path, options: dict[str, Any]) -> Any:
    np.save(folder / "a.npy", expected())
    return userfault.open(folder / "a.npy", **options)


def _raw(folder: Path, options: dict[str, Any]) -> Any:
    expected().tofile(folder / "a.raw")
    return userfault.open(folder / "a.raw", dtype="u1", **options)


def _safetensors(folder: Path, options: dict[str, Any]) -> Any:
    from safetensors.numpy import save_file

    save_file({"first": np.zeros(77, "u1"), "numbers": expected()}, folder / "a.safetensors")
    return userfault.open(folder / "a.safetensors", **options)["numbers"]


def _zarr(folder: Path, options: dict[str, Any]) -> Any:
    import zarr

    zarr.create_array(str(folder / "a.zarr"), data=expected(), chunks=(100_000,))
    return userfault.open(folder / "a.zarr", **options)


def _source(folder: Path, options: dict[str, Any]) -> Any:
    return userfault.open(PatternSource(NBYTES), **options)


_OPENERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "memory": _memory,
    "npy": _npy,
    "raw": _raw,
    "safetensors": _safetensors,
    "zarr": _zarr,
    "source": _source,
}
