"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["format_duration"]


def format_duration(nanoseconds: float) -> str:
    """Return a duration to three digits.

    Example:
        >>> format_duration(1_500), format_duration(2.5e9), format_duration(40_000_000)
        ('1.5 µs', '2.5 s', '40 ms')
    """
    for scale, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if nanoseconds >= scale:
            return f"{nanoseconds / scale:.3g} {unit}"
    return f"{nanoseconds:.0f} ns"
