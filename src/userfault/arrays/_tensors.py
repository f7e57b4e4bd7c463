"""The tensors of a `.safetensors` file: a mapping of names to arrays, all in one memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from userfault.arrays._view import view_of
from userfault.memory import PagedMemory
from userfault.sources._layout import ArrayLayout
from userfault.sources._safetensors import TensorTable, tensor_dtype

__all__ = ["TensorFile"]


class TensorFile(Mapping[str, np.ndarray[Any, Any]]):
    """Names to arrays. An array is made when it is asked for, its pages are read when touched.

    The mapping itself never changes: names, types and shapes are those of the file. In modes `"r+"` and `"c"` the
    elements of the arrays can be written.

    Args:
        memory: The memory of all tensors, None if none of them has a byte.
        table: The tensors.
        name: What the file is called.
        writable: Whether the arrays are.

    Attributes:
        memory: The memory of all tensors, None if none of them has a byte.
        metadata: What the writer of the file noted.
        name: What the file is called.

    Example:
        >>> weights = userfault.open("model.safetensors")  # doctest: +SKIP
        >>> weights["embeddings.word_embeddings.weight"][101]  # doctest: +SKIP
    """

    def __init__(
        self, memory: PagedMemory | None, table: TensorTable, name: str, writable: bool = False
    ) -> None:
        self.memory = memory
        self.metadata: Mapping[str, str] = dict(table.metadata)
        self.name = name
        self._tensors = table.tensors
        self._writable = writable

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """Return the tensor `name`.

        Raises:
            KeyError: There is none of this name.
            UnsupportedDtypeError: NumPy has no type for its elements, or ml_dtypes is needed and not
                installed.
        """
        info = self._tensors[name]
        layout = ArrayLayout(tensor_dtype(name, info), info.shape, "C", info.start)
        return view_of(self.memory, layout, self._writable)

    def __iter__(self) -> Iterator[str]:
        """Go through the names, in the order of the file."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor `name`, without making its array."""
        return name in self._tensors

    def __repr__(self) -> str:
        return f"<userfault.TensorFile {self.name!r}, {len(self)} tensors>"
