"""Which chunks a write to a Zarr array reads and puts, and what is seen where puts fail or meet with reads."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from support.zarrs import store_of
from userfault.errors import SourceError, SourceNotFoundError
from userfault.sources._location import Location
from userfault.sources._zarr_object import zarr_recipe
from userfault.sources._zarr_recipe import ZarrRecipe
from userfault.sources._zarr_store import ZarrStore


@pytest.mark.parametrize("keep", [False, True])
def test_empty_chunks_are_left_out_or_not_as_the_array_says(tmp_path: Path, keep: bool) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=(64,), chunks=(16,), dtype="i4", config={"write_empty_chunks": keep}
    )
    array[:32] = 1
    store: Any = pickle.loads(pickle.dumps(zarr_recipe(array, None, "r+"))).load()
    store.write_from(0, memoryview(bytes(256)))
    store.close()
    stored = {path.name for path in (tmp_path / "a" / "c").iterdir()}
    assert stored == ({"0", "1", "2", "3"} if keep else set())


def test_a_chunk_that_is_written_whole_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array({}, shape=(10, 64), chunks=(4, 64), dtype="u1")
    store = store_of(array)
    loaded = []
    load_chunk = ZarrStore.load_chunk

    def counted(self: ZarrStore, place: tuple[int, ...], out: Any, need: int) -> int:
        loaded.append(place)
        return load_chunk(self, place, out, need)

    monkeypatch.setattr(ZarrStore, "load_chunk", counted)
    # The last chunk is cut off by the end of the array, and whole all the same.
    store.write_from(0, memoryview(bytes(640)))
    assert loaded == []
    store.write_from(100, memoryview(b"x" * 300))
    assert loaded == [(0, 0), (1, 0)]
    store.close()


def test_each_chunk_is_put_once(monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array({}, shape=(64, 64), chunks=(16, 16), dtype="u1")
    store = store_of(array)
    assert store.write_unit == 16 * 64
    puts = []
    put = zarr.storage.MemoryStore.set

    async def counted(self: Any, key: str, value: Any, *args: Any) -> None:
        puts.append(key)
        await put(self, key, value, *args)

    monkeypatch.setattr(zarr.storage.MemoryStore, "set", counted)
    store.write_from(16 * 64, memoryview(os.urandom(16 * 64)))
    assert sorted(puts) == ["c/1/0", "c/1/1", "c/1/2", "c/1/3"]
    store.close()


@pytest.mark.parametrize(
    ("shape", "chunks", "unit"),
    [
        ((1024, 1024), (16, 1024), 16 << 10),
        ((1024, 1024), (16, 100), 16 << 10),
        ((1000, 1000), (10, 1000), 2 << 20),
        ((64, 256, 256), (32, 32, 32), 2 << 20),
        ((1 << 24,), (1 << 23,), 2 << 20),
        ((4, 4), (8, 8), 16),
    ],
)
def test_write_unit(shape: tuple[int, ...], chunks: tuple[int, ...], unit: int) -> None:
    store = store_of(zarr.create_array({}, shape=shape, chunks=chunks, dtype="u1"))
    assert store.write_unit == unit
    store.close()


def test_a_read_that_began_before_a_write_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk is being decoded for one thread when another one writes it."""
    array = zarr.create_array({}, shape=(64, 64), chunks=(64, 32), dtype="u1")
    array[:] = 1
    store = store_of(array)
    store.set_cache(1 << 20)
    reading, written = threading.Event(), threading.Event()
    load_chunk = ZarrStore.load_chunk

    def slow(self: ZarrStore, place: tuple[int, ...], out: Any, need: int) -> int:
        filled = load_chunk(self, place, out, need)
        if threading.current_thread().name == "reader" and place == (0, 0):
            reading.set()
            assert written.wait(30)
        return filled

    monkeypatch.setattr(ZarrStore, "load_chunk", slow)
    monkeypatch.setattr(store, "_threads", 1)
    old = bytearray(32)
    reader = threading.Thread(target=lambda: store.read_into(64, memoryview(old)), name="reader")
    reader.start()
    assert reading.wait(30)
    # All of the chunks, so that the write need not wait for the reader.
    store.write_from(0, memoryview(b"\x02" * 4096))
    fresh = bytearray(32)
    store.read_into(64, memoryview(fresh))
    assert fresh == b"\x02" * 32
    written.set()
    reader.join()
    assert old == b"\x01" * 32
    store.read_into(64, memoryview(fresh))
    assert fresh == b"\x02" * 32
    store.close()


def test_a_refused_put_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array({}, shape=(64,), chunks=(64,), dtype="u1")
    array[:] = 1
    store = store_of(array)
    store.set_cache(1 << 20)
    buffer = bytearray(64)
    store.read_into(0, memoryview(buffer))

    async def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage.MemoryStore, "set", full)
        with pytest.raises(SourceError, match=r"test\[0:64\] cannot be written: .*No space left") as caught:
            store.write_from(10, memoryview(b"xyz"))
        assert caught.value.errno == 28
        store.read_into(0, memoryview(buffer))
        assert buffer == b"\x01" * 64
    store.write_from(10, memoryview(b"xyz"))
    store.read_into(0, memoryview(buffer))
    assert buffer == b"\x01" * 10 + b"xyz" + b"\x01" * 51
    store.close()


def test_an_array_that_was_removed_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr.create_array(tmp_path / "a", shape=(64,), chunks=(64,), dtype="u1")
    store: Any = ZarrRecipe(Location.parse(tmp_path / "a"), mode="r+").load()
    monkeypatch.setattr("userfault.sources._zarr._TRUSTED_NS", 0)
    (tmp_path / "a" / "zarr.json").unlink()
    with pytest.raises(SourceNotFoundError, match=r"is gone: it has no zarr\.json any more"):
        store.write_from(0, memoryview(b"x"))
    store.close()
    assert not (tmp_path / "a" / "c").exists()


def test_a_shard_is_not_read_while_it_is_put(tmp_path: Path) -> None:
    """Its chunks are of other lengths each time, and so at other places in it."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (64, 64), "u1")
    array = zarr.create_array(tmp_path / "a", shape=(64, 64), chunks=(4, 64), shards=(64, 64), dtype="u1")
    array[:] = noise
    store: Any = ZarrRecipe(Location.parse(tmp_path / "a"), mode="r+").load()
    stop = threading.Event()
    errors: list[Any] = []

    def read() -> None:
        buffer = bytearray(64)
        try:
            while not stop.is_set():
                for row in range(32, 64):
                    store.read_into(64 * row, memoryview(buffer))
                    if buffer != noise[row].tobytes():
                        errors.append(f"row {row} has other bytes")
                        return
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(60):
            rows = noise[:32] if number % 2 else np.zeros((int(rng.integers(1, 33)), 64), "u1")
            store.write_from(0, memoryview(np.ascontiguousarray(rows)).cast("B"))
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    store.close()
    assert errors == []
