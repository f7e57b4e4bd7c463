"""Files and arrays behind URLs: web servers good and bad, an S3 server, and the memory of this process."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from support.web import WebServer, serve
from userfault.errors import FormatError, MissingExtraError, SourceError, SourceNotFoundError, TruncatedError
from userfault.sources._abc import ArraySource, PageSource
from userfault.sources._expand import MustExpandError, expand, open_scratch
from userfault.sources._location import Client, Location
from userfault.sources._pickle import dumps
from userfault.sources._process_memory import copy_file, copy_tree
from userfault.sources._ranges import open_ranges
from userfault.sources._remote_file import RawOptions, RemoteFileRecipe, UrlRecipe, table_of
from userfault.sources._stores._dict import DictStore
from userfault.sources._zarr_object import zarr_recipe
from userfault.sources._zarr_recipe import ZarrRecipe, ZarrStoreRecipe
from userfault.testing import PageSourceTests

ARRAY = np.random.default_rng(1).integers(0, 99, (50, 60, 70), "i4")
clients = pytest.mark.parametrize("client", ["obstore", "fsspec"])


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def whole(source: PageSource) -> bytes:
    buffer = bytearray(source.nbytes)
    source.read_into(0, memoryview(buffer))
    source.close()
    return bytes(buffer)


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serve() as server:
        yield server


def at(web: WebServer, path: str, client: Client) -> Location:
    web.files.setdefault("/a.npy", npy(ARRAY))
    return Location.parse(web.url + path, client=client)


@clients
def test_a_file_is_read_in_ranges(web: WebServer, client: Client) -> None:
    location = at(web, "/a.npy", client)
    source = pickle.loads(dumps(RemoteFileRecipe(location, "npy"))).load()
    assert isinstance(source, ArraySource)
    assert (source.shape, source.dtype) == (ARRAY.shape, ARRAY.dtype)
    web.requests.clear()
    buffer = bytearray(1000)
    source.read_into(5000, memoryview(buffer))
    assert buffer == ARRAY.tobytes()[5000:6000]
    assert [(method, asked) for method, _, asked in web.requests] == [("GET", "bytes=5128-6127")]
    source.close()


@clients
@pytest.mark.parametrize("kind", ["npy", None])
def test_few_requests_to_open(web: WebServer, client: Client, kind: Any) -> None:
    location = at(web, "/a.npy", client)
    RemoteFileRecipe(location, kind).load().close()
    assert len(web.requests) <= 2
    assert [method for method, *_ in web.requests].count("GET") == 1


@clients
def test_nothing_there(web: WebServer, client: Client) -> None:
    location = at(web, "/b.npy", client)
    with pytest.raises(SourceNotFoundError, match=r"/b\.npy does not exist"):
        RemoteFileRecipe(location, "npy").load()
    with pytest.raises(SourceNotFoundError, match=r"/b\.npy does not exist"):
        UrlRecipe(location).load()


@clients
def test_no_server(client: Client) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options: dict[str, Any] = {}
    if client == "obstore":
        options["retry_config"] = {"max_retries": 0}
    location = Location.parse(f"http://127.0.0.1:{port}/a.npy", options, client)
    with pytest.raises(SourceError, match=r"/a\.npy (cannot be read|does not exist)"):
        RemoteFileRecipe(location, "npy").load()


@clients
def test_a_server_without_ranges_sends_the_file_once(web: WebServer, client: Client) -> None:
    web.ranges = False
    location = at(web, "/a.npy", client)
    with pytest.raises(MustExpandError):
        pickle.loads(pickle.dumps(RemoteFileRecipe(location, "npy"))).load()
    assert expanded(location) == web.files["/a.npy"]


@clients
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_compressed_file_is_expanded(web: WebServer, client: Client, suffix: str) -> None:
    location = at(web, "/c.npy" + suffix, client)
    web.files["/c.npy" + suffix] = gzip.compress(web.files["/a.npy"])
    with pytest.raises(MustExpandError):
        RemoteFileRecipe(location, None if suffix else "npy").load()
    assert expanded(location) == web.files["/a.npy"]


@clients
def test_a_server_that_compresses_by_itself(web: WebServer, client: Client) -> None:
    web.compresses = True
    location = at(web, "/a.npy", client)
    with pytest.raises(MustExpandError):
        RemoteFileRecipe(location, "npy").load()
    assert expanded(location) == web.files["/a.npy"]


def expanded(location: Location) -> bytes:
    reader = open_ranges(location)
    fd = open_scratch()
    try:
        return os.pread(fd, expand(reader, fd, look=True) + 1, 0)
    finally:
        os.close(fd)
        reader.close()


@clients
def test_a_read_that_fails_is_an_error(web: WebServer, client: Client) -> None:
    source = RemoteFileRecipe(at(web, "/a.npy", client), "npy").load()
    web.fails = True
    with pytest.raises(SourceError, match=r"/a\.npy"):
        source.read_into(0, memoryview(bytearray(100)))
    web.fails = False
    buffer = bytearray(100)
    source.read_into(0, memoryview(buffer))
    assert buffer == ARRAY.tobytes()[:100]
    source.close()


@clients
def test_a_file_that_became_shorter_is_an_error(web: WebServer, client: Client) -> None:
    source = RemoteFileRecipe(at(web, "/a.npy", client), "npy").load()
    web.files["/a.npy"] = web.files["/a.npy"][:1000]
    with pytest.raises(SourceError):
        source.read_into(800, memoryview(bytearray(1000)))
    source.close()


@clients
def test_what_is_told_of_raw_bytes(web: WebServer, client: Client) -> None:
    location = at(web, "/a.bin", client)
    web.files["/a.bin"] = b"head" + ARRAY.tobytes()
    source = RemoteFileRecipe(location, "raw", RawOptions("<i4", ARRAY.shape, 4, "F")).load()
    assert isinstance(source, ArraySource)
    assert (source.shape, source.order) == (ARRAY.shape, "F")
    assert whole(source) == ARRAY.tobytes()
    assert isinstance(UrlRecipe(location, RawOptions("<i4", None, 4)).load(), ArraySource)
    with pytest.raises(TruncatedError, match="but there are"):
        RemoteFileRecipe(location, "raw", RawOptions("<i4", (1000, 1000))).load()
    with pytest.raises(FormatError, match=r"neither \.npy nor \.safetensors: give dtype="):
        UrlRecipe(location).load()


@clients
def test_tensors_behind_a_url(web: WebServer, client: Client) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    location = at(web, "/m.safetensors", client)
    web.files["/m.safetensors"] = safetensors.save({"x": ARRAY})
    for recipe in (RemoteFileRecipe(location, "safetensors"), UrlRecipe(location)):
        source = recipe.load()
        table = table_of(source.info())
        assert table is not None
        assert table.tensors["x"].shape == ARRAY.shape
        assert whole(source) == ARRAY.tobytes()


@clients
@pytest.mark.parametrize(
    "options", [{}, {"shards": (25, 60, 70), "chunks": (5, 60, 70)}], ids=["plain", "sharded"]
)
def test_zarr_behind_a_url(web: WebServer, client: Client, options: dict[str, Any], tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "g.zarr"))
    array = group.create_array("deep/a", shape=ARRAY.shape, dtype="i4", **{"chunks": (10, 20, 30), **options})
    array[:30] = ARRAY[:30]
    web.add_folder(tmp_path)
    expected = np.concatenate([ARRAY[:30], np.zeros_like(ARRAY[30:])]).tobytes()
    assert whole(ZarrRecipe(at(web, "/g.zarr/deep/a", client)).load()) == expected
    assert whole(UrlRecipe(at(web, "/g.zarr/deep/a", client)).load()) == expected
    with pytest.raises(FormatError, match="is a Zarr group"):
        ZarrRecipe(at(web, "/g.zarr", client)).load()
    with pytest.raises(SourceNotFoundError, match=r"neither zarr\.json nor \.zarray"):
        ZarrRecipe(at(web, "/g.zarr/other", client)).load()


@clients
class TestRemoteFile(PageSourceTests):
    reads = 20

    @pytest.fixture(autouse=True)
    def _server(self, client: Client) -> Iterator[None]:
        with serve() as web:
            self.location = at(web, "/a.npy", client)
            yield

    def recipe(self) -> RemoteFileRecipe:
        return RemoteFileRecipe(self.location, "npy")

    def source(self) -> PageSource:
        return self.recipe().load()

    def expected(self) -> bytes:
        return ARRAY.tobytes()


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def s3_options(endpoint: str, client: Client) -> dict[str, Any]:
    if client == "fsspec":
        return {"endpoint_url": endpoint}
    return {"endpoint": endpoint, "client_options": {"allow_http": True}}


@clients
def test_s3(monkeypatch: pytest.MonkeyPatch, client: Client, tmp_path: Path) -> None:
    with s3_server(monkeypatch) as endpoint:
        options = s3_options(endpoint, client)
        upload(endpoint, tmp_path)
        npy_at = Location.parse("s3://bucket/folder/a.npy", options, client)
        assert whole(pickle.loads(dumps(RemoteFileRecipe(npy_at, "npy"))).load()) == ARRAY.tobytes()
        assert (
            whole(ZarrRecipe(Location.parse("s3://bucket/z.zarr", options, client)).load()) == ARRAY.tobytes()
        )
        for name in ("encoded.npy", "c.npy.gz"):
            location = Location.parse(f"s3://bucket/{name}", options, client)
            with pytest.raises(MustExpandError):
                RemoteFileRecipe(location).load()
            assert expanded(location) == npy(ARRAY)
        with pytest.raises(SourceNotFoundError, match="does not exist"):
            RemoteFileRecipe(Location.parse("s3://bucket/b.npy", options, client), "npy").load()
        with pytest.raises(SourceError):
            RemoteFileRecipe(Location.parse("s3://other/b.npy", options, client), "npy").load()


def upload(endpoint: str, folder: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="folder/a.npy", Body=npy(ARRAY))
    packed = gzip.compress(npy(ARRAY))
    client.put_object(Bucket="bucket", Key="encoded.npy", Body=packed, ContentEncoding="gzip")
    client.put_object(Bucket="bucket", Key="c.npy.gz", Body=packed)
    zarr.create_array(str(folder / "z.zarr"), data=ARRAY, chunks=(25, 30, 35))
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="bucket", Key=str(path.relative_to(folder)), Body=path.read_bytes())
    client.close()


@pytest.fixture
def memory() -> Iterator[Any]:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.pipe("/mine/a.npy", npy(ARRAY))
    yield fs
    fs.rm("/", recursive=True)


def test_the_memory_of_this_process_is_copied(memory: Any) -> None:
    assert copy_file(Location.parse("memory://mine/a.npy")) == npy(ARRAY)
    assert copy_file(Location.parse("memory://mine")) is None
    assert copy_tree(Location.parse("memory://mine")) == {"a.npy": npy(ARRAY)}
    with pytest.raises(SourceNotFoundError):
        copy_file(Location.parse("memory://mine/b.npy"))
    with pytest.raises(SourceNotFoundError):
        copy_tree(Location.parse("memory://yours"))


def test_zarr_in_the_memory_of_this_process(memory: Any) -> None:
    store = zarr.storage.FsspecStore.from_url("memory://mine/g.zarr")
    group = zarr.create_group(store)
    group.create_array("deep/a", data=ARRAY, chunks=(10, 20, 30))
    content = copy_tree(Location.parse("memory://mine/g.zarr/deep/a"))
    recipe = ZarrStoreRecipe(DictStore(content, "memory://mine/g.zarr/deep/a"), "a")
    assert whole(pickle.loads(dumps(recipe)).load()) == ARRAY.tobytes()
    # And an open array of it, found by its store.
    recipe = zarr_recipe(group["deep/a"], None)  # type: ignore[assignment]
    assert whole(pickle.loads(dumps(recipe)).load()) == ARRAY.tobytes()


def test_open_arrays_of_zarr_are_found_again(tmp_path: Path) -> None:
    zip_store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="w")
    zarr.create_group(zip_store).create_array("deep/a", data=ARRAY, chunks=(10, 20, 30))
    zip_store.close()
    stores: list[Any] = [zarr.storage.MemoryStore(), str(tmp_path / "g.zarr")]
    groups = [zarr.create_group(store) for store in stores]
    for group in groups:
        group.create_array("deep/a", data=ARRAY, chunks=(10, 20, 30))
    zip_store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="r")
    groups.append(zarr.open_group(zip_store, mode="r"))
    for group in groups:
        recipe = pickle.loads(dumps(zarr_recipe(group["deep/a"], None)))
        source = recipe.load()
        assert whole(source) == ARRAY.tobytes()
        if hasattr(recipe, "store"):
            recipe.store.close()
    with pytest.raises(FormatError, match="is not an array: open one of those in it"):
        zarr_recipe(groups[0], None)
    zip_store.close()


def test_which_library_reads_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(url: str, options: Any = None, client: Any = None) -> str:
        return Location.parse(url, options, client).choose_client()

    assert chosen("s3://bucket/a.npy") == chosen("https://host/a.npy") == "obstore"
    assert chosen("s3://bucket/a.npy", {"anon": True}) == "fsspec"
    assert chosen("s3://bucket/a.npy", {"region": "x"}, "obstore") == "obstore"
    assert chosen("https://host/a.npy?signature=1") == "fsspec"
    assert chosen("ftp://host/a.npy") == chosen("zip://a.npy::s3://bucket/b.zip") == "fsspec"

    installed = {"obstore"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert chosen("s3://bucket/a.npy", {"anon": True}) == "obstore"
    with pytest.raises(MissingExtraError, match=r"needs fsspec: pip install 'userfault\[fsspec\]'"):
        chosen("ftp://host/a.npy")
    with pytest.raises(MissingExtraError, match=r"needs fsspec: pip install 'userfault\[fsspec\]'"):
        chosen("s3://bucket/a.npy", client="fsspec")
    installed.clear()
    with pytest.raises(MissingExtraError, match=r"needs obstore: pip install 'userfault\[obstore\]'"):
        chosen("s3://bucket/a.npy")


def test_locations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.parse("a.npy").url == str(tmp_path / "a.npy")
    assert Location.parse(Path("a.npy")).is_local
    assert Location.parse("file:///data/a%20b.npy").url == "/data/a b.npy"
    assert Location.parse("file://localhost/data/a.npy").url == "/data/a.npy"
    assert Location.parse("s3://bucket/x/a.npy").name == "a.npy"
    assert Location.parse("https://host/a.npy?x=/b").name == "a.npy"
    assert Location.parse("zip::s3://bucket/a.zip").scheme == "zip"
    assert (Location.parse("s3://bucket/g.zarr/") / "a").url == "s3://bucket/g.zarr/a"
    (tmp_path / "a::b.npy").touch()
    assert Location.parse("a::b.npy").url == str(tmp_path / "a::b.npy")
    for bad in ("", "file://elsewhere/a.npy", b"bytes"):
        with pytest.raises(FormatError):
            Location.parse(bad)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="client='curl' is not known"):
        Location.parse("s3://bucket/a", client="curl")  # type: ignore[arg-type]
