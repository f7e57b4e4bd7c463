"""Arrays that mode "w+" creates for a worker to write."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from sources.test_remote import clients, s3_options, s3_server
from userfault.errors import FormatError, ModeError, SourceError
from userfault.sources import ObjectBlocks
from userfault.sources._create import create_array
from userfault.sources._location import Client, Location
from userfault.sources._pickle import dumps


def create(at: Any, **options: Any) -> Any:
    """Create an array, and load the source as a worker would."""
    arguments: dict[str, Any] = {"dtype": np.dtype("f4"), "shape": (30, 40), "format": "zarr", **options}
    location = at if isinstance(at, Location) else Location.parse(at)
    return pickle.loads(dumps(create_array(location, **arguments))).load()


def write(store: Any, values: Any) -> None:
    store.write_from(0, memoryview(np.ascontiguousarray(values)).cast("B"))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("order", [None, "C", "F"])
def test_zarr(tmp_path: Path, zarr_format: Any, order: Any) -> None:
    zarr.create_group(tmp_path / "g", zarr_format=zarr_format)
    store = create(tmp_path / "g" / "a", order=order)
    assert (store.shape, store.dtype, store.order) == ((30, 40), np.dtype("f4"), order or "C")
    # One chunk, in the order of the memory.
    assert store.info()["decoder"] == "direct"
    assert store.info()["chunks"] == [30, 40]
    buffer = bytearray(b"x" * store.nbytes)
    store.read_into(0, memoryview(buffer))
    assert buffer == bytes(4800)
    data = np.arange(1200, dtype="f4").reshape(30, 40)
    write(store, data.T if order == "F" else data)
    store.close()
    # The group shows it: it is of the same format.
    array: Any = zarr.open_group(tmp_path / "g", mode="r")["a"]
    assert array.metadata.zarr_format == zarr_format
    assert (array[:] == data).all()


def test_chunks(tmp_path: Path) -> None:
    for shape, order, chunks in (
        ((1000, 1000, 8), "C", (32, 1000, 8)),
        ((8, 1000, 1000), "F", (8, 1000, 32)),
        ((1 << 30,), "C", (1 << 18,)),
        ((), "C", ()),
        ((5, 0), "C", (5, 1)),
    ):
        location = Location.parse(tmp_path / "a.zarr")
        create_array(location, dtype=np.dtype("f4"), shape=shape, order=order, format="zarr")  # type: ignore[arg-type]
        meta = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
        assert tuple(meta["chunk_grid"]["configuration"]["chunk_shape"]) == chunks
    store = create(tmp_path / "a.zarr", chunks=(7, 9))
    assert store.info()["chunks"] == [7, 9]
    store.close()
    for wrong in ((7,), (7, 0), 7):
        with pytest.raises(FormatError, match=r"do not fit shape \(30, 40\)"):
            create(tmp_path / "a.zarr", chunks=wrong)


def test_an_array_is_replaced_and_a_group_is_not(tmp_path: Path) -> None:
    store = create(tmp_path / "a", chunks=(10, 10))
    write(store, np.ones((30, 40), "f4"))
    store.close()
    store = create(tmp_path / "a", shape=(5,))
    assert store.shape == (5,)
    assert not (tmp_path / "a" / "c").exists()
    store.close()
    for zarr_format in (2, 3):
        group = zarr.create_group(tmp_path / f"g{zarr_format}", zarr_format=zarr_format)  # type: ignore[arg-type]
        group.create_array("precious", shape=(3,), chunks=(3,), dtype="i4")[:] = 1
        with pytest.raises(FormatError, match="is a Zarr group, and would be lost"):
            create(tmp_path / f"g{zarr_format}")
        assert group["precious"][0] == 1  # type: ignore[index]


def test_what_is_no_array_is_not_replaced(tmp_path: Path) -> None:
    """Zarr would remove the whole folder."""
    photos = tmp_path / "photos.zarr"
    (photos / "2026").mkdir(parents=True)
    precious = photos / "2026" / "precious.jpg"
    precious.write_bytes(b"x")
    with pytest.raises(
        FormatError, match=r"photos\.zarr is no Zarr array, and all that is in it would be lost"
    ):
        create(photos)
    assert precious.read_bytes() == b"x"
    precious.unlink()
    create(photos).close()


@pytest.mark.parametrize("dtype", ["?", ">i2", "<c16", "M8[s]", "S5", [("a", "<i2"), ("b", "<f8")]], ids=str)
@pytest.mark.filterwarnings("ignore")  # zarr's: some of these types are not in the specification
def test_types(tmp_path: Path, dtype: Any) -> None:
    element = np.dtype(dtype)
    zarr.create_group(tmp_path / "g", zarr_format=2)
    for at in (tmp_path / "g" / "a", tmp_path / "b"):
        if element.kind == "V" and at.name == "b":
            continue
        store = create(at, dtype=element, shape=(10,))
        content = bytes(number % 2 for number in range(store.nbytes))
        buffer = bytearray(b"x" * store.nbytes)
        store.read_into(0, memoryview(buffer))
        assert buffer == bytes(store.nbytes), "an array begins as zeros"
        store.write_from(0, memoryview(content))
        store.read_into(0, memoryview(buffer))
        assert buffer == content
        store.close()


def test_what_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="is on a web server"):
        create("https://host/a.zarr")
    with pytest.raises(ModeError, match=r"take userfault\.zeros"):
        create("memory://a.zarr")
    for url, format in (("s3://bucket/a.npy", "npy"), ("s3://bucket/a", "raw"), (str(tmp_path / "a"), None)):
        with pytest.raises(ModeError, match=r"a single object.*end the URL with '/'"):
            create(url, format=format)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="cannot be created"):
        create(tmp_path / "file" / "a.zarr")
    with pytest.raises(FormatError, match="chunks= is for Zarr"):
        create("s3://bucket/a/", format="raw", chunks=(3,))


@clients
def test_s3(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    data = np.random.default_rng(1).random((30, 40), "f4")
    with s3_server(monkeypatch) as endpoint:
        import boto3

        bucket = boto3.client("s3", endpoint_url=endpoint)
        bucket.create_bucket(Bucket="created")
        bucket.put_object(Bucket="created", Key="photos/2026/precious.jpg", Body=b"x")
        with pytest.raises(FormatError, match="is no Zarr array, and all that is in it would be lost"):
            create(Location.parse("s3://created/photos", s3_options(endpoint, client), client))
        assert bucket.get_object(Bucket="created", Key="photos/2026/precious.jpg")["Body"].read() == b"x"
        for name, format in (("a.zarr/x", "zarr"), ("b/", "raw")):
            at = Location.parse(f"s3://created/{name}", s3_options(endpoint, client), client)
            if format == "raw" and client == "fsspec":
                with pytest.raises(ModeError, match="client='obstore'"):
                    create(at, format=format)
                continue
            store = create(at, format=format)
            assert isinstance(store, ObjectBlocks) is (format == "raw")
            write(store, data)
            store.write_from(100, memoryview(bytes(1000)))
            store.flush()
            store.close()
        changed = data.copy()
        changed.reshape(-1)[25:275] = 0
        remote = zarr.storage.FsspecStore.from_url(
            "s3://created/a.zarr", storage_options=s3_options(endpoint, "fsspec"), read_only=True
        )
        assert (zarr.open_array(remote, path="x", mode="r")[:] == changed).all()
        bucket.close()
