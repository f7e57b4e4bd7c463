"""Zarr arrays that are damaged, cut short, gone, or something else: errors, never bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from support.zarrs import content_of
from userfault.errors import FormatError, SourceError, SourceNotFoundError
from userfault.sources._location import Location
from userfault.sources._zarr_recipe import ZarrRecipe


class Local:
    """An array in a folder, for the tests that damage it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder / "a.zarr"
        options = {"shape": (16, 64), "chunks": (4, 64), "dtype": "i4", **options}
        self.array = zarr.create_array(str(self.folder), **options)
        self.array[:] = np.arange(1024).reshape(16, 64)
        self.source = ZarrRecipe(Location.parse(self.folder)).load()

    def chunk(self, *place: int) -> Path:
        return self.folder / self.array.metadata.encode_chunk_key(place)

    def read(self) -> bytes:
        buffer = bytearray(self.source.nbytes)
        self.source.read_into(0, memoryview(buffer))
        return bytes(buffer)


@pytest.mark.parametrize(
    ("zarr_format", "compressors"),
    [
        (3, zarr.codecs.ZstdCodec()),
        (3, zarr.codecs.BloscCodec()),
        (3, zarr.codecs.GzipCodec()),
        (3, (zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec())),
        (3, ()),
        (2, numcodecs.LZ4()),
        (2, numcodecs.Zlib()),
        (2, numcodecs.BZ2()),
    ],
    ids=["zstd", "blosc", "gzip", "zstd-crc32c", "none", "v2-lz4", "v2-zlib", "v2-bz2"],
)
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.98])
def test_truncated_chunks_are_errors_never_bytes(
    tmp_path: Path, zarr_format: int, compressors: Any, part: float
) -> None:
    local = Local(tmp_path, zarr_format=zarr_format, compressors=compressors)
    try:
        chunk = local.chunk(2, 0)
        whole = chunk.read_bytes()
        chunk.write_bytes(whole[: min(int(len(whole) * part), len(whole) - 1)])
        for _ in range(2):  # a failure is not remembered as content
            with pytest.raises(SourceError, match=r"a\.zarr/(c/)?2[./]0"):
                local.read()
        chunk.write_bytes(whole)
        assert local.read() == np.arange(1024, dtype="i4").tobytes()
    finally:
        local.source.close()


@pytest.mark.parametrize(
    "compressors",
    [zarr.codecs.ZstdCodec(), zarr.codecs.BloscCodec(), zarr.codecs.GzipCodec(), ()],
    ids=["zstd", "blosc", "gzip", "none"],
)
@pytest.mark.parametrize("rows", [3, 5])
def test_chunks_of_another_size_are_errors(tmp_path: Path, compressors: Any, rows: int) -> None:
    """A decoder that is given a larger buffer fills a part of it, and says nothing."""
    local = Local(tmp_path, compressors=compressors)
    other = zarr.create_array({}, shape=(rows, 64), chunks=(rows, 64), dtype="i4", compressors=compressors)
    other[:] = 1
    try:
        local.chunk(1, 0).write_bytes(content_of(other)["c/0/0"])
        with pytest.raises(SourceError):
            local.read()
    finally:
        local.source.close()


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    local = Local(tmp_path, compressors=(zarr.codecs.Crc32cCodec(),))
    try:
        chunk = local.chunk(0, 0)
        content = bytearray(chunk.read_bytes())
        content[100] ^= 1
        chunk.write_bytes(content)
        with pytest.raises(SourceError, match="checksum"):
            local.read()
    finally:
        local.source.close()


def test_a_chunk_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    local = Local(tmp_path)
    try:
        chunk = local.chunk(0, 0)
        chunk.unlink()
        chunk.symlink_to(chunk)  # ELOOP for root, too
        with pytest.raises(OSError, match="symbolic links"):
            local.read()
    finally:
        local.source.close()


def test_an_array_that_was_removed_does_not_become_fill_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("userfault.sources._zarr._TRUSTED_NS", -1)
    local = Local(tmp_path, fill_value=5)
    try:
        local.chunk(1, 0).unlink()
        local.read()  # a chunk alone may be missing
        local.source.set_cache(0)
        shutil.rmtree(local.folder)
        with pytest.raises(SourceNotFoundError, match="is gone"):
            local.read()
    finally:
        local.source.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_groups_name_their_arrays(tmp_path: Path, zarr_format: Any) -> None:
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w", zarr_format=zarr_format)
    group.create_array("t2m", shape=(2,), dtype="f4")
    group.create_group("deep").create_array("u10", shape=(2,), dtype="f4")
    with pytest.raises(FormatError, match=r"is a Zarr group.*deep/u10, t2m"):
        ZarrRecipe(Location.parse(tmp_path / "g.zarr")).load()
    source = ZarrRecipe(Location.parse(tmp_path / "g.zarr" / "deep" / "u10")).load()
    assert source.shape == (2,)
    source.close()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"neither zarr\.json nor \.zarray"):
        ZarrRecipe(Location.parse(tmp_path)).load()


def test_metadata_that_nobody_understands(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array", "shape": "large"}')
    with pytest.raises(FormatError, match="not an array that zarr can read"):
        ZarrRecipe(Location.parse(tmp_path)).load()
