"""Writable Zarr arrays in the conformance suite of page stores."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from userfault.sources._abc import PageStore
from userfault.sources._location import Location
from userfault.sources._zarr_recipe import ZarrRecipe
from userfault.testing import PageStoreTests


class ZarrStoreSuite(PageStoreTests):
    reads = 25
    options: dict[str, Any] = {}  # noqa: RUF012 - given by the subclasses

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.places = (tmp_path / str(number) for number in itertools.count())

    def data(self) -> Any:
        return np.random.default_rng(1).integers(0, 50, (40, 30, 50)).astype("f4")

    def store(self) -> PageStore:
        self.at = next(self.places)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.create_array(self.at, shape=(40, 30, 50), dtype="f4", **self.options)[:] = self.data()  # type: ignore[arg-type]
        source = ZarrRecipe(Location.parse(self.at), "C", "r+").load()
        assert isinstance(source, PageStore)
        return source

    def reopened(self, store: PageStore) -> ZarrRecipe:
        return ZarrRecipe(Location.parse(self.at), "C", "r+")

    def expected(self) -> bytes:
        return self.data().tobytes()  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def failing(self, store: PageStore) -> Iterator[None]:
        """Some puts fail, and some have been done by then."""
        from zarr.storage import LocalStore

        put = LocalStore.set

        async def sometimes(self: LocalStore, key: str, value: Any) -> None:
            if "1" in key:
                raise OSError(28, "No space left on device")
            await put(self, key, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalStore, "set", sometimes)
            yield


class TestRows(ZarrStoreSuite):
    options = {"chunks": (2, 30, 50)}  # noqa: RUF012


class TestCubes(ZarrStoreSuite):
    options = {"chunks": (16, 16, 16), "compressors": (zarr.codecs.BloscCodec(),)}  # noqa: RUF012


class TestV2(ZarrStoreSuite):
    options = {"chunks": (7, 11, 13), "zarr_format": 2, "order": "F", "compressors": numcodecs.Zlib(1)}  # noqa: RUF012


class TestSharded(ZarrStoreSuite):
    reads = 10
    options = {"chunks": (10, 15, 25), "shards": (20, 30, 50)}  # noqa: RUF012
