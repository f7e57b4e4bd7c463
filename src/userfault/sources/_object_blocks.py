"""An array in an object store that can be written: one object for each block, since an object is put as a whole.

Below a prefix there are

- `blocks.json`: `{"format": "userfault-blocks", "version": 1, "block": 1048576, "nbytes": ..., "dtype": "<f4",
  "shape": [...], "order": "C"}`;
- `00000000`, `00000001`, ... (the number of the block, in at least eight hexadecimal digits): the bytes of each block,
  the last one cut short. A block that has no object is zeros.

Who wants compression, or to read the array with another library, takes Zarr.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault.errors import FormatError, RangeError, SourceNotFoundError, TruncatedError
from userfault.sources._abc import ArraySource, Order, PageStore, check_range
from userfault.sources._dtypes import as_dtype, dtype_from_text, dtype_to_text
from userfault.sources._layout import as_order, as_shape
from userfault.sources._location import Location
from userfault.sources._obstore import make_store, obstore_errors
from userfault.sources._stores import refuse_web
from userfault.sources._zarr_recipe import Mode

__all__ = ["ObjectBlocks", "ObjectBlocksRecipe"]

_DOCUMENT = "blocks.json"
_FORMAT = "userfault-blocks"
_KEY = re.compile("[0-9a-f]{8,}")
_BLOCK = 1 << 20
_SMALLEST = 4 << 10
_LOCKS = 64
# A round trip costs more than the bytes of a larger read.
_READ = 256 << 10
# How long the document is taken to be still there.
_TRUSTED_NS = 1_000_000_000


class ObjectBlocks(ArraySource, PageStore):
    """An array in the objects of an obstore store, which it reads in ranges and writes in blocks.

    Args:
        store: An `obstore.store` of any kind that can be pickled.
        prefix: Where in it the array is.

    Raises:
        SourceNotFoundError: Nothing is there; see `create`.
        FormatError: It is something else.
        SourceError: It cannot be reached.

    Example:
        >>> store = obstore.store.from_url("s3://bucket")  # doctest: +SKIP
        >>> ObjectBlocks.create(store, "counts", dtype="i8", shape=(1000, 1000))  # doctest: +SKIP
        >>> counts = userfault.open(ObjectBlocks(store, "counts"), "r+")  # doctest: +SKIP
    """

    concurrency = 16
    affinity = True

    def __init__(self, store: Any, prefix: str = "") -> None:
        self._store = store
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.name = prefix.strip("/").rpartition("/")[2] or "blocks"
        self._parse(self._read_document())
        self.block = min(self._block, _READ)
        self.write_unit = self._block
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))
        self._seen_ns = time.monotonic_ns()

    @classmethod
    def create(
        cls,
        store: Any,
        prefix: str = "",
        *,
        dtype: npt.DTypeLike,
        shape: Any,
        order: Order = "C",
        block: int = _BLOCK,
    ) -> ObjectBlocks:
        """Create an array of zeros; one that is there already is replaced.

        Args:
            store: An `obstore.store`.
            prefix: Where in it the array is to be.
            dtype: Type of the elements.
            shape: Shape of the array.
            order: `"C"` or `"F"`.
            block: Bytes of each object: a power of two, 4 KiB at least. What is written less than whole is read first.

        Raises:
            RangeError: `block` is no such number.
            UnsupportedDtypeError: The elements are not plain bytes.
            SourceError: The store cannot be reached, or refuses.
        """
        if block < _SMALLEST or block & (block - 1):
            raise RangeError(f"block={block} is not a power of two of at least {_SMALLEST} bytes")
        element, lengths = as_dtype(dtype), as_shape(shape)
        document = {
            "format": _FORMAT,
            "version": 1,
            "block": block,
            "nbytes": math.prod(lengths) * element.itemsize,
            "dtype": dtype_to_text(element),
            "shape": list(lengths),
            "order": as_order(order),
        }
        _create(store, f"{prefix.strip('/')}/" if prefix.strip("/") else "", json.dumps(document).encode())
        return cls(store, prefix)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self._prefix)

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        return f"{self._store!r}/{self._prefix}".rstrip("/")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._shape

    def _read_document(self) -> bytes:
        import obstore

        with obstore_errors(f"{self.location}/{_DOCUMENT}"):
            return bytes(obstore.get(self._store, self._prefix + _DOCUMENT).bytes())

    def _parse(self, document: bytes) -> None:
        try:
            meta = json.loads(document)
            if (meta["format"], meta["version"]) != (_FORMAT, 1):
                raise ValueError(f"it is {meta['format']!r}, version {meta['version']!r}")
            self._block = int(meta["block"])
            self._dtype = dtype_from_text(meta["dtype"])
            self._shape = as_shape(meta["shape"])
            self.order = as_order(meta["order"])
            if self._block < 1 or self.nbytes != meta["nbytes"]:
                raise ValueError(f"{meta['nbytes']} bytes in blocks of {self._block} are not such an array")
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{self.location}/{_DOCUMENT} does not describe an array in blocks: {error}"
            ) from error

    def _cut(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut a range into the number of each block, the part of it, and where that begins in the range."""
        done = 0
        while done < length:
            number, start = divmod(offset + done, self._block)
            stop = min(self._block, start + length - done)
            yield number, start, stop, done
            done += stop - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on; any thread may call this."""
        check_range(self, offset, len(buffer))
        for number, start, stop, at in self._cut(offset, len(buffer)):
            target = buffer[at : at + stop - start]
            content = self._get(number, start, stop)
            if content is None:
                np.frombuffer(target, np.uint8)[:] = 0
            else:
                target[:] = content

    def _get(self, number: int, start: int, stop: int) -> memoryview | None:
        """Return a part of a block, None for zeros."""
        import obstore

        key = self._key(number)
        try:
            with obstore_errors(f"{self.location}/{key}"):
                content = memoryview(
                    obstore.get_range(self._store, self._prefix + key, start=start, end=stop)
                ).cast("B")
        except SourceNotFoundError:
            self._check_still_there()
            return None
        if len(content) != stop - start:
            raise TruncatedError(
                f"{self.location}/{key} is too short: bytes [{start}, {stop}) are not all there"
            )
        return content

    def _check_still_there(self) -> None:
        """A block without an object is zeros; but not if the whole array was removed."""
        now = time.monotonic_ns()
        if now - self._seen_ns > _TRUSTED_NS:
            self._read_document()
            self._seen_ns = now

    def write_from(self, offset: int, buffer: memoryview) -> None:
        """Store `buffer` from `offset` on; any thread may call this."""
        check_range(self, offset, len(buffer))
        for number, start, stop, at in self._cut(offset, len(buffer)):
            self._check_still_there()
            with self._locks[number % _LOCKS]:
                self._write(number, start, stop, buffer[at : at + stop - start])

    def _write(self, number: int, start: int, stop: int, part: memoryview) -> None:
        import obstore

        whole = min(self._block, self.nbytes - number * self._block)
        content = part
        if stop - start < whole:
            old = self._get(number, 0, whole)
            changed = bytearray(whole) if old is None else bytearray(old)
            changed[start:stop] = part
            content = memoryview(changed)
        key = self._key(number)
        with obstore_errors(f"{self.location}/{key}", "written"):
            obstore.put(self._store, self._prefix + key, bytes(content), use_multipart=False)

    @staticmethod
    def _key(number: int) -> str:
        return f"{number:08x}"

    def info(self) -> Mapping[str, object]:
        """Return the format, the size of the blocks, the location."""
        return {"format": "object blocks", "block": self._block, "location": self.location}


def _create(store: Any, prefix: str, document: bytes) -> None:
    import obstore

    with obstore_errors(f"{store!r}/{prefix}", "written"):
        # Without its document it is no array: nobody reads the old one's blocks as the new one's.
        old = [
            str(item["path"])
            for batch in obstore.list(store, prefix=prefix.rstrip("/") or None)
            for item in batch
            if str(item["path"]).startswith(prefix)
        ]
        names = {path.removeprefix(prefix): path for path in old}
        if _DOCUMENT in names:
            obstore.delete(store, names[_DOCUMENT])
        blocks = [path for name, path in names.items() if _KEY.fullmatch(name)]
        if blocks:
            obstore.delete(store, blocks)
        obstore.put(store, prefix + _DOCUMENT, document)


@dataclass(frozen=True)
class ObjectBlocksRecipe:
    """An array in blocks below a URL.

    Attributes:
        location: The URL.
        mode: `"r+"` if it is to be written.
    """

    location: Location
    mode: Mode = "r"

    def load(self) -> ObjectBlocks:
        """Open the array."""
        if self.mode == "r+":
            refuse_web(self.location)
        blocks = ObjectBlocks(make_store(self.location))
        blocks.name = self.location.name
        return blocks

    def create(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: Order, block: int | None) -> None:
        """Create the array, of zeros."""
        refuse_web(self.location)
        ObjectBlocks.create(
            make_store(self.location), dtype=dtype, shape=shape, order=order, block=block or _BLOCK
        )
