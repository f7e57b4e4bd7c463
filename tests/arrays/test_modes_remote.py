"""The modes of open() behind an S3 API: Zarr arrays and arrays in blocks are written there, single objects are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from support.counting_server import BUCKET, serve_counted
from userfault import errors

ARRAY = np.random.default_rng(1).integers(0, 99, (20, 30, 40), "i4")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """An S3 API with one object in it."""
    for module in ("moto", "flask", "obstore"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'userfault[test]'")
    folder = tmp_path_factory.mktemp("served")
    np.save(folder / "single.npy", ARRAY)
    with serve_counted("s3", folder) as server:
        yield {
            "access_key_id": "test",
            "secret_access_key": "test",
            "region": "us-east-1",
            "endpoint": server.url,
            "client_options": {"allow_http": True},
        }


def opened(key: str, mode: str, options: dict[str, Any], **more: Any) -> Any:
    return userfault.open(f"s3://{BUCKET}/{key}", mode, client="obstore", storage_options=options, **more)


@pytest.mark.parametrize("key", ["grid.zarr", "blocks/"])
def test_an_array_in_an_object_store(key: str, options: dict[str, Any], tmp_path: Path) -> None:
    block = {} if key.endswith(".zarr") else {"block": "16 KiB"}
    array = opened(key, "w+", options, dtype="i4", shape=ARRAY.shape, **block)
    assert not array.any()
    array[...] = ARRAY
    userfault.memory_of(array).flush()
    assert np.array_equal(opened(key, "r", options), ARRAY)
    del array
    again = opened(key, "r+", options)
    again[3, 4, 5] = -1
    del again
    private = opened(key, "c", options)
    private[...] = 0
    del private
    expected = ARRAY.copy()
    expected[3, 4, 5] = -1
    assert np.array_equal(opened(key, "r", options), expected)
    # Created again, it is empty again.
    assert not opened(key, "w+", options, dtype="u1", shape=5).any()


def test_a_single_object_is_not_written(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ModeError, match="single object"):
        opened("single.npy", "r+", options)
    with pytest.raises(errors.ModeError, match="single object"):
        opened("other.npy", "w+", options, dtype="u1", shape=5)
    with pytest.raises(errors.FormatError, match="offset=8"):
        opened("blocks/", "w+", options, dtype="u1", shape=5, offset=8)
    with pytest.raises(errors.SourceNotFoundError):
        opened("gone.npy", "r+", options)
    private = opened("single.npy", "c", options)
    private += 1
    assert np.array_equal(private, ARRAY + 1)
    assert np.array_equal(opened("single.npy", "r", options), ARRAY)


def test_the_memory_of_the_process_is_not_written() -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    fsspec.filesystem("memory").pipe("/userfault-test/a.raw", bytes(100))
    try:
        with pytest.raises(errors.ModeError, match="in the memory of this process"):
            userfault.open("memory://userfault-test/a.raw", "r+", dtype="u1")
        with pytest.raises(errors.ModeError, match="in the memory of this process"):
            userfault.open("memory://userfault-test/b.raw", "w+", dtype="u1", shape=10)
        private = userfault.open("memory://userfault-test/a.raw", "c", dtype="u1")
        private[:] = 1
        assert fsspec.filesystem("memory").cat("/userfault-test/a.raw") == bytes(100)
    finally:
        fsspec.filesystem("memory").rm("/userfault-test", recursive=True)
