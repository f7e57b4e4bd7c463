"""Decoders of compressed bytes that write where they are told to, and refuse data of any other length.

numcodecs decodes into a given buffer, but says nothing if the data is shorter than that, and leaves the rest
as it was. So the length is read from the compressed data first; where that does not tell, the result is
checked before it is copied.
"""

from __future__ import annotations

import importlib
import importlib.util
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt

from userfault.errors import FormatError, TruncatedError

__all__ = ["CRC32C_AT_END", "Decoder", "make_decoder"]

Bytes = npt.NDArray[np.uint8]
# Zarr v3's checksum; numcodecs has one of the same name that may put it at either end.
CRC32C_AT_END = "userfault.crc32c"
# Below this share of a chunk, decoding only the beginning is worth what it costs if the rest is wanted later.
_MOST_PREFIX = 0.8


class Decoder(ABC):
    """Undoes one codec."""

    @abstractmethod
    def decode(self, data: Any) -> Any:
        """Return the decoded `data`, anything with a buffer."""

    def decode_into(self, data: Any, out: Bytes) -> None:
        """Decode `data` into `out`.

        Raises:
            FormatError: It is not exactly as long as `out`.
        """
        decoded = self.decode(data)
        # A filter may give an array of elements, a compressor bytes: its bytes are what counts.
        array = decoded if isinstance(decoded, np.ndarray) else np.frombuffer(decoded, np.uint8)
        if array.nbytes != out.nbytes:
            raise FormatError(f"a chunk decodes to {array.nbytes} bytes instead of {out.nbytes}")
        out[...] = array.reshape(-1, order="A").view(np.uint8)

    def decode_prefix(self, data: Any, out: Bytes, need: int) -> int:
        """Decode at least the first `need` bytes into `out`; return how many were decoded."""
        self.decode_into(data, out)
        return len(out)


class _Numcodecs(Decoder):
    """Any codec of numcodecs."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._codec = numcodecs.get_codec(dict(config))

    def decode(self, data: Any) -> Any:
        return self._codec.decode(data)


class _SizedNumcodecs(_Numcodecs):
    """A codec whose data begins with its decoded length."""

    def __init__(self, config: Mapping[str, Any], decoded_length: Callable[[Any], int | None]) -> None:
        super().__init__(config)
        self._decoded_length = decoded_length

    def decode_into(self, data: Any, out: Bytes) -> None:
        if self._decoded_length(data) == len(out):
            self._codec.decode(data, out)
        else:
            super().decode_into(data, out)


class _Zstd(_SizedNumcodecs):
    """Zstandard; the beginning of a chunk alone if a library that streams is installed."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, _zstd_length)
        self._streams = _zstd_streams()

    def decode_prefix(self, data: Any, out: Bytes, need: int) -> int:
        # The frame must say that it is all of the chunk: the bytes after a prefix are never looked at.
        if self._streams is not None and need < len(out) * _MOST_PREFIX and _zstd_length(data) == len(out):
            view = out.data
            filled = 0
            with self._streams(data) as stream:
                while filled < need and (read := stream.readinto(view[filled:need])):
                    filled += read
            if filled >= need:
                return filled
        return super().decode_prefix(data, out, need)


class _Zlib(Decoder):
    """Deflate in a zlib or gzip wrapper, by zlib itself: numcodecs goes through file objects for gzip."""

    def __init__(self, config: Mapping[str, Any], wbits: int) -> None:
        self._whole = _Numcodecs(config)
        self._wbits = wbits

    def decode(self, data: Any) -> Any:
        return self._whole.decode(data)

    def decode_into(self, data: Any, out: Bytes) -> None:
        stream = zlib.decompressobj(self._wbits)
        # One byte more than is wanted, so that longer data is noticed.
        decoded = stream.decompress(data, len(out) + 1)
        if stream.eof and not stream.unused_data and len(decoded) == len(out):
            out[...] = np.frombuffer(decoded, np.uint8)
        else:
            super().decode_into(data, out)

    def decode_prefix(self, data: Any, out: Bytes, need: int) -> int:
        if need < len(out) * _MOST_PREFIX:
            decoded = zlib.decompressobj(self._wbits).decompress(data, need)
            if len(decoded) == need:
                out[:need] = np.frombuffer(decoded, np.uint8)
                return need
        return super().decode_prefix(data, out, need)


class _Crc32c(Decoder):
    """The checksum of Zarr v3: four bytes at the end."""

    def __init__(self) -> None:
        self._value: Callable[[bytes], int] = importlib.import_module("google_crc32c").value

    def decode(self, data: Any) -> Any:
        view = memoryview(data).cast("B")
        if len(view) < 4:
            raise TruncatedError(f"a chunk of {len(view)} bytes is too short for its checksum")
        content = bytes(view[:-4])
        if struct.pack("<I", self._value(content)) != bytes(view[-4:]):
            raise FormatError("the checksum of a chunk does not match: its data is damaged")
        return content


def make_decoder(config: Mapping[str, Any]) -> Decoder:
    """Return the decoder for a codec by its numcodecs configuration.

    Raises:
        ValueError: numcodecs does not know it.
    """
    match config["id"]:
        case "zstd":
            return _Zstd(config)
        case "blosc":
            # Blosc's own threads hold the GIL and a lock; without them, each of ours decodes a chunk. zarr does so too.
            numcodecs.blosc.use_threads = False
            return _SizedNumcodecs(config, _blosc_length)
        case "lz4":
            return _SizedNumcodecs(config, _lz4_length)
        case "gzip":
            return _Zlib(config, 16 + zlib.MAX_WBITS)
        case "zlib":
            return _Zlib(config, zlib.MAX_WBITS)
        case id_ if id_ == CRC32C_AT_END:
            return _Crc32c()
        case _:
            return _Numcodecs(config)


def _zstd_length(data: Any) -> int | None:
    """Return the content size in the first frame's header, None if it has none.

    The layout is in RFC 8878, 3.1.1.1.
    """
    header = bytes(memoryview(data)[:18])
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    position = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    field = header[position : position + size]
    if size == 0 or len(field) < size:
        return None
    return int.from_bytes(field, "little") + (256 if size == 2 else 0)


def _blosc_length(data: Any) -> int | None:
    if len(data) < 16:
        raise TruncatedError(f"a chunk of {len(data)} bytes is too short for Blosc's header")
    decoded, _, encoded = struct.unpack_from("<III", data, 4)
    # Blosc trusts its header and would read beyond the end of the data.
    if encoded > len(data):
        raise TruncatedError(f"a chunk has {len(data)} bytes instead of the {encoded} that its header says")
    return int(decoded)


def _lz4_length(data: Any) -> int | None:
    return int(struct.unpack_from("<I", data)[0]) if len(data) >= 4 else None


def _zstd_streams() -> Callable[[Any], Any] | None:
    """Return what opens a stream over compressed bytes, None if no library here does."""
    if importlib.util.find_spec("zstandard") is None:
        return None
    # One for each call: a decompressor is not to be shared by threads.
    decompressor = importlib.import_module("zstandard").ZstdDecompressor
    return lambda data: decompressor().stream_reader(data)
