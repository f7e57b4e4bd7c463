"""Sizes as people write and read them: `"256 MiB"` to bytes and back.

Binary units (KiB, MiB, GiB, TiB, PiB) are powers of 1024, decimal ones (kB, MB, GB, TB, PB) powers of 1000.
A single letter, as in `"64K"` or `"4g"`, is binary, as in `dd`, `ulimit` and Docker.
"""

from __future__ import annotations

import operator
import re
from typing import SupportsIndex

from userfault.errors import BudgetError

__all__ = ["format_count", "format_rate", "format_size", "parse_size"]

_PREFIXES = "KMGTP"
_PATTERN = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*([KMGTP]?)(I?)(B?)\s*", re.IGNORECASE)
# Larger than any address space, so that a typing error is not taken for a size.
_LARGEST = 1 << 63


def parse_size(value: SupportsIndex | str, *, what: str = "size") -> int:
    """Return the bytes that `value` means: an integer, or text such as `"256 MiB"`.

    Args:
        value: Bytes as an integer, or a number with an optional unit.
        what: What the size is for; error messages begin with it.

    Raises:
        BudgetError: `value` is negative, too large, fractional bytes, or not a size at all.

    Example:
        >>> parse_size("1.5 GiB"), parse_size("2 MB"), parse_size("64K"), parse_size(4096)
        (1610612736, 2000000, 65536, 4096)
    """
    if isinstance(value, str):
        size = _parse_text(value, what)
    else:
        try:
            size = operator.index(value) if not isinstance(value, bool) else -1
        except TypeError:
            raise _not_a_size(value, what) from None
    if not 0 <= size < _LARGEST:
        raise BudgetError(f"{what}: {value!r} is out of range; a size is between 0 and 8 EiB")
    return size


def _parse_text(text: str, what: str) -> int:
    match = _PATTERN.fullmatch(text)
    # "5 i" and "5 iB" have a binary mark without a prefix.
    if match is None or (match[3] and not match[2]):
        raise _not_a_size(text, what)
    number, prefix, binary, byte = match.groups()
    base = 1000 if prefix and byte and not binary else 1024
    scale: int = base ** (1 + _PREFIXES.index(prefix.upper())) if prefix else 1
    whole, _, fraction = number.replace("_", "").partition(".")
    # Exact in integers: "0.1 GiB" must not depend on how floats round.
    numerator = int((whole + fraction) or "0") * scale
    denominator: int = 10 ** len(fraction)
    size, rest = divmod(numerator, denominator)
    if rest and scale == 1:
        raise BudgetError(f"{what}: {text!r} is not a whole number of bytes")
    return size


def _not_a_size(value: object, what: str) -> BudgetError:
    return BudgetError(f"{what}: {value!r} is not a size; give bytes or text such as '256 MiB'")


def format_size(nbytes: float) -> str:
    """Return `nbytes` in the largest binary unit, to three digits or so.

    Example:
        >>> format_size(268435456), format_size(1610612736), format_size(100)
        ('256 MiB', '1.5 GiB', '100 B')
    """
    sign, value = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    unit = "B"
    for prefix in _PREFIXES:
        # 1023.5 KiB would be printed as "1024 KiB": go one unit further.
        if value < 1023.5:
            break
        value, unit = value / 1024, f"{prefix}iB"
    return f"{sign}{_three_digits(value)} {unit}"


def format_count(count: int) -> str:
    """Return `count` with its thousands apart.

    Example:
        >>> format_count(1234567)
        '1,234,567'
    """
    return f"{count:,}"


def format_rate(bytes_per_second: float) -> str:
    """Return a throughput in the largest binary unit.

    Example:
        >>> format_rate(1.5 * 2**30)
        '1.5 GiB/s'
    """
    return f"{format_size(bytes_per_second)}/s"


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
