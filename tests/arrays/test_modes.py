"""The modes of open(), which mean what they mean in numpy.memmap; empty() and zeros()."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
import zarr

import userfault
from support.page_sources import PatternSource
from support.page_stores import FileStore
from support.samples import write_safetensors
from support.waiting import wait_until
from userfault import errors
from userfault.sources import ArraySource, PageStore

ARRAY = np.random.default_rng(1).integers(0, 99, (20, 30, 40), "i4")
NBYTES = ARRAY.nbytes


def flush(array: Any) -> None:
    userfault.memory_of(array).flush()


def saved(path: Path) -> dict[str, Path]:
    """Write the array in each format that the engine writes itself."""
    files = {"raw": path / "a.raw", "npy": path / "a.npy", "safetensors": path / "a.safetensors"}
    (path / "a.raw").write_bytes(b"head" + ARRAY.tobytes())
    np.save(path / "a.npy", ARRAY)
    write_safetensors(path / "a.safetensors", {"other": np.ones(3, "f4"), "a": ARRAY.astype("f4")})
    return files


def opened(kind: str, path: Path, mode: str) -> Any:
    if kind == "raw":
        return userfault.open(path, mode, dtype="i4", shape=ARRAY.shape, offset=4)
    array = userfault.open(path, mode)
    return array["a"] if kind == "safetensors" else array


def stored(kind: str, path: Path) -> np.ndarray[Any, Any]:
    """Return what a reader that knows nothing of userfault finds."""
    if kind == "raw":
        content = path.read_bytes()
        assert content[:4] == b"head"
        return np.frombuffer(content[4:], "i4").reshape(ARRAY.shape)
    if kind == "npy":
        array: np.ndarray[Any, Any] = np.load(path)
        return array
    from safetensors.numpy import load_file

    tensors = load_file(path)
    assert (tensors["other"] == 1).all()
    return np.asarray(tensors["a"]).astype("i4")


@pytest.mark.parametrize("kind", ["raw", "npy", "safetensors"])
def test_readable_and_writable_changes_the_file(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path)[kind]
    expected = ARRAY.copy()
    array = opened(kind, path, "r+")
    assert array.flags.writeable
    assert userfault.memory_of(array).mode == "r+"
    array[3, ::2] = expected[3, ::2] = -1
    array[-1, -1, -1] = expected[-1, -1, -1] = 7
    flush(array)
    assert np.array_equal(stored(kind, path), expected)
    array += 1
    assert np.array_equal(array, expected + 1)
    del array
    assert np.array_equal(stored(kind, path), expected + 1)


@pytest.mark.parametrize("kind", ["raw", "npy", "safetensors"])
def test_copy_on_write_leaves_the_file_alone(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path)[kind]
    before = path.read_bytes()
    array = opened(kind, path, "c")
    array += 1
    flush(array)
    userfault.memory_of(array).evict()
    assert np.array_equal(array, ARRAY + 1)
    del array
    assert path.read_bytes() == before


def test_private_changes_to_what_cannot_be_written(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    compressed = tmp_path / "a.npy.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes()))
    original = ARRAY.copy()
    sources: list[Any] = [compressed, original, zarr.array(ARRAY, chunks=(5, 30, 40))]
    for source in sources:
        array = userfault.open(source, "c")
        array[5] = 0
        array[6] += 1
        userfault.memory_of(array).evict()
        assert not array[5].any()
        assert np.array_equal(array[6], ARRAY[6] + 1)
        assert np.array_equal(array[7:], ARRAY[7:])
        del array
    assert np.array_equal(original, ARRAY)
    with gzip.open(compressed) as file:
        assert np.array_equal(np.load(file), ARRAY)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f8", ">i2", np.dtype([("a", "<i4"), ("b", "<f8", (2,))])])
@pytest.mark.parametrize("kind", ["raw", "npy"])
def test_write_creates_a_file(kind: str, dtype: Any, order: Literal["C", "F"], tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"what was there before, and is longer than the header" * 1000)
    offset = 100 if kind == "raw" else 0
    array = userfault.open(path, "w+", dtype=dtype, shape=(7, 11, 13), order=order, offset=offset)
    assert (array.shape, array.dtype) == ((7, 11, 13), np.dtype(dtype))
    assert array.flags.c_contiguous if order == "C" else array.flags.f_contiguous
    assert array.flags.writeable
    assert not any(array.tobytes())
    assert userfault.memory_of(array).mode == "w+"
    expected = np.zeros((7, 11, 13), dtype)
    expected.view("u1")[:] = np.arange(13 * expected.dtype.itemsize, dtype="u1")
    array[...] = expected
    del array
    again = (
        np.load(path)
        if kind == "npy"
        else np.memmap(path, dtype, "r", offset=offset, shape=(7, 11, 13), order=order)
    )
    assert again.tobytes() == expected.tobytes()
    assert again.flags.c_contiguous if order == "C" else again.flags.f_contiguous
    if kind == "raw":
        assert path.stat().st_size == offset + expected.nbytes
        assert not any(path.read_bytes()[:offset])


def test_a_file_that_is_created_takes_no_space_until_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    array = userfault.open(path, "w+", dtype="f8", shape=(1 << 17, 1 << 10), memory="1 MiB")
    array[1000, 5] = 3
    flush(array)
    status = path.stat()
    assert status.st_size > 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    assert np.load(path, mmap_mode="r")[1000, 4:7].tolist() == [0, 3, 0]


def test_a_file_of_any_other_name_is_raw(tmp_path: Path) -> None:
    array = userfault.open(tmp_path / "data", "w+", dtype="u1", shape=10)
    array[:] = range(10)
    del array
    assert (tmp_path / "data").read_bytes() == bytes(range(10))
    array = userfault.open(tmp_path / "a.gz", "w+", dtype="u1", shape=3, format="raw")
    array[:] = 1
    del array
    assert (tmp_path / "a.gz").read_bytes() == b"\1\1\1"


@pytest.mark.parametrize("name", ["a.raw", "a.npy"])
def test_an_empty_array_is_created_too(name: str, tmp_path: Path) -> None:
    array = userfault.open(tmp_path / name, "w+", dtype="f4", shape=(0, 3))
    assert (array.shape, array.flags.writeable) == ((0, 3), True)
    again = userfault.open(tmp_path / name, "r+", dtype="f4", shape=(0, 3), format="raw", offset=0)
    assert again.flags.writeable
    assert not userfault.open(tmp_path / name, dtype="f4", shape=(0, 3), format="raw").flags.writeable


def test_a_header_beyond_64_kib(tmp_path: Path) -> None:
    dtype = np.dtype([(f"a field with a long name {n}", "<i4") for n in range(3000)])
    array = userfault.open(tmp_path / "wide.npy", "w+", dtype=dtype, shape=2)
    array["a field with a long name 2999"] = 5, 6
    del array
    assert np.load(tmp_path / "wide.npy", max_header_size=1 << 20)[
        "a field with a long name 2999"
    ].tolist() == [5, 6]


def test_creating_wrongly_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"precious")

    def refused(error: type[Exception], match: str, name: str = "a.raw", **options: Any) -> None:
        given = {"dtype": "u1", "shape": 3, **options}
        with pytest.raises(error, match=match):
            userfault.open(tmp_path / name, "w+", **{k: v for k, v in given.items() if v is not None})
        assert path.read_bytes() == b"precious"
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.raw"]

    refused(errors.ModeError, "give dtype= and shape=", dtype=None)
    refused(errors.ModeError, "give dtype= and shape=", shape=None)
    refused(errors.ModeError, "would be compressed", "a.npy.gz")
    refused(errors.ModeError, r"\.safetensors", "a.safetensors")
    refused(errors.ModeError, r"\.safetensors", format="safetensors")
    refused(errors.FormatError, "chunks=3: only a Zarr array", chunks=3)
    refused(errors.FormatError, "offset=8: only a raw file that is local", "a.npy", offset=8)
    refused(errors.FormatError, "cannot hold dtype bfloat16", "a.npy", dtype="bfloat16")
    refused(errors.FormatError, "cannot hold dtype", "a.npy", dtype=[("\u0142", "<i4")])
    refused(errors.UnsupportedDtypeError, "Python objects", dtype="O")
    refused(errors.BudgetError, "memory", memory="much")
    refused(errors.BudgetError, "block", block=5000)
    refused(errors.ModeError, "delivery", delivery="post")
    refused(errors.SourceError, "cannot be created: No such file", "folder/a.raw")
    refused(errors.SourceError, "cannot be created: File too large", "b.raw", shape=1 << 62)
    refused(errors.RangeError, "more than", shape=1 << 64)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("chunks", [None, (4, 5, 40)])
def test_write_creates_a_zarr_array(chunks: Any, order: Literal["C", "F"], tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    array = userfault.open(path, "w+", dtype="i4", shape=ARRAY.shape, order=order, chunks=chunks)
    assert array.flags.c_contiguous if order == "C" else array.flags.f_contiguous
    assert not array.any()
    array[...] = ARRAY
    flush(array)
    assert np.array_equal(zarr.open_array(path, mode="r")[:], ARRAY)
    if chunks is not None:
        assert zarr.open_array(path, mode="r").chunks == chunks
    del array
    again = userfault.open(path, "r+")
    again[5:7] = -1
    del again
    assert (zarr.open_array(path, mode="r")[4:8, 0, 0] == [ARRAY[4, 0, 0], -1, -1, ARRAY[7, 0, 0]]).all()
    with pytest.raises(errors.ModeError, match="chunks= is for mode 'w"):
        userfault.open(path, "r+", chunks=chunks or 5)


@pytest.mark.parametrize("source", [np.zeros(3), b"abc", PatternSource(10), zarr.zeros(3)])
def test_only_paths_can_be_created(source: Any) -> None:
    with pytest.raises(errors.ModeError, match="give a path or URL"):
        userfault.open(source, "w+", dtype="u1", shape=3)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    def refused(source: Any, match: str, **options: Any) -> None:
        with pytest.raises(errors.ModeError, match=rf"{match}.*[mM]ode[= ]'c'.*private"):
            userfault.open(source, "r+", **options)

    np.save(tmp_path / "a.npy", ARRAY)
    (tmp_path / "a.npy.gz").write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes()))
    shutil.copy(tmp_path / "a.npy.gz", tmp_path / "b.npy")
    refused(tmp_path / "a.npy.gz", r"a\.npy\.gz is compressed.*unpack it first")
    refused(tmp_path / "b.npy", "is compressed")
    refused(ARRAY, "a NumPy array is memory already")
    refused(bytes(10), "bytes, a buffer, is memory already")
    refused(PatternSource(100_000), "PatternSource cannot be written")
    refused(FileStore(tmp_path, bytes(100), writable=False), "store cannot be written")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["whole"] = ARRAY
        file.create_dataset("chunked", data=ARRAY, chunks=(5, 30, 40))
    with h5py.File(tmp_path / "a.h5") as file:
        refused(file["whole"], "whole cannot be written")
        refused(file["chunked"], "chunked cannot be written")
    with pytest.raises(errors.SourceNotFoundError):
        userfault.open(tmp_path / "gone.npy", "r+")
    # Unlike numpy.memmap, which would make the file longer.
    with pytest.raises(errors.TruncatedError):
        userfault.open(tmp_path / "a.npy", "r+", dtype="u1", shape=1 << 20, format="raw")


def test_a_program_that_runs_is_read_only(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "100"]) as process:
        try:
            wait_until(
                lambda: Path(f"/proc/{process.pid}/exe").readlink() == program, "the program has started"
            )
            with pytest.raises(
                errors.ModeError, match=r"program cannot be written: Text file busy.*mode 'c'"
            ):
                userfault.open(program, "r+", dtype="u1")
            assert userfault.open(program, "c", dtype="u1")[:4].tobytes() == b"\x7fELF"
        finally:
            process.kill()


class Grid(ArraySource, PageStore):
    """An array of a user's own that can be written."""

    def __init__(self, store: FileStore) -> None:
        self.store = store

    dtype = np.dtype("<i4")  # type: ignore[assignment]
    shape = ARRAY.shape  # type: ignore[assignment]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.store.read_into(offset, buffer)

    def write_from(self, offset: int, buffer: memoryview) -> None:
        self.store.write_from(offset, buffer)


@pytest.mark.parametrize("transactional", [False, True])
@pytest.mark.parametrize("kind", ["typed", "array"])
def test_a_store_of_ones_own(kind: str, transactional: bool, tmp_path: Path) -> None:
    store = FileStore(tmp_path, ARRAY.tobytes(), transactional=transactional)
    if kind == "typed":
        array = userfault.open(store, "r+", dtype="i4", shape=ARRAY.shape)
        assert (userfault.memory_of(array).description or store).transactional is transactional
    else:
        store.transactional = False
        array = userfault.open(Grid(store), "r+")
    array[3] = -1
    flush(array)
    expected = ARRAY.copy()
    expected[3] = -1
    assert store.content() == expected.tobytes()
    if kind == "typed":
        assert store.log()[-1] == ("flush", 0, 0)
    array[4] = -1
    expected[4] = -1
    del array
    assert store.content() == expected.tobytes()


@pytest.mark.parametrize("make", [userfault.zeros, userfault.empty])
def test_arrays_of_no_file(make: Any) -> None:
    array = make((300, 1000), memory="256 KiB", block="16 KiB")
    assert (type(array), array.dtype, array.shape) == (np.ndarray, np.float64, (300, 1000))
    assert array.flags.writeable
    memory = userfault.memory_of(array)
    assert (memory.mode, memory.name) == ("c", make.__name__)
    right = np.random.default_rng(2).random((300, 1000))
    array[...] = right
    assert memory.stats().scratch_bytes > 0
    assert memory.stats().resident_bytes <= 1 << 18
    assert np.array_equal(array, right)
    array[::7] = 0
    right[::7] = 0
    assert np.array_equal(array.T, right.T)
    flush(array)
    fortran = make((3, 5), "i2", order="F", name="mine")
    assert fortran.flags.f_contiguous
    assert userfault.memory_of(fortran).name == "mine"
    nothing = make((0, 5), "i2")
    assert (nothing.shape, nothing.flags.writeable) == ((0, 5), True)


def test_zeros_are_zeros() -> None:
    array = userfault.zeros((1 << 10, 1 << 20), "u1", memory="1 MiB")  # 1 GiB
    assert not array[::100, ::100_000].any()
    array[5, 5] = 1
    userfault.memory_of(array).evict()
    assert array[5, :10].tolist() == [0] * 5 + [1] + [0] * 4


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shape": -1}, errors.RangeError),
        ({"shape": 2.5}, errors.RangeError),
        ({"shape": 3, "dtype": "O"}, errors.UnsupportedDtypeError),
        ({"shape": 3, "order": "K"}, errors.FormatError),
        ({"shape": 3, "memory": "much"}, errors.BudgetError),
        ({"shape": 3, "block": 5}, errors.BudgetError),
        ({"shape": 3, "delivery": "post"}, errors.ModeError),
        ({"shape": 1 << 50}, errors.KernelError),
        ({"shape": 1 << 62}, errors.RangeError),
    ],
)
def test_arrays_of_no_file_that_make_no_sense(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        userfault.empty(**arguments)


@pytest.mark.parametrize("delivery", ["thread", "direct"])
def test_either_delivery_reads_and_writes(delivery: Literal["thread", "direct"], tmp_path: Path) -> None:
    path = saved(tmp_path)["npy"]
    array = userfault.open(path, "r+", delivery=delivery)
    assert userfault.memory_of(array).delivery == delivery
    array += 1
    flush(array)
    assert np.array_equal(np.load(path), ARRAY + 1)
    anonymous = userfault.zeros(ARRAY.shape, "i4", memory="64 KiB", block="4 KiB", delivery=delivery)
    anonymous += ARRAY
    assert np.array_equal(anonymous, ARRAY)


def test_a_name_is_kept(tmp_path: Path) -> None:
    assert (
        userfault.memory_of(userfault.open(tmp_path / "a.npy", "w+", dtype="u1", shape=3, name="mine")).name
        == "mine"
    )
