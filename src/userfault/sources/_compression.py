"""Compressed files: which format, and their content in bounded memory."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Iterator
from typing import Any, Literal

from userfault.errors import FormatError, MissingExtraError, TruncatedError, UserfaultError

__all__ = ["Compression", "by_encoding", "by_magic", "by_suffix", "decompress", "strip_suffix"]

Compression = Literal["gzip", "zstd", "bz2", "xz", "lz4"]

_SUFFIXES: dict[str, Compression] = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lz4": "lz4",
}
_MAGICS: dict[bytes, Compression] = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_ENCODINGS: dict[str, Compression] = {"gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"}

_PIECE_NBYTES = 1 << 20
# The decoder has no limit on its output for an input, and 4 bytes may mean 128 KiB: small inputs bound it.
_ZSTD_INPUT_NBYTES = 512


def by_suffix(name: str) -> Compression | None:
    """Return the compression that a file name says."""
    return next((kind for suffix, kind in _SUFFIXES.items() if name.lower().endswith(suffix)), None)


def strip_suffix(name: str) -> str:
    """Return a file name without the suffix of its compression."""
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def by_magic(head: bytes) -> Compression | None:
    """Return the compression that the first bytes of a file say."""
    return next((kind for magic, kind in _MAGICS.items() if head.startswith(magic)), None)


def by_encoding(encoding: str) -> Compression:
    """Return the compression that a `Content-Encoding` says.

    Raises:
        FormatError: It is not known.
    """
    try:
        return _ENCODINGS[encoding.strip().lower()]
    except KeyError:
        known = ", ".join(sorted(_ENCODINGS))
        raise FormatError(f"Content-Encoding {encoding!r} is not known; known are {known}") from None


def decompress(pieces: Iterator[bytes], kind: Compression, name: str) -> Iterator[bytes]:
    """Return the content of a compressed file, in pieces.

    Args:
        pieces: The file.
        kind: How it is compressed.
        name: What to call it in messages.

    Raises:
        FormatError: It is damaged, or not compressed in this way.
        TruncatedError: It ends too early.
        MissingExtraError: The package for it is not installed.
    """
    source = _Pieces(pieces)
    content = _zstd(source, name) if kind == "zstd" else _file_pieces(_open_file(source, kind, name))
    while True:
        try:
            piece = next(content)
        except StopIteration:
            return
        except Exception as error:  # each decoder has errors of its own; for gzip and bz2 it is OSError
            if source.error is not None:
                raise source.error from None
            if isinstance(error, UserfaultError | MemoryError):
                raise
            if isinstance(error, EOFError):
                raise TruncatedError(f"{name} is truncated: its {kind} stream has no end") from error
            raise FormatError(f"{name} is damaged, or not {kind}: {error}") from error
        yield piece


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file that can be read once; it remembers the error of whoever gives them."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._pieces))
            except StopIteration:
                return 0
            except Exception as error:
                self.error = error
                raise
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _open_file(source: _Pieces, kind: Compression, name: str) -> Any:
    buffered = io.BufferedReader(source, _PIECE_NBYTES)
    match kind:
        case "gzip":
            return importlib.import_module("gzip").GzipFile(fileobj=buffered, mode="rb")
        case "bz2":
            return importlib.import_module("bz2").BZ2File(buffered, "rb")
        case "xz":
            return importlib.import_module("lzma").LZMAFile(buffered, "rb")
        case _:
            if importlib.util.find_spec("lz4") is None:
                raise MissingExtraError.for_module("lz4", "compression", f"expanding {name}")
            return importlib.import_module("lz4.frame").LZ4FrameFile(buffered, "rb")


def _file_pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(_PIECE_NBYTES):
        yield piece


def _zstd(source: _Pieces, name: str) -> Iterator[bytes]:
    """Frames of zstd; the file interface of the library does not notice a missing end."""
    make, damage = _zstd_decoder(name)
    decoder = None
    empty = True
    while data := source.read(_ZSTD_INPUT_NBYTES):
        empty = False
        while data:
            decoder = decoder or make()
            try:
                content = decoder.decompress(data)
            except damage as error:
                raise FormatError(f"{name} is damaged, or not zstd: {error}") from error
            if content:
                yield content
            data = b""
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    if decoder is not None or empty:
        raise EOFError


def _zstd_decoder(name: str) -> tuple[Any, type[Exception]]:
    """Return what makes a decoder of one frame, and its error."""
    if importlib.util.find_spec("zstandard") is not None:
        zstandard = importlib.import_module("zstandard")
        return (lambda: zstandard.ZstdDecompressor().decompressobj()), zstandard.ZstdError
    # Python 3.14 has it itself.
    if importlib.util.find_spec("compression") is not None:
        zstd = importlib.import_module("compression.zstd")
        return zstd.ZstdDecompressor, zstd.ZstdError
    raise MissingExtraError.for_module("zstandard", "compression", f"expanding {name}")
