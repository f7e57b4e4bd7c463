"""The demo's own data: ten years of daily rain, made once and kept in the cache folder.

3652 days on a half-degree grid as float32 are 3.5 GiB; zstd-compressed, one chunk per day, they are about 320
MB on disk. One chunk per day because a day is what people look at, and because a chunk is then a contiguous
piece of the array.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from userfault import options
from userfault.cli._demo.rain import DAY_NBYTES, LATITUDES, LONGITUDES, Rain
from userfault.errors import MissingExtraError, UserfaultError
from userfault.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["DAYS", "ensure"]

DAYS: Final = 3652
_SLAB_DAYS: Final = 16
_DISK_PER_LOGICAL: Final = 0.12  # with a margin over what was measured: 0.085
# Part of the folder's name: data made by an older recipe are not taken for these.
_VERSION: Final = 1


def ensure(days: int = DAYS, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the folder of the data, and make them first if they are not there.

    They appear under their name only when they are complete. Two processes that both want them make them
    once.

    Args:
        days: How many days; about 1 MiB each.
        progress: Called with the days made and the days wanted.

    Raises:
        MissingExtraError: zarr is not installed.
        UserfaultError: The disk is too full, or the folder cannot be written.
    """
    folder = options.cache_dir() / "demo"
    target = folder / f"rain-{days}-days-v{_VERSION}.zarr"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "lock"):
            if not target.exists():
                _check_space(folder, days)
                _make(folder, target, days, progress or (lambda _done, _total: None))
    except OSError as error:
        raise UserfaultError(
            f"the demo's data cannot be made in {folder}: {error}; set XDG_CACHE_HOME to a folder with room"
        ) from error
    return target


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_space(folder: Path, days: int) -> None:
    wanted, free = int(days * DAY_NBYTES * _DISK_PER_LOGICAL), shutil.disk_usage(folder).free
    if free < wanted:
        raise UserfaultError(
            f"the demo's data need about {format_size(wanted)}, and {folder} has {format_size(free)} free;"
            " set XDG_CACHE_HOME to a folder with room"
        )


def _make(folder: Path, target: Path, days: int, progress: Callable[[int, int], None]) -> None:
    # Who holds the lock is alone here: other unfinished folders were left by processes that died.
    for left in folder.glob(".making-*"):
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
    try:
        _write(unfinished / "rain.zarr", Rain(days), progress)
        os.rename(unfinished / "rain.zarr", target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: Path, rain: Rain, progress: Callable[[int, int], None]) -> None:
    try:
        import zarr
        from zarr.codecs import ZstdCodec
    except ImportError as error:
        raise MissingExtraError.for_module("zarr", "zarr", "the demo's own data") from error
    array = zarr.create_array(
        str(path),
        shape=(rain.days, LATITUDES, LONGITUDES),
        chunks=(1, LATITUDES, LONGITUDES),
        dtype="float32",
        compressors=ZstdCodec(level=1),
        dimension_names=("time", "latitude", "longitude"),
        attributes={
            "long_name": "daily rain (synthetic)",
            "units": "mm/day",
            "comment": "made by `userfault demo`; safe to delete",
        },
    )

    def write(start: int) -> int:
        stop = min(start + _SLAB_DAYS, rain.days)
        array[start:stop] = rain.slab(start, stop)
        return stop - start

    # NumPy and zstd release the GIL: as many slabs at once as there are CPUs, and no more of them in memory.
    cpus, done = options.cpu_count(), 0
    progress(done, rain.days)
    with ThreadPoolExecutor(cpus, thread_name_prefix="uf-demo") as pool:
        running: set[Future[int]] = set()
        for start in range(0, rain.days, _SLAB_DAYS):
            if len(running) == cpus:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                done += sum(slab.result() for slab in finished)
                progress(done, rain.days)
            running.add(pool.submit(write, start))
        for slab in as_completed(running):
            done += slab.result()
            progress(done, rain.days)
