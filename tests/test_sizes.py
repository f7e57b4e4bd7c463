"""Sizes as text: what is understood, what is refused, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.errors import BudgetError
from userfault.sizes import format_count, format_rate, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1_000", 1000),
        ("512 B", 512),
        ("256 MiB", 256 << 20),
        ("256MiB", 256 << 20),
        ("256mib", 256 << 20),
        ("  2 GiB ", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("0.1 GiB", (1 << 30) // 10),
        (".5 KiB", 512),
        ("64K", 64 << 10),
        ("4g", 4 << 30),
        ("4Gi", 4 << 30),
        ("2 MB", 2_000_000),
        ("2 kB", 2_000),
        ("1 TB", 10**12),
        ("1 PiB", 1 << 50),
    ],
)
def test_text_that_is_understood(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


REFUSED = ["", "MiB", "12 apples", "-1", "1.5", "5 iB", "1 2", "1e9", "0x10", "9999 PiB"]


@pytest.mark.parametrize("value", [*REFUSED, -1, 1 << 63, True, 1.5, None], ids=repr)
def test_what_is_refused_is_named(value: object) -> None:
    with pytest.raises(BudgetError, match=r"memory: .*") as caught:
        parse_size(value, what="memory")  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_integers_of_every_kind() -> None:
    assert parse_size(4096) == 4096
    assert parse_size(np.int64(4096)) == 4096
    assert type(parse_size(np.int64(4096))) is int


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 10, "64 KiB"),
        (256 << 20, "256 MiB"),
        ((1 << 20) - 1, "1 MiB"),
        (123_456_789, "118 MiB"),
        (20 << 30, "20 GiB"),
        (-2048, "-2 KiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_format(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def test_format_of_counts_and_rates() -> None:
    assert format_count(1_234_567) == "1,234,567"
    assert format_rate(1.5 * 2**30) == "1.5 GiB/s"


@given(st.integers(0, (1 << 60) - 1))
def test_what_is_printed_is_read_back_within_the_digits_shown(nbytes: int) -> None:
    back = parse_size(format_size(nbytes))
    assert abs(back - nbytes) <= max(0.5, 0.006 * nbytes)
