"""open(): every kind of source as an ordinary, read-only array; every mistake a typed error."""

from __future__ import annotations

import gc
import gzip
import importlib
import json
import struct
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import userfault
from support.web import serve_folder
from userfault import errors
from userfault.arrays import TensorFile
from userfault.sources import PageSource

ARRAY = np.random.default_rng(1).integers(0, 99, (20, 30, 40), "i4")
STRUCT = np.dtype([("a", "<i4"), ("b", "<f8", (2,)), ("c", "S3")])


def check(array: Any, expected: np.ndarray[Any, Any], order: str = "C") -> None:
    assert type(array) is np.ndarray
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.flags.c_contiguous if order == "C" else array.flags.f_contiguous
    assert not array.flags.writeable
    assert array.tobytes() == expected.tobytes()
    if array.size:
        assert userfault.memory_of(array).nbytes == expected.nbytes


class Numbers(PageSource):
    """Eight bytes for each number from 0 on."""

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def nbytes(self) -> int:
        return 8 * self.count

    def read_into(self, offset: int, buffer: memoryview) -> None:
        first, last = offset // 8, -(-(offset + len(buffer)) // 8)
        content = np.arange(first, last, dtype="<i8").tobytes()
        buffer[:] = content[offset - 8 * first :][: len(buffer)]


class Lazy:
    """An array-like that knows nothing but slicing."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def __getitem__(self, key: Any) -> Any:
        return self._array[key]


# ---- files


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, order: Any) -> None:
    np.save(tmp_path / "a.npy", np.asarray(ARRAY, order=order))
    check(userfault.open(tmp_path / "a.npy"), ARRAY, order)
    check(userfault.open(str(tmp_path / "a.npy")), ARRAY, order)
    check(userfault.open(f"file://{tmp_path}/a.npy", order=order), ARRAY, order)


@pytest.mark.parametrize("dtype", [">i2", "?", "S5", "M8[s]", STRUCT], ids=str)
def test_npy_types(tmp_path: Path, dtype: Any) -> None:
    expected = (
        np.frombuffer(bytes(range(97, 121)) * 50, dtype, 10) if dtype != "?" else np.array([True, False])
    )
    np.save(tmp_path / "a.npy", expected)
    check(userfault.open(tmp_path / "a.npy"), expected)


def test_npy_without_axes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(3.5))
    check(userfault.open(tmp_path / "a.npy"), np.array(3.5))


def test_any_name_will_do_for_npy(tmp_path: Path) -> None:
    with (tmp_path / "array").open("wb") as file:
        np.save(file, ARRAY)
    check(userfault.open(tmp_path / "array"), ARRAY)
    check(userfault.open(tmp_path / "array", format="npy"), ARRAY)


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_arrays_without_elements_have_no_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.empty(shape, "f4"))
    zarr.create_array(str(tmp_path / "a.zarr"), shape=shape, chunks=(1,) * len(shape), dtype="f4")
    for name in ("a.npy", "a.zarr"):
        array = userfault.open(tmp_path / name)
        check(array, np.empty(shape, "f4"))
        with pytest.raises(errors.RangeError, match="is in no open memory"):
            userfault.memory_of(array)


def test_raw_follows_memmap(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"head" + ARRAY.tobytes())
    for options in (
        {"dtype": "<i4", "offset": 4},
        {"dtype": "<i4", "offset": 8, "shape": 100},
        {"dtype": "<i4", "offset": 4, "shape": ARRAY.shape},
        {"dtype": "<i4", "offset": 4, "shape": ARRAY.shape[::-1], "order": "F"},
        {"dtype": "<i2", "offset": 1, "shape": (7, 3)},
    ):
        expected = np.memmap(path, mode="r", **options)  # type: ignore[call-overload]
        check(userfault.open(path, **options), np.asarray(expected), options.get("order", "C"))  # type: ignore[call-overload]
    check(userfault.open(path, format="raw"), np.fromfile(path, "u1"))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz", ".lz4"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    modules = {".gz": "gzip", ".zst": "zstandard", ".bz2": "bz2", ".xz": "lzma", ".lz4": "lz4.frame"}
    pack = importlib.import_module(modules[suffix]).compress
    np.save(tmp_path / "a.npy", ARRAY)
    (tmp_path / f"a.npy{suffix}").write_bytes(pack((tmp_path / "a.npy").read_bytes()))
    (tmp_path / f"a.bin{suffix}").write_bytes(pack(ARRAY.tobytes()))
    check(userfault.open(tmp_path / f"a.npy{suffix}"), ARRAY)
    check(userfault.open(tmp_path / f"a.bin{suffix}", dtype="i4", shape=ARRAY.shape), ARRAY)
    # Also under a name that does not say so; and as it is, if that is what is asked for.
    (tmp_path / "b.npy").write_bytes((tmp_path / f"a.npy{suffix}").read_bytes())
    check(userfault.open(tmp_path / "b.npy"), ARRAY)
    packed = np.fromfile(tmp_path / f"a.npy{suffix}", "u1")
    check(userfault.open(tmp_path / f"a.npy{suffix}", format="raw"), packed)


def write_tensors(path: Path) -> None:
    tensors = {
        "w": {"dtype": "I32", "shape": list(ARRAY.shape), "data_offsets": [0, ARRAY.nbytes]},
        "half": {"dtype": "BF16", "shape": [2], "data_offsets": [ARRAY.nbytes, ARRAY.nbytes + 4]},
        "flag": {"dtype": "BOOL", "shape": [], "data_offsets": [ARRAY.nbytes + 4, ARRAY.nbytes + 5]},
        "odd": {"dtype": "F32", "shape": [1], "data_offsets": [ARRAY.nbytes + 5, ARRAY.nbytes + 9]},
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [ARRAY.nbytes + 9, ARRAY.nbytes + 9]},
        "new": {"dtype": "F4", "shape": [2], "data_offsets": [ARRAY.nbytes + 9, ARRAY.nbytes + 10]},
    }
    header = json.dumps({"__metadata__": {"format": "np"}, **tensors}).encode()
    data = ARRAY.tobytes() + b"\x80\x3f\x00\x40" + b"\1" + struct.pack("<f", 2.5) + b"\0"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def check_tensors(opened: Any) -> None:
    assert isinstance(opened, TensorFile)
    assert list(opened) == ["w", "half", "flag", "odd", "none", "new"]
    assert len(opened) == 6
    assert "w" in opened
    assert "x" not in opened
    assert opened.metadata == {"format": "np"}
    assert np.array_equal(opened["w"], ARRAY)
    assert not opened["w"].flags.writeable
    assert opened["half"].astype("f4").tolist() == [1.0, 2.0]
    assert opened["flag"].shape == ()
    assert bool(opened["flag"])
    assert opened["odd"].tolist() == [2.5]
    assert opened["none"].shape == (0, 3)
    with pytest.raises(errors.UnsupportedDtypeError, match="tensor 'new' has dtype F4"):
        opened["new"]
    with pytest.raises(KeyError):
        opened["x"]
    assert userfault.memory_of(opened) is userfault.memory_of(opened["w"]) is opened.memory
    assert userfault.memory_of(opened["odd"]) is opened.memory
    assert repr(opened).endswith("6 tensors>")


def test_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.safetensors")
    check_tensors(userfault.open(tmp_path / "m.safetensors"))
    (tmp_path / "m.safetensors.gz").write_bytes(gzip.compress((tmp_path / "m.safetensors").read_bytes()))
    check_tensors(userfault.open(tmp_path / "m.safetensors.gz"))


def test_tensors_without_bytes(tmp_path: Path) -> None:
    header = json.dumps({"e": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    opened = userfault.open(tmp_path / "m.safetensors")
    assert opened.memory is None
    assert opened["e"].shape == (0,)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_in_a_group(tmp_path: Path, zarr_format: Any) -> None:
    group = zarr.create_group(str(tmp_path / "climate.zarr"), zarr_format=zarr_format)
    group.create_array("deep/t2m", data=ARRAY, chunks=(7, 11, 40))
    check(userfault.open(tmp_path / "climate.zarr" / "deep" / "t2m"), ARRAY)
    with pytest.raises(errors.SourceNotFoundError, match=r"deep/u10 does not exist; .*deep has t2m"):
        userfault.open(tmp_path / "climate.zarr" / "deep" / "u10")
    with pytest.raises(errors.FormatError, match=r"is a Zarr group.*deep/t2m"):
        userfault.open(tmp_path / "climate.zarr")


def test_zarr_orders(tmp_path: Path) -> None:
    transposed = [zarr.codecs.TransposeCodec(order=(2, 1, 0))]
    zarr.create_array(str(tmp_path / "f.zarr"), data=ARRAY, chunks=(7, 11, 13), filters=transposed)
    check(userfault.open(tmp_path / "f.zarr"), ARRAY, "F")
    check(userfault.open(tmp_path / "f.zarr", order="C"), ARRAY, "C")


def test_zarr_in_a_zip_file(tmp_path: Path) -> None:
    store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="w")
    zarr.create_group(store).create_array("t2m", data=ARRAY)
    store.close()
    check(userfault.open(tmp_path / "a.zip" / "t2m"), ARRAY)
    with pytest.raises(errors.FormatError, match="is a Zarr group"):
        userfault.open(tmp_path / "a.zip")


# ---- objects


def test_numpy_arrays_and_buffers() -> None:
    check(userfault.open(ARRAY), ARRAY)
    check(userfault.open(np.asfortranarray(ARRAY)), ARRAY, "F")
    check(userfault.open(ARRAY.tobytes()), np.frombuffer(ARRAY.tobytes(), "u1"))
    check(userfault.open(bytearray(ARRAY.tobytes()), dtype="i4", shape=ARRAY.shape), ARRAY)


def test_objects_of_other_libraries(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    array = zarr.create_array(str(tmp_path / "a.zarr"), data=ARRAY, chunks=(7, 11, 13))
    check(userfault.open(array), ARRAY)
    check(userfault.open(zarr.create_array({}, data=ARRAY)), ARRAY)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("deep/x", data=ARRAY, chunks=(7, 11, 13), compression="gzip")
    with h5py.File(tmp_path / "a.h5", "r") as file:
        check(userfault.open(file["deep/x"]), ARRAY)
    check(userfault.open(Lazy(ARRAY)), ARRAY)
    check(userfault.open(Lazy(ARRAY), order="F"), ARRAY, "F")
    check(userfault.open(Lazy(np.array(5.0))), np.array(5.0))


def test_page_sources() -> None:
    check(userfault.open(Numbers(1000)), np.frombuffer(np.arange(1000).tobytes(), "u1"))
    check(userfault.open(Numbers(1000), dtype="<i8"), np.arange(1000))
    check(userfault.open(Numbers(1000), dtype="<i8", shape=(10, 100)), np.arange(1000).reshape(10, 100))
    expected = np.arange(1000).reshape(10, 100, order="F")
    check(
        userfault.open(Numbers(1000), dtype="<i8", shape=(10, 100), order="F"),
        np.asfortranarray(expected),
        "F",
    )
    assert userfault.open(Numbers(0), dtype="<i8").shape == (0,)


# ---- URLs


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_urls(tmp_path: Path, client: Any) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    (tmp_path / "a.npy.gz").write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes()))
    (tmp_path / "a.bin").write_bytes(ARRAY.tobytes())
    write_tensors(tmp_path / "m.safetensors")
    zarr.create_group(str(tmp_path / "g.zarr")).create_array("t2m", data=ARRAY, chunks=(7, 11, 13))
    (tmp_path / "array").write_bytes((tmp_path / "a.npy").read_bytes())
    with serve_folder(tmp_path) as url:
        for path in ("a.npy", "a.npy.gz", "array", "g.zarr/t2m"):
            check(userfault.open(f"{url}/{path}", client=client), ARRAY)
        check(userfault.open(f"{url}/a.bin", client=client, dtype="i4", shape=ARRAY.shape), ARRAY)
        check_tensors(userfault.open(f"{url}/m.safetensors", client=client))
        with pytest.raises(errors.SourceNotFoundError, match="does not exist"):
            userfault.open(f"{url}/b.npy", client=client)
    with serve_folder(tmp_path, ranges=False) as url:
        check(userfault.open(f"{url}/a.npy", client=client), ARRAY)
        check(userfault.open(f"{url}/a.bin", client=client, dtype="i4", shape=ARRAY.shape), ARRAY)


def test_fsspec_memory() -> None:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    with fs.open("/mine/a.npy", "wb") as file:
        np.save(file, ARRAY)
    fs.pipe("/mine/a.npy.gz", gzip.compress(fs.cat_file("/mine/a.npy")))
    fs.pipe("/mine/a.bin", ARRAY.tobytes())
    zarr.create_array(zarr.storage.FsspecStore.from_url("memory://mine/a.zarr"), data=ARRAY)
    try:
        for name in ("a.npy", "a.npy.gz", "a.zarr"):
            check(userfault.open(f"memory://mine/{name}"), ARRAY)
        check(userfault.open("memory://mine/a.bin", dtype="i4", shape=ARRAY.shape), ARRAY)
        with pytest.raises(errors.SourceNotFoundError, match="does not exist"):
            userfault.open("memory://mine/b.npy")
        with pytest.raises(errors.FormatError, match="does not say what it is"):
            userfault.open("memory://mine/a.bin")
    finally:
        fs.rm("/", recursive=True)


# ---- what comes back


def test_the_memory_lives_as_long_as_a_view_of_it() -> None:
    array = userfault.open(ARRAY)
    memory = weakref.ref(userfault.memory_of(array))
    view = array[3:5, ::2].T
    del array
    gc.collect()
    assert memory() is userfault.memory_of(view)
    assert np.array_equal(view, ARRAY[3:5, ::2].T)
    del view
    gc.collect()
    assert memory() is None


def test_memory_of_anything_with_an_address() -> None:
    array = userfault.open(ARRAY)
    memory = userfault.memory_of(array)
    assert userfault.memory_of(array[5:7, 3]) is memory
    assert userfault.memory_of(memoryview(array)) is memory
    assert userfault.memory_of(array.reshape(-1)[::-1]) is memory
    assert userfault.memory_of(memory) is memory
    for other in (ARRAY, array + 1, array[:0], b"abc", "abc", 5):
        with pytest.raises(errors.RangeError, match="in no open memory"):
            userfault.memory_of(other)


def test_names_and_blocks(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    memory = userfault.memory_of(userfault.open(tmp_path / "a.npy", block="4 KiB"))
    assert (memory.name, memory.block) == ("a.npy", 4096)
    assert userfault.memory_of(userfault.open(tmp_path / "a.npy", name="mine")).name == "mine"
