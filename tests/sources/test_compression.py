"""Compressed files: told by name, first bytes and server; expanded into a file without a name; never half."""

from __future__ import annotations

import bz2
import errno
import gzip
import importlib.util
import lzma
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from userfault.errors import FormatError, MissingExtraError, SourceError, TruncatedError
from userfault.sources._compression import by_encoding, by_magic, by_suffix, decompress, strip_suffix
from userfault.sources._expand import expand, open_scratch
from userfault.sources._ranges._local import LocalReader
from userfault.sources._ranges._memory import MemoryReader


def zstd(content: bytes) -> bytes:
    return bytes(
        importlib.import_module("zstandard").ZstdCompressor(level=1, write_checksum=True).compress(content)
    )


def lz4(content: bytes) -> bytes:
    return bytes(importlib.import_module("lz4.frame").compress(content))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda content: gzip.compress(content, 1),
    "bz2": lambda content: bz2.compress(content, 1),
    "xz": lambda content: lzma.compress(content, preset=0),
    "zstd": zstd,
    "lz4": lz4,
}
SUFFIX = {"gzip": ".gz", "bz2": ".bz2", "xz": ".xz", "zstd": ".zst", "lz4": ".lz4"}
CONTENT = random.Random(1).randbytes(300_000) + bytes(3_000_000)

kinds = pytest.mark.parametrize("kind", sorted(COMPRESS))


def in_pieces(content: bytes, size: int = 10_000) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def expand_bytes(content: bytes, name: str, look: bool = True) -> bytes:
    fd = open_scratch()
    try:
        count = expand(MemoryReader(content, name), fd, look=look)
        assert os.fstat(fd).st_size == count
        return os.pread(fd, count + 1, 0)
    finally:
        os.close(fd)


@kinds
def test_told_by_name_and_first_bytes(kind: Any) -> None:
    assert by_suffix(f"a.npy{SUFFIX[kind]}") == by_suffix(f"A.NPY{SUFFIX[kind].upper()}") == kind
    assert strip_suffix(f"a.npy{SUFFIX[kind]}") == "a.npy"
    assert by_magic(COMPRESS[kind](b"abc")[:8]) == kind


def test_told_by_the_server() -> None:
    assert by_encoding("gzip") == by_encoding(" GZIP") == "gzip"
    assert by_encoding("zstd") == "zstd"
    with pytest.raises(FormatError, match="Content-Encoding 'br' is not known"):
        by_encoding("br")


@kinds
@pytest.mark.parametrize("content", [b"", b"x", CONTENT], ids=["empty", "short", "long"])
def test_expanded(kind: Any, content: bytes) -> None:
    assert expand_bytes(COMPRESS[kind](content), f"a.bin{SUFFIX[kind]}", look=False) == content


@kinds
def test_several_streams_one_after_the_other(kind: Any) -> None:
    compressed = COMPRESS[kind](b"first") + COMPRESS[kind](CONTENT) + COMPRESS[kind](b"last")
    assert b"".join(decompress(in_pieces(compressed), kind, "a")) == b"first" + CONTENT + b"last"


@kinds
@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_cut_short_is_an_error(kind: Any, part: float) -> None:
    compressed = COMPRESS[kind](CONTENT)
    with pytest.raises(TruncatedError, match=rf"a\.bin.* is truncated: its {kind} stream has no end"):
        expand_bytes(compressed[: int(len(compressed) * part)], "a.bin" + SUFFIX[kind])


@kinds
def test_damage_is_an_error(kind: Any) -> None:
    compressed = bytearray(COMPRESS[kind](CONTENT))
    for at in range(100, 200):
        compressed[at] ^= 0xFF
    # lz4 alone has no checksum of its content, and finds damage only where the format breaks.
    if kind == "lz4":
        compressed[7:15] = b"\xff" * 8
    with pytest.raises(FormatError, match=r"is damaged|is truncated"):
        expand_bytes(bytes(compressed), "a.bin" + SUFFIX[kind])


@kinds
def test_pieces_are_bounded(kind: Any) -> None:
    """A small file may be a large one: it is never in memory as a whole."""
    compressed = COMPRESS[kind](bytes(200 << 20))
    longest = total = 0
    for piece in decompress(in_pieces(compressed, 1 << 20), kind, "a"):
        longest, total = max(longest, len(piece)), total + len(piece)
    assert total == 200 << 20
    assert longest <= 32 << 20


def test_a_name_that_promises_what_is_not_there() -> None:
    with pytest.raises(FormatError, match=r"is named like a gzip file but begins with b'plain'"):
        expand_bytes(b"plain", "a.gz")


def test_looking_is_a_choice() -> None:
    content = gzip.compress(b"abc")
    assert expand_bytes(content, "a.bin", look=True) == b"abc"
    assert expand_bytes(content, "a.bin", look=False) == content


def test_the_readers_error_is_told_not_the_decoders() -> None:
    class Failing(MemoryReader):
        def stream(self) -> Iterator[bytes]:
            yield self.content[:100]
            raise SourceError("the line went dead")

    fd = open_scratch()
    try:
        with pytest.raises(SourceError, match="the line went dead"):
            expand(Failing(gzip.compress(CONTENT), "a.gz"), fd, look=True)
    finally:
        os.close(fd)


def test_the_scratch_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERFAULT_SCRATCH", str(tmp_path))
    fd = open_scratch()
    try:
        assert not list(tmp_path.iterdir())
        assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_no_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERFAULT_SCRATCH", "/nonexistent/folder")
    with pytest.raises(
        SourceError, match=r"no scratch file can be made in /nonexistent/folder.*USERFAULT_SCRATCH"
    ):
        open_scratch()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT))
    reader = LocalReader(str(tmp_path / "a.gz"))
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(SourceError, match="does not fit into the scratch folder") as caught:
            expand(reader, fd, look=True)
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(fd)
        reader.close()


@pytest.mark.parametrize(("kind", "module"), [("zstd", "zstandard"), ("lz4", "lz4")])
def test_a_missing_package_is_named(kind: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = COMPRESS[kind](b"abc")
    find_spec = importlib.util.find_spec
    hidden = {module, "compression"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name))
    with pytest.raises(MissingExtraError) as caught:
        expand_bytes(compressed, "a" + SUFFIX[kind])
    assert (
        str(caught.value) == f"expanding a{SUFFIX[kind]} needs {module}: pip install 'userfault[compression]'"
    )
