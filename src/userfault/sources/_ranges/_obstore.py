"""A file in an object store or on a web server, through obstore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from userfault.errors import SourceError
from userfault.sources._location import Location
from userfault.sources._obstore import make_store, obstore_errors, split_object
from userfault.sources._ranges._abc import HEAD_NBYTES, RangeReader

__all__ = ["ObstoreReader"]

# The default of obstore is 30 s for a whole answer, which a large file outlasts.
_STREAM_TIMEOUT = "24h"
_STREAM_NBYTES = 1 << 20


class ObstoreReader(RangeReader):
    """The object at a URL.

    Raises:
        SourceNotFoundError: There is none.
        SourceError: It cannot be reached.
    """

    def __init__(self, location: Location) -> None:
        import obstore

        self.location = location.url
        self._root, self._key = split_object(location)
        self._store = make_store(self._root)
        with obstore_errors(location.url):
            head = obstore.get(self._store, self._key, options={"head": True})
            self.nbytes = int(head.meta["size"])
            encoding = head.attributes.get("Content-Encoding")
        self.encoding = None if encoding in (None, "", "identity") else str(encoding)
        # A weak tag ("W/...") does not promise equal bytes, and may not be asked for.
        tag = head.meta.get("e_tag")
        self._tag = tag if tag and not tag.startswith("W/") else None
        self.has_ranges = self._probe()

    def _probe(self) -> bool:
        length = min(self.nbytes or 0, HEAD_NBYTES)
        if length:
            try:
                self.head = bytes(self._get(0, length))
            except SourceError:
                return False
        return len(self.head) == length

    def _get(self, offset: int, length: int) -> Any:
        import obstore

        # Reads of one source must all be of one version of the object.
        options: dict[str, Any] = {"range": (offset, offset + length)}
        if self._tag is not None:
            options["if_match"] = self._tag
        with obstore_errors(self.location):
            return memoryview(obstore.get(self._store, self._key, options=options).bytes())  # type: ignore[arg-type]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        data = self._get(offset, len(buffer))
        if len(data) != len(buffer):
            raise SourceError(
                f"{self.location} answered with {len(data)} bytes instead of {len(buffer)}: does its server "
                "ignore Range?",
                offset=offset,
                length=len(buffer),
            )
        buffer[:] = data

    def stream(self) -> Iterator[bytes]:
        """Return all bytes, in pieces."""
        import obstore

        with obstore_errors(self.location):
            store = make_store(self._root, timeout=_STREAM_TIMEOUT)
            for piece in obstore.get(store, self._key).stream(min_chunk_size=_STREAM_NBYTES):
                yield bytes(piece)
