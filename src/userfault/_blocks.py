"""How long a memory's blocks are."""

from __future__ import annotations

import os
from typing import SupportsIndex

from userfault import _engine
from userfault.errors import BudgetError
from userfault.sizes import format_size, parse_size

__all__ = ["block_size", "check_budget", "round_block", "round_unit"]

_DEFAULT = 64 << 10
# Fewer blocks than this, and those in flight are most of the budget.
_LEAST_BLOCKS = 8


def block_size(block: SupportsIndex | str | None) -> int:
    """Return the block size that a user asked for.

    Raises:
        BudgetError: It is not possible.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    size = _DEFAULT if block is None else parse_size(block, what="block")
    if not page <= size <= _engine.EXTENT or size & (size - 1):
        raise BudgetError(
            f"block: {size} bytes is not a power of two from the page size ({page}) to {_engine.EXTENT} (2 MiB)"
        )
    return size


def round_block(preferred: int, budget: int) -> int:
    """Return a block size near the one that a source prefers, which need not be possible, nor fit into the budget."""
    page = os.sysconf("SC_PAGE_SIZE")
    most = min(_engine.EXTENT, max(page, 1 << max(budget // (2 * _LEAST_BLOCKS), 1).bit_length() - 1))
    return min(max(page, _power_above(preferred)), most)


def round_unit(preferred: int | None, block: int) -> int:
    """Return what to write together in a memory of such blocks, near what a store prefers."""
    return block if preferred is None else min(max(block, _power_above(preferred)), _engine.EXTENT)


def check_budget(budget: int, block: int, nbytes: int, name: str) -> None:
    """Check that enough blocks fit into the budget.

    Raises:
        BudgetError: They do not.
    """
    least = _LEAST_BLOCKS * block
    if budget < min(least, -(-nbytes // block) * block):
        raise BudgetError(
            f"memory: {format_size(budget)} is too small for {name}: blocks have {format_size(block)}, so give "
            f"{format_size(least)} or more, or a smaller block="
        )


def _power_above(nbytes: int) -> int:
    return 1 << (max(nbytes, 1) - 1).bit_length()
