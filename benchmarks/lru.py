"""What people write around zarr to look up elements: a least-recently-used cache of chunks."""

from collections import OrderedDict
from typing import Any


class ChunkCache:
    """Elements of a Zarr array through at most `nbytes` of decoded chunks."""

    def __init__(self, array: Any, nbytes: int) -> None:
        self._array = array
        self._edges: tuple[int, ...] = array.chunks
        self._room = nbytes
        self._used = 0
        self._chunks: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def __getitem__(self, index: tuple[int, ...]) -> Any:
        number = tuple(i // edge for i, edge in zip(index, self._edges, strict=True))
        inside = tuple(i % edge for i, edge in zip(index, self._edges, strict=True))
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._read(number)
        else:
            self._chunks.move_to_end(number)
        return chunk[inside]

    def _read(self, number: tuple[int, ...]) -> Any:
        chunk = self._array[
            tuple(slice(n * edge, (n + 1) * edge) for n, edge in zip(number, self._edges, strict=True))
        ]
        self._chunks[number] = chunk
        self._used += chunk.nbytes
        while self._used > self._room and len(self._chunks) > 1:
            self._used -= self._chunks.popitem(last=False)[1].nbytes
        return chunk
