"""Arrays of tensorstore, in processes of their own: it starts native threads as it pleases and never ends them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from support.processes import run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorstore") is None, reason="needs tensorstore")

DATA = np.arange(600, dtype="i4").reshape(20, 30)

PROLOGUE = f"""
import sys
sys.path[:] = {sys.path!r}
import pickle, pathlib
import numpy as np, tensorstore
from userfault import errors
from userfault.sources._objects import object_data
from userfault.sources._pickle import dumps

folder = sys.argv[1]
data = np.arange(600, dtype="i4").reshape(20, 30)

def opened():
    kvstore = {{"driver": "file", "path": folder}}
    return tensorstore.open({{"driver": "zarr3", "kvstore": kvstore}}).result()

def loaded(array, order=None):
    return pickle.loads(dumps(object_data(array, None, None, order)[0].recipe)).load()

def whole(source):
    buffer = bytearray(source.nbytes)
    source.read_into(0, memoryview(buffer))
    return bytes(buffer)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zarr.create_array(str(tmp_path / "a.zarr"), data=DATA, chunks=(7, 8))
    return tmp_path / "a.zarr"


def run(code: str, folder: Path) -> None:
    lines = [line.removeprefix("    " * 2) for line in code.splitlines()]
    run_python(PROLOGUE + "\n".join(lines), arguments=[str(folder)]).check()


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(folder: Path, order: str) -> None:
    run(
        f"""
        source = loaded(opened(), {order!r})
        assert (source.shape, source.dtype, source.order) == ((20, 30), np.dtype("i4"), {order!r})
        assert whole(source) == data.tobytes({order!r})
        assert source.info()["chunks"] == [7, 8]
        source.close()
        """,
        folder,
    )


def test_coordinates_that_do_not_begin_at_0(folder: Path) -> None:
    run(
        """
        source = loaded(opened()[5:15, 10:])
        assert whole(source) == data[5:15, 10:].tobytes()
        source.close()
        """,
        folder,
    )


def test_memory_of_this_process_is_refused(folder: Path) -> None:
    """Unpickled elsewhere, it would be an empty store: zeros."""
    run(
        """
        spec = {"driver": "zarr3", "kvstore": "memory://"}
        array = tensorstore.open(spec, shape=[4], dtype=tensorstore.int32, create=True).result()
        try:
            loaded(array)
        except errors.SourcePickleError as error:
            assert "memory of this process" in str(error)
        else:
            raise AssertionError("not refused")
        """,
        folder,
    )


def test_a_damaged_chunk(folder: Path) -> None:
    run(
        """
        source = loaded(opened())
        pathlib.Path(folder, "c", "0", "0").write_bytes(b"damage")
        try:
            whole(source)
        except errors.SourceError as error:
            assert "tensorstore: chunk (0, 0)" in str(error)
        else:
            raise AssertionError("read")
        source.close()
        """,
        folder,
    )


def test_opened_as_an_array(folder: Path) -> None:
    run(
        """
        import userfault
        assert np.array_equal(userfault.open(opened()), data)
        """,
        folder,
    )


@pytest.mark.parametrize("order", ["C", "F"])
def test_writing(folder: Path, order: str) -> None:
    run(
        f"""
        import random
        store = pickle.loads(dumps(object_data(opened(), None, None, {order!r}, "r+")[0].recipe)).load()
        assert store.write_unit == {7 * 30 * 4 if order == "C" else 8 * 20 * 4} or store.write_unit == 2 << 20
        rng = random.Random(1)
        model = bytearray(data.tobytes({order!r}))
        for _ in range(20):
            start, stop = sorted(rng.randrange(len(model) + 1) for _ in range(2))
            model[start:stop] = content = rng.randbytes(stop - start)
            store.write_from(start, memoryview(content))
            assert whole(store) == model
        store.close()
        assert opened().read().result().tobytes({order!r}) == model
        """,
        folder,
    )


def test_writing_what_was_opened_for_reading(folder: Path) -> None:
    run(
        """
        array = tensorstore.open(opened().spec(), read=True).result()
        try:
            object_data(array, None, None, None, "r+")
        except errors.ModeError as error:
            assert "open it with write=True" in str(error)
        else:
            raise AssertionError("not refused")
        """,
        folder,
    )


def test_a_chunk_that_is_not_taken(folder: Path) -> None:
    run(
        """
        import os, shutil
        store = pickle.loads(dumps(object_data(opened(), None, None, None, "r+")[0].recipe)).load()
        before = whole(store)
        shutil.rmtree(pathlib.Path(folder) / "c")
        # A file is where the folder of the chunks should be: not even root can write there.
        (pathlib.Path(folder) / "c").write_bytes(b"")
        try:
            store.write_from(0, memoryview(b"x" * 2400))
        except errors.SourceError as error:
            assert "tensorstore[" in str(error) and "cannot be written" in str(error), error
        else:
            raise AssertionError("not refused")
        store.close()
        """,
        folder,
    )
