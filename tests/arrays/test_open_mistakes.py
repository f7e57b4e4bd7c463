"""open(): every mistake is a typed error that names the value and the remedy, before anything is mapped."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from userfault import errors
from userfault.sources import PageSource

ARRAY = np.arange(24_000, dtype="i4").reshape(20, 30, 40)


class Numbers(PageSource):
    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def nbytes(self) -> int:
        return 8 * self.count

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))


class Failing(Numbers):
    @property
    def nbytes(self) -> int:
        raise LookupError("no length today")


def test_modes_that_are_not_known() -> None:
    with pytest.raises(errors.ModeError, match=r"'x' is not known; the modes are 'r', 'r\+', 'c' and 'w\+'"):
        userfault.open(ARRAY, "x")


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    def refused(name: str, error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message) as caught:
            userfault.open(tmp_path / name, **options)
        assert isinstance(caught.value, errors.UserfaultError)
        assert name in str(caught.value)

    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("Lorem ipsum dolor sit amet")
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    np.savez(tmp_path / "a.npz", x=ARRAY)
    np.save(tmp_path / "objects.npy", np.array([None]))
    np.save(tmp_path / "a.npy", ARRAY)
    (tmp_path / "short.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    (tmp_path / "half.npy.gz").write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes())[:-100])
    os.mkfifo(tmp_path / "pipe")

    refused("nothing.npy", errors.SourceNotFoundError, "does not exist")
    refused("a.npy/inside", errors.SourceNotFoundError, "does not exist")
    refused("folder", errors.FormatError, r"is a folder, but not a Zarr array")
    refused("text", errors.FormatError, r"give dtype= \(and shape=\)")
    refused("a.h5", errors.FormatError, "open it with h5py")
    refused("a.npz", errors.FormatError, r"is an \.npz archive")
    refused("objects.npy", errors.UnsupportedDtypeError, "Python objects")
    refused("short.npy", errors.TruncatedError, "is truncated")
    refused("half.npy.gz", errors.TruncatedError, "has no end")
    refused("pipe", errors.FormatError, "neither a file nor a folder")
    refused("text", errors.FormatError, "not a multiple of the 4 bytes", dtype="i4")
    refused("text", errors.TruncatedError, "needs 400 bytes", dtype="i4", shape=100)
    refused("text", errors.RangeError, "offset=27", dtype="u1", offset=27)
    refused("text", errors.FormatError, r"is not a \.npy file", format="npy")
    refused("a.npy", errors.FormatError, r"leave dtype=, shape= out", dtype="i4", shape=3)
    refused("a.npy", errors.FormatError, "is in order 'C'", order="F")


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    for options, error in (
        ({"dtype": "nonsense"}, errors.UnsupportedDtypeError),
        ({"dtype": "O"}, errors.UnsupportedDtypeError),
        ({"shape": -1}, errors.RangeError),
        ({"offset": -1}, errors.RangeError),
        ({"order": "K"}, errors.FormatError),
        ({"format": "csv"}, errors.FormatError),
        ({"memory": "much"}, errors.BudgetError),
        ({"block": "much"}, errors.BudgetError),
    ):
        with pytest.raises(error):
            userfault.open(ARRAY.tobytes(), **options)  # type: ignore[arg-type]
    with pytest.raises(errors.FormatError, match="int cannot be opened"):
        userfault.open(3)
    with pytest.raises(errors.FormatError, match="says its dtype, shape and place itself"):
        userfault.open(ARRAY, dtype="i4")


def test_errors_of_the_worker_are_raised_here(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no length today"):
        userfault.open(Failing(1))
    with pytest.raises(errors.RangeError, match="has 800 bytes, but shape"):
        userfault.open(Numbers(100), dtype="u1", shape=(10, 10))
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')
    with pytest.raises(errors.FormatError, match="not an array that zarr can read"):
        userfault.open(tmp_path / "a.zarr")
