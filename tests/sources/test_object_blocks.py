"""Arrays kept in an object store, an object for each block."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sources.test_remote import s3_options, s3_server
from support.web import serve
from userfault.errors import (
    FormatError,
    ModeError,
    RangeError,
    SourceError,
    SourceNotFoundError,
    TruncatedError,
    UnsupportedDtypeError,
)
from userfault.sources import ObjectBlocks
from userfault.sources._abc import PageStore, describe
from userfault.sources._location import Location
from userfault.sources._object_blocks import ObjectBlocksRecipe
from userfault.sources._remote_file import UrlRecipe
from userfault.testing import PageStoreTests

# Not imported here: the test that is the first to use it starts threads that stay.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("obstore") is None, reason="needs obstore")

BLOCK = 4096


def local_store(folder: Path) -> Any:
    from obstore.store import LocalStore

    return LocalStore(folder)


def make(folder: Path, nbytes: int = 10_000, prefix: str = "a") -> ObjectBlocks:
    return ObjectBlocks.create(local_store(folder), prefix, dtype="u1", shape=nbytes, block=BLOCK)


def whole(blocks: ObjectBlocks) -> bytes:
    buffer = bytearray(b"\xa5" * blocks.nbytes)
    blocks.read_into(0, memoryview(buffer))
    return bytes(buffer)


def test_the_objects_are_what_is_documented(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    blocks = ObjectBlocks.create(store, "x/y", dtype="<f4", shape=(3, 1000), order="F", block=BLOCK)
    at = tmp_path / "x" / "y"
    assert json.loads((at / "blocks.json").read_text()) == {
        "format": "userfault-blocks",
        "version": 1,
        "block": 4096,
        "nbytes": 12_000,
        "dtype": "<f4",
        "shape": [3, 1000],
        "order": "F",
    }
    assert whole(blocks) == bytes(12_000)
    blocks.write_from(8190, memoryview(b"abcd"))
    assert {path.name: path.stat().st_size for path in at.iterdir() if path.name != "blocks.json"} == {
        "00000001": 4096,
        "00000002": 12_000 - 8192,
    }
    assert (at / "00000001").read_bytes() == bytes(4094) + b"ab"
    again = ObjectBlocks(store, "x/y")
    assert (again.dtype, again.shape, again.order) == (np.dtype("<f4"), (3, 1000), "F")
    assert (again.block, again.write_unit, again.name) == (4096, 4096, "y")
    description = describe(again)
    assert description.writable
    assert description.affinity


def test_a_block_that_is_written_whole_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    blocks = make(tmp_path)
    read = []
    get_range = obstore.get_range

    def counted(store: Any, path: str, **range_: int) -> Any:
        read.append(path)
        return get_range(store, path, **range_)  # type: ignore[call-overload]

    monkeypatch.setattr(obstore, "get_range", counted)
    blocks.write_from(0, memoryview(os.urandom(8192)))
    blocks.write_from(8192, memoryview(os.urandom(10_000 - 8192)))
    assert read == []
    blocks.write_from(4000, memoryview(os.urandom(5000)))
    assert read == ["a/00000000", "a/00000002"]


def test_creating_replaces_the_array_and_nothing_else(tmp_path: Path) -> None:
    blocks = make(tmp_path)
    blocks.write_from(0, memoryview(b"x" * 10_000))
    for name in ("a/README", "ab/00000000", "00000000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not yours")
    assert whole(make(tmp_path, 5000)) == bytes(5000)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "a/blocks.json",
        "a/README",
        "ab/00000000",
        "00000000",
    }


def test_an_array_that_was_removed_is_not_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userfault.sources._object_blocks._TRUSTED_NS", 0)
    blocks = make(tmp_path)
    assert whole(blocks) == bytes(10_000)
    (tmp_path / "a" / "blocks.json").unlink()
    with pytest.raises(SourceNotFoundError, match=r"blocks\.json does not exist"):
        whole(blocks)
    with pytest.raises(SourceNotFoundError):
        blocks.write_from(0, memoryview(b"x"))
    assert not (tmp_path / "a" / "00000000").exists()


def test_a_block_that_is_too_short(tmp_path: Path) -> None:
    blocks = make(tmp_path)
    (tmp_path / "a" / "00000000").write_bytes(b"x" * 4000)
    with pytest.raises((TruncatedError, SourceError), match="00000000"):
        whole(blocks)
    # And no part of it is taken for all of it.
    with pytest.raises((TruncatedError, SourceError), match="00000000"):
        blocks.write_from(0, memoryview(b"y"))
    assert (tmp_path / "a" / "00000000").read_bytes() == b"x" * 4000


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"nbytes": 1},
        {"dtype": "no"},
        {"shape": "x"},
        {"block": 0},
        {"order": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_document_of_something_else(tmp_path: Path, change: dict[str, Any]) -> None:
    make(tmp_path)
    at = tmp_path / "a" / "blocks.json"
    at.write_text(json.dumps(json.loads(at.read_text()) | change))
    with pytest.raises(FormatError, match=r"blocks\.json does not describe an array in blocks"):
        ObjectBlocks(local_store(tmp_path), "a")


def test_what_cannot_be_created(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    for block in (0, 2048, 5000):
        with pytest.raises(RangeError, match=f"block={block} is not a power of two"):
            ObjectBlocks.create(store, "a", dtype="u1", shape=1, block=block)
    with pytest.raises(UnsupportedDtypeError):
        ObjectBlocks.create(store, "a", dtype="O", shape=1)
    with pytest.raises(SourceNotFoundError):
        ObjectBlocks(store, "a")


def test_an_array_without_elements(tmp_path: Path) -> None:
    blocks = make(tmp_path, 0)
    assert blocks.nbytes == 0
    blocks.write_from(0, memoryview(b""))
    assert whole(blocks) == b""


def test_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch) as endpoint:
        import boto3

        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="blocks")
        at = Location.parse("s3://blocks/folder/a/", s3_options(endpoint, "obstore"), "obstore")
        ObjectBlocksRecipe(at, "r+").create(np.dtype("i4"), (3000,), "C", 4096)
        data = np.arange(3000, dtype="i4")
        # Nothing but the URL: there is no file, no Zarr array, but blocks.
        store = UrlRecipe(at, mode="r+").load()
        assert isinstance(store, PageStore)
        store.write_from(0, memoryview(data).cast("B"))
        store.write_from(4000, memoryview(bytes(8)))
        data[1000:1002] = 0
        reader = UrlRecipe(at).load()
        assert isinstance(reader, ObjectBlocks)
        assert whole(reader) == data.tobytes()
        keys = [item["Key"] for item in client.list_objects_v2(Bucket="blocks")["Contents"]]
        assert keys == [f"folder/a/{name}" for name in ("00000000", "00000001", "00000002", "blocks.json")]
        client.put_object(Bucket="blocks", Key="b.npy", Body=b"x")
        single = Location.parse("s3://blocks/b.npy", s3_options(endpoint, "obstore"), "obstore")
        with pytest.raises(ModeError, match=r"single object, which cannot be written in part.*ObjectBlocks"):
            UrlRecipe(single, mode="r+").load()
        nothing = Location.parse("s3://blocks/none/", s3_options(endpoint, "obstore"), "obstore")
        with pytest.raises(SourceNotFoundError, match="none"):
            UrlRecipe(nothing, mode="r+").load()
        client.close()


def test_a_web_server_takes_no_writes() -> None:
    with serve() as web:
        at = Location.parse(f"{web.url}/a/")
        with pytest.raises(ModeError, match="is on a web server and cannot be written"):
            ObjectBlocksRecipe(at, "r+").load()


class TestObjectBlocks(PageStoreTests):
    reads = 40

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.at = tmp_path
        self.made = 0

    def store(self) -> PageStore:
        self.made += 1
        blocks = make(self.at, 300_001, f"array/{self.made}")
        blocks.write_from(0, memoryview(self.expected()))
        return blocks

    def expected(self) -> bytes:
        return random.Random(1).randbytes(300_001)

    @contextlib.contextmanager
    def failing(self, store: PageStore) -> Iterator[None]:
        """Some puts fail, and some have been done by then."""
        import obstore

        put = obstore.put

        def sometimes(store: Any, path: str, content: Any, **options: Any) -> Any:
            if path.endswith("5"):
                raise PermissionError("not today")
            return put(store, path, content, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(obstore, "put", sometimes)
            yield
