"""How long the tests of survival try: shortly by default, long where `make soak` asks for it (USERFAULT_SOAK=1)."""

from __future__ import annotations

import os

__all__ = ["SOAK", "patience_s", "rounds"]

SOAK = os.environ.get("USERFAULT_SOAK", "0") not in ("", "0")


def rounds(few: int, many: int) -> int:
    """Return `few`, or `many` in a soak."""
    return many if SOAK else few


def patience_s() -> float:
    """Return after how many seconds a subprocess counts as hung. Nothing that works comes near it."""
    return 1800.0 if SOAK else 60.0
