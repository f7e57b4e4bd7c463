"""Arrays whose accesses can be tracked page by page on any kernel from Linux 6.7."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from userfault.errors import UnsupportedDtypeError
from userfault.kernel._address import PAGE_SIZE
from userfault.kernel.mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike, NDArray

__all__ = ["shared_array"]


def shared_array(
    shape: int | Sequence[int], dtype: DTypeLike = "f8", *, name: str | None = None, huge: bool = False
) -> NDArray[Any]:
    """Return an array of zeros in shared memory, of which reads can be tracked too, on any kernel from Linux 6.7.

    Its pages can be taken out of this process and come back by themselves, since the file in memory keeps them; on
    ordinary memory the kernel has no such way before Linux 7.3. It is an ordinary array otherwise. A forked child
    *shares* it. It is freed when nothing refers to it.

    Args:
        shape: As for `numpy.zeros`.
        dtype: The elements; no Python objects.
        name: What /proc/PID/maps shows.
        huge: Take huge pages from the reserved pool (hugetlb): less to track, but in steps of that size, usually 2 MiB.

    Raises:
        UnsupportedDtypeError: Elements that are no plain bytes.
        NoMemoryError: No room, or too few huge pages are reserved (vm.nr_hugepages).

    Example:
        >>> from userfault.track import shared_array
        >>> table = shared_array((1000, 512), "f4", name="table")
        >>> table.shape, float(table.sum())
        ((1000, 512), 0.0)
    """
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise UnsupportedDtypeError(f"{kind}: shared memory holds plain bytes, no Python objects")
    dimensions = (
        (operator.index(shape),) if hasattr(shape, "__index__") else tuple(map(operator.index, shape))
    )
    unit = _huge_page_size() if huge else PAGE_SIZE
    nbytes = math.prod(dimensions) * kind.itemsize
    mapping = Mapping.memfd(
        max(-(-nbytes // unit) * unit, unit), huge_page_size=unit if huge else None, name=name or "userfault"
    )
    # The view keeps the memory; the descriptor of its file goes with the mapping.
    return np.frombuffer(mapping.view(), np.uint8, nbytes).view(kind).reshape(dimensions)


def _huge_page_size() -> int:
    with open("/proc/meminfo") as text:
        for line in text:
            if line.startswith("Hugepagesize:"):
                return int(line.split()[1]) << 10
    return 2 << 20
