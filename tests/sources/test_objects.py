"""Objects of other libraries, sources of the user's own, and how they reach a worker."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userfault.errors import (
    FormatError,
    RangeError,
    UnsupportedDtypeError,
)
from userfault.sources._abc import ArraySource, PageSource, describe
from userfault.sources._array_like import ArrayLikeRecipe
from userfault.sources._nothing import NotEmptyRecipe, NothingToMapError
from userfault.sources._objects import array_data, buffer_bytes, is_buffer, object_data
from userfault.sources._own import SourceRecipe
from userfault.sources._sliced import tile_shape
from userfault.sources._worker_data import WorkerData
from userfault.testing import PageSourceTests


def whole(source: PageSource) -> bytes:
    buffer = bytearray(source.nbytes)
    source.read_into(0, memoryview(buffer))
    return bytes(buffer)


def worker_recipe(obj: Any, order: Any = None) -> Any:
    data, layout = object_data(obj, None, None, order)
    assert isinstance(data, WorkerData)
    assert layout is None
    return data.recipe


class Squares(PageSource):
    """A source as a user would write one; no thought of ranges."""

    block = 4096

    @property
    def nbytes(self) -> int:
        return 100_000

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.nbytes:
            raise ValueError("beyond the end")
        for i in range(len(buffer)):
            buffer[i] = (offset + i) ** 2 % 256


class Lazy:
    """An array-like that knows nothing but slicing."""

    def __init__(self, array: np.ndarray[Any, Any], chunks: Any = None) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype
        self.chunks = chunks
        self.asked: list[Any] = []

    def __getitem__(self, key: Any) -> Any:
        self.asked.append(key)
        return self._array[key]


class TestSquares(PageSourceTests):
    reads = 20

    def source(self) -> PageSource:
        return Squares()

    def expected(self) -> bytes:
        return bytes(i * i % 256 for i in range(100_000))


class TestShapedSquares(TestSquares):
    def recipe(self) -> SourceRecipe:
        return SourceRecipe(Squares(), "<u4", (50, 500), "F")

    def source(self) -> PageSource:
        return self.recipe().load()


class TestArrayLike(PageSourceTests):
    array = np.arange(30 * 40 * 50, dtype="<f8").reshape(30, 40, 50)
    chunks: Any = None
    order: Any = "C"

    def recipe(self) -> ArrayLikeRecipe:
        return ArrayLikeRecipe(Lazy(self.array, self.chunks), self.order)

    def source(self) -> PageSource:
        return self.recipe().load()

    def expected(self) -> bytes:
        return self.array.tobytes(self.order)


class TestArrayLikeInChunks(TestArrayLike):
    chunks = (7, 9, 50)
    order = "F"


class TestArrayLikeWithDaskChunks(TestArrayLike):
    chunks = ((10, 10, 10), (16, 16, 8), (25, 25))


@pytest.mark.parametrize("shape", [(), (1,), (5, 1, 3)], ids=str)
def test_small_array_likes(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    source = ArrayLikeRecipe(Lazy(array)).load()
    assert whole(source) == array.tobytes()
    source.close()


@pytest.mark.parametrize(
    ("shape", "order", "tile"),
    [
        ((100, 1000, 1000), "C", (1, 131, 1000)),
        ((1000, 1000, 100), "F", (1000, 131, 1)),
        ((10, 10), "C", (10, 10)),
        ((5, 1 << 20), "C", (1, 1 << 17)),
        ((), "C", ()),
    ],
    ids=str,
)
def test_array_likes_are_read_in_tiles_of_a_mebibyte(
    shape: tuple[int, ...], order: Any, tile: tuple[int, ...]
) -> None:
    assert tile_shape(shape, 8, order) == tile


def test_array_likes_are_read_in_rows_of_their_memory() -> None:
    lazy = Lazy(np.zeros((64, 1024, 1024), "u1"))
    source = ArrayLikeRecipe(lazy, "C").load()
    source.read_into(5 << 20, memoryview(bytearray(1 << 20)))
    assert lazy.asked == [(slice(5, 6), slice(0, 1024), slice(0, 1024))]
    source.close()


def test_array_likes_that_lie() -> None:
    lazy = Lazy(np.zeros((10, 10)))
    lazy.shape = (10, 11)
    source = ArrayLikeRecipe(lazy).load()
    with pytest.raises(FormatError, match=r"slicing gave an array of shape \(10, 10\) instead of \(10, 11\)"):
        whole(source)
    source.close()
    lazy = Lazy(np.zeros((10, 10)))
    lazy.dtype = np.dtype("i4")  # type: ignore[assignment]
    source = ArrayLikeRecipe(lazy).load()
    with pytest.raises(FormatError, match="slicing gave elements of dtype float64 instead of int32"):
        whole(source)
    source.close()
    lazy.dtype = "nonsense"  # type: ignore[assignment]
    with pytest.raises(FormatError, match="no dtype that NumPy knows"):
        ArrayLikeRecipe(lazy).load()


def test_array_likes_of_objects() -> None:
    with pytest.raises(UnsupportedDtypeError, match="Lazy: elements of dtype object"):
        ArrayLikeRecipe(Lazy(np.array([None]))).load()


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("concurrency", 0), ("concurrency", "many"), ("wants_cache", -1), ("nbytes_", -5), ("nbytes_", 1.5)],
)
def test_sources_that_make_no_sense(attribute: str, value: Any) -> None:
    class Odd(Squares):
        nbytes_: Any = 10

        @property
        def nbytes(self) -> int:
            return self.nbytes_  # type: ignore[no-any-return]

    source = Odd()
    setattr(source, attribute, value)
    with pytest.raises(FormatError, match=rf"Odd\.{attribute.rstrip('_')} is {value!r}"):
        SourceRecipe(source).load()


def test_shapes_that_do_not_fit_a_source() -> None:
    with pytest.raises(FormatError, match="not a multiple of the 3 bytes"):
        SourceRecipe(Squares(), "V3").load()
    with pytest.raises(RangeError, match="has 100000 bytes, but shape"):
        SourceRecipe(Squares(), "u1", (10, 10)).load()
    assert describe(SourceRecipe(Squares(), "<u4", (50, 500), "F").load()).shape == (50, 500)


def test_a_source_with_a_shape_of_its_own() -> None:
    source = ArrayLikeRecipe(Lazy(np.zeros((4, 5), "f4"))).load()
    assert SourceRecipe(source).load() is source
    with pytest.raises(FormatError, match="in order 'C'"):
        SourceRecipe(source, order="F").load()
    again = SourceRecipe(source, "u1", (80,)).load()
    assert isinstance(again, ArraySource)
    assert (again.shape, again.dtype) == ((80,), np.dtype("u1"))
    source.close()


def test_sources_without_bytes() -> None:
    with pytest.raises(NothingToMapError) as caught:
        NotEmptyRecipe(ArrayLikeRecipe(Lazy(np.zeros((3, 0), "f4")))).load()
    description = pickle.loads(pickle.dumps(caught.value)).description
    assert (description.nbytes, description.shape, description.dtype) == (0, (3, 0), "<f4")


def test_dispatch_of_objects(tmp_path: Path) -> None:
    data, layout = object_data(Squares(), "<u4", None, None)
    assert isinstance(data, WorkerData)
    assert isinstance(data.recipe, SourceRecipe)
    assert layout is None
    assert isinstance(worker_recipe(Lazy(np.zeros(3))), ArrayLikeRecipe)
    with pytest.raises(FormatError, match="says its dtype and shape itself"):
        object_data(Lazy(np.zeros(3)), "f4", None, None)
    with pytest.raises(FormatError, match="int cannot be opened"):
        object_data(3, None, None, None)


def test_numpy_arrays() -> None:
    array = np.arange(24, dtype="f4").reshape(2, 3, 4)
    data, layout = array_data(array)
    assert (bytes(data.buffer), layout.order, layout.shape) == (array.tobytes(), "C", (2, 3, 4))  # type: ignore[call-overload]
    data, layout = array_data(array.T)
    assert (bytes(data.buffer), layout.order, layout.shape) == (array.tobytes(), "F", (4, 3, 2))  # type: ignore[call-overload]
    data, layout = array_data(np.array(5, "M8[s]"))
    assert (data.nbytes, layout.shape) == (8, ())
    data, layout = array_data(np.zeros((0, 3)))
    assert (data.nbytes, layout.shape) == (0, (0, 3))
    with pytest.raises(FormatError, match="do not lie together"):
        array_data(array[:, ::2])
    with pytest.raises(UnsupportedDtypeError, match="mask"):
        array_data(np.ma.masked_array([1, 2], [True, False]))
    with pytest.raises(UnsupportedDtypeError, match="Python objects"):
        array_data(np.array([None]))


def test_buffers() -> None:
    assert is_buffer(b"abc")
    assert is_buffer(memoryview(b"abc"))
    assert not is_buffer("abc")
    assert buffer_bytes(memoryview(np.arange(3, dtype="f8"))).nbytes == 24
    assert buffer_bytes(b"").nbytes == 0
    with pytest.raises(FormatError, match="does not lie together"):
        buffer_bytes(memoryview(b"abcdef")[::2])
