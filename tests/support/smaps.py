"""What the kernel counts as resident."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["resident_bytes"]

_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


def resident_bytes(ranges: Sequence[tuple[int, int]]) -> int:
    """Return how many bytes of these ranges of addresses (start, stop) are resident in this process.

    Mappings are counted whole: a range is to begin and end where mappings do, but for its last page.
    """
    total, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head = _HEAD.match(line)
            if head is not None:
                start = int(head[1], 16)
                inside = any(low <= start < high for low, high in ranges)
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) << 10
    return total
