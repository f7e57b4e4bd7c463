"""Test data, made once: a smooth field with noise in its low bits; zstd makes it four times smaller."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Shape = tuple[int, int, int]

CUBE: Shape = (512, 512, 512)
"""512 MiB of float32. In chunks of 64³, a line along the last axis crosses 8 chunks."""
NARROW: Shape = (2048, 256, 256)
"""As many bytes; a line along the last axis crosses 4 chunks of 64³."""
QUICK_CUBE: Shape = (128, 128, 128)
QUICK_NARROW: Shape = (256, 64, 128)
SLAB = 64
"""What the bulk readers take at a time along the first axis: whole chunks in every layout here."""


def slab(start: int, count: int, shape: Shape) -> Any:
    """Indices `start` to `start + count` of the first axis of the field: float32, (count, *shape[1:])."""
    import numpy as np

    i = np.arange(start, start + count, dtype=np.float32)[:, None, None]
    j = np.arange(shape[1], dtype=np.float32)[None, :, None]
    k = np.arange(shape[2], dtype=np.float32)[None, None, :]
    smooth = 280 + 20 * np.sin(i / 40 + j / 90) + 12 * np.cos(k / 70 - i / 300)
    noise = np.random.default_rng(start).integers(0, 8, size=smooth.shape, dtype=np.int8)
    return ((np.round(smooth * 8) + noise) / 8).astype(np.float32)


def zarr_field(folder: Path, shape: Shape, chunk: Shape, *, compressed: bool = True) -> Path:
    """A Zarr v3 array of the field in the given chunks."""
    import zarr
    from zarr.codecs import ZstdCodec

    name = f"field-{_text(shape)}-in-{_text(chunk)}{'' if compressed else '-plain'}.zarr"

    def write(partial: Path) -> None:
        codec = ZstdCodec(level=3) if compressed else None
        array = zarr.create_array(partial, shape=shape, chunks=chunk, dtype="float32", compressors=codec)
        for start in range(0, shape[0], SLAB):
            array[start : start + SLAB] = slab(start, SLAB, shape)

    return _once(folder / name, write)


def npy_field(folder: Path, shape: Shape) -> Path:
    """The field as a plain `.npy` file."""
    import numpy as np

    def write(partial: Path) -> None:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, shape[0], SLAB):
            array[start : start + SLAB] = slab(start, SLAB, shape)
        array.flush()

    return _once(folder / f"field-{_text(shape)}.npy", write)


def zarr_huge(folder: Path) -> Path:
    """20 GiB of float32 in chunks of 1 MiB, of which only the first eight exist: the rest is fill value."""
    import zarr
    from zarr.codecs import ZstdCodec

    shape = (20480, 512, 512)

    def write(partial: Path) -> None:
        codec = ZstdCodec(level=3)
        array = zarr.create_array(
            partial,
            shape=shape,
            chunks=(1, 512, 512),
            dtype="float32",
            compressors=codec,
            fill_value=7,
        )
        array[:8] = slab(0, 8, shape)

    return _once(folder / "huge-20g.zarr", write)


def nbytes(shape: Shape) -> int:
    """Length of a float32 array in bytes."""
    return 4 * math.prod(shape)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _once(path: Path, write: Callable[[Path], None]) -> Path:
    """Writes under another name, then renames: an interrupted run leaves nothing that looks complete."""
    if path.exists():
        return path
    partial = path.with_name(f"partial-{path.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    write(partial)
    return partial.rename(path)
