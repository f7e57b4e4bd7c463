"""Arrays in Icechunk repositories: read as of a snapshot, written by one commit for each flush."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from userfault.errors import FormatError, ModeError, SourceError, SourcePickleError
from userfault.sources._abc import PageStore, Recipe, describe
from userfault.sources._objects import object_data
from userfault.sources._pickle import dumps
from userfault.sources._worker_data import WorkerData
from userfault.testing import PageStoreTests

# Not imported here: the test that is the first to use it starts threads that stay.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("icechunk") is None, reason="needs icechunk")

DATA = np.arange(600, dtype="i4").reshape(20, 30)


def make(folder: Path, data: Any = DATA, **options: Any) -> Any:
    """Create a repository with the arrays `a/b` and `other`."""
    import icechunk

    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(folder)))
    session = repo.writable_session("main")
    group = zarr.open_group(session.store, mode="w")
    group.create_array("a/b", shape=data.shape, dtype=data.dtype, **{"chunks": (7, 8), **options})[...] = data
    group.create_array("other", shape=(10,), chunks=(5,), dtype="i4")
    session.commit("made")
    return repo


def array_of(session: Any, path: str = "a/b", mode: Any = "r+") -> Any:
    return zarr.open_array(session.store, path=path, mode=mode)


def recipe_of(array: Any, mode: Any = "r+") -> Recipe:
    data, layout = object_data(array, None, None, "C", mode)
    assert isinstance(data, WorkerData)
    assert layout is None
    return pickle.loads(dumps(data.recipe))  # type: ignore[no-any-return]


def open_store(repo: Any, path: str = "a/b") -> Any:
    return recipe_of(array_of(repo.writable_session("main"), path)).load()


def write(store: PageStore, start: int, values: Any) -> None:
    store.write_from(4 * start, memoryview(np.asarray(values, "i4")).cast("B"))


def read(store: Any) -> Any:
    out = np.empty(store.shape, store.dtype)
    store.read_into(0, memoryview(out).cast("B"))
    return out


def committed(repo: Any, path: str = "a/b") -> Any:
    return array_of(repo.readonly_session("main"), path, "r")[...]


def messages(repo: Any) -> list[str]:
    return [snapshot.message for snapshot in repo.ancestry(branch="main")]


def test_reading(tmp_path: Path) -> None:
    repo = make(tmp_path)
    for session in (repo.readonly_session("main"), repo.writable_session("main")):
        source = recipe_of(array_of(session, mode="r"), "r").load()
        assert (read(source) == DATA).all()
        assert not describe(source).writable
        source.close()


def test_a_flush_is_one_commit(tmp_path: Path) -> None:
    repo = make(tmp_path)
    store = open_store(repo)
    assert describe(store).transactional
    model = DATA.copy()
    for round_ in range(3):
        write(store, 30 * round_, np.full(30, round_))
        write(store, 570, np.full(30, round_))
        model[round_] = model[19] = round_
        assert (committed(repo)[19] != round_).all(), "nothing shows before the flush"
        store.flush()
        assert (committed(repo) == model).all()
        assert (read(store) == model).all()
    store.flush()  # nothing is new: no commit
    store.close()
    # Each snapshot is still there.
    assert messages(repo)[:4] == ["userfault: 240 bytes of /a/b"] * 3 + ["made"]
    snapshots = [snapshot.id for snapshot in repo.ancestry(branch="main")]
    before = array_of(repo.readonly_session(snapshot_id=snapshots[3]), mode="r")
    assert (before[...] == DATA).all()


def test_others_may_commit_to_other_chunks(tmp_path: Path) -> None:
    repo = make(tmp_path)
    store = open_store(repo)
    for round_ in range(2):
        other = repo.writable_session("main")
        array_of(other, "other")[:] = round_ + 1
        array_of(other)[14:, 24:] = round_ + 1
        other.commit("other")
        write(store, 0, [100 + round_])
        store.flush()
        assert messages(repo)[:2] == ["userfault: 4 bytes of /a/b", "other"]
    model = DATA.copy()
    model[0, 0] = 101
    model[14:, 24:] = 2
    assert (committed(repo) == model).all()
    assert (committed(repo, "other") == 2).all()
    # What they wrote is read, and kept when a part of its chunk is written.
    store.set_cache(1 << 20)
    assert (read(store) == model).all()
    write(store, 599, [7])
    store.flush()
    model[19, 29] = 7
    assert (committed(repo) == model).all()
    store.close()


def test_a_conflict_is_an_error_and_the_next_flush_writes_again(tmp_path: Path) -> None:
    repo = make(tmp_path)
    store = open_store(repo)
    store.set_cache(1 << 20)
    write(store, 0, [100])
    other = repo.writable_session("main")
    array_of(other)[0, 1] = 200
    tip = other.commit("other")
    with pytest.raises(SourceError, match=rf"icechunk main:/a/b was not committed: .*on top of {tip}"):
        store.flush()
    assert committed(repo)[0, :2].tolist() == [0, 200]
    # The engine has kept it, and writes it again.
    write(store, 0, [100])
    store.flush()
    assert committed(repo)[0, :3].tolist() == [100, 200, 2]
    assert (read(store) == committed(repo)).all()
    assert messages(repo) == ["userfault: 4 bytes of /a/b", "other", "made", "Repository initialized"]
    store.close()


def test_a_branch_of_its_own(tmp_path: Path) -> None:
    repo = make(tmp_path)
    repo.create_branch("mine", repo.lookup_branch("main"))
    store: Any = recipe_of(array_of(repo.writable_session("mine"))).load()
    write(store, 0, [5])
    store.flush()
    store.close()
    assert committed(repo)[0, 0] == 0
    assert array_of(repo.readonly_session("mine"), mode="r")[0, 0] == 5


def test_shards(tmp_path: Path) -> None:
    repo = make(tmp_path, chunks=(2, 5), shards=(10, 10))
    store = open_store(repo)
    for start in (3, 200):
        write(store, start, np.full(150, -start))
        store.flush()
    model = DATA.copy()
    model.reshape(-1)[3:153], model.reshape(-1)[200:350] = -3, -200
    assert (committed(repo) == model).all()
    assert (read(store) == model).all()
    store.close()


def test_what_is_refused(tmp_path: Path) -> None:
    repo = make(tmp_path)
    with pytest.raises(ModeError, match=r"read-only: give an array of repository\.writable_session"):
        recipe_of(_pretend_writable(array_of(repo.readonly_session("main"), mode="r")))
    with pytest.raises(ModeError, match="was opened for reading"):
        recipe_of(array_of(repo.readonly_session("main"), mode="r"))
    session = repo.writable_session("main")
    array = array_of(session)
    array[0, 0] = 1
    with pytest.raises(ModeError, match="changes that are not committed"):
        recipe_of(array)
    with pytest.raises(SourcePickleError, match="changes that are not committed"):
        recipe_of(array, "r")
    for thing in (repo, session):
        with pytest.raises(FormatError, match=r"is not an array: open one in it, with zarr\.open_array"):
            recipe_of(thing)


class _pretend_writable:  # noqa: N801 - stands for an array
    """An array that says it may be written, of a session that says it may not."""

    __module__ = "zarr"
    read_only = False

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)


def test_a_repository_in_memory_is_not_found_by_others() -> None:
    import icechunk

    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    session = repo.writable_session("main")
    zarr.create_array(session.store, name="a", shape=(4,), dtype="i4")
    session.commit("made")
    for mode in ("r", "r+"):
        with pytest.raises(SourceError):
            recipe_of(array_of(repo.writable_session("main"), "a", "r+"), mode).load()


class TestIcechunk(PageStoreTests):
    reads = 20

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.places = (tmp_path / str(number) for number in itertools.count())

    def data(self) -> Any:
        return np.random.default_rng(1).integers(0, 50, (20, 30, 50)).astype("f4")

    def store(self) -> PageStore:
        self.repo = make(next(self.places), self.data(), chunks=(8, 16, 50))
        store: PageStore = open_store(self.repo)
        return store

    def reopened(self, store: PageStore) -> Recipe:
        return recipe_of(array_of(self.repo.writable_session("main")))

    def expected(self) -> bytes:
        return self.data().tobytes()  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def failing(self, store: PageStore) -> Iterator[None]:
        """Commits fail."""

        def refuse(*args: Any, **kwargs: Any) -> None:
            import icechunk

            raise icechunk.IcechunkError("the object store is closed on Sundays")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("icechunk.session.Session.commit", refuse)
            yield
