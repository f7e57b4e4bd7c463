"""Ranges for looking at pages: an object means all pages that it has a byte in."""

from __future__ import annotations

import operator
from typing import Any

from userfault.kernel._address import PAGE_MASK, is_address, range_of, span_of
from userfault.kernel.errors import UsageError
from userfault.kernel.mapping import Mapping

__all__ = ["pages_of"]


def pages_of(where: Any, length: int | None, *, exact: bool) -> tuple[int, int]:
    """Return start and end of a range; an object's is widened to whole pages, unless these are to be exact."""
    if is_address(where):
        where = operator.index(where)
    elif isinstance(where, Mapping):  # the usual case, and quicker than to look for the protocols
        length = where.nbytes if length is None else length
        if length > where.nbytes:
            raise UsageError(f"range: length {length} is more than the object's {where.nbytes} bytes")
        where = where.address
    if exact or isinstance(where, int):
        start, length = range_of(where, length)
        if start + length >> 64:
            raise UsageError(f"range: {start:#x} + {length:#x} lies outside of the address space")
        return start, start + length
    address, available, _ = span_of(where)
    if length is None:
        length = available
    if not 0 < length <= available:
        raise UsageError(f"range: length {length} is not in the object's {available} bytes")
    return address & ~PAGE_MASK, (address + length + PAGE_MASK) & ~PAGE_MASK
