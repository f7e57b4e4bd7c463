"""Element types: which can be memory, and their form as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from userfault.errors import FormatError, UnsupportedDtypeError
from userfault.sources._dtypes import as_dtype, check_plain, dtype_from_text, dtype_to_text


@pytest.mark.parametrize(
    "dtype", ["?", "<f4", ">i2", "M8[25s]", "S7", "U3", "V9", "bfloat16", "float8_e5m2", "float8_e4m3fn"]
)
def test_types_as_text(dtype: str) -> None:
    value = as_dtype(dtype)
    assert dtype_from_text(dtype_to_text(value)) == value


def test_structured_types_as_text() -> None:
    for value in (
        np.dtype([("a", "i4"), ("b", [("x", "f8", (3,)), ("y", "S3")])], align=True),
        np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"], "offsets": [0, 4], "itemsize": 20}),
    ):
        assert dtype_from_text(dtype_to_text(value)) == value


@pytest.mark.parametrize("dtype", ["O", "S", "V", "nonsense", "T", [("a", "O")], ("f4", (2,))], ids=str)
def test_types_that_cannot_be_memory(dtype: Any) -> None:
    with pytest.raises(UnsupportedDtypeError):
        as_dtype(dtype)
    with pytest.raises((UnsupportedDtypeError, FormatError)):
        dtype_from_text("[nonsense")
    assert check_plain(np.dtype("f4")) == "f4"
