"""The demo's own data: made once, complete or not at all, and about the weather."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from userfault.cli._demo import data
from userfault.cli._demo.rain import DAY_NBYTES, LATITUDES, LONGITUDES, Rain
from userfault.errors import UserfaultError

zarr = pytest.importorskip("zarr", reason="zarr is not installed: pip install 'userfault[zarr]'")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "userfault" / "demo"


@pytest.fixture(scope="module", autouse=True)
def _zarr_thread() -> None:
    """zarr-python starts a thread for its event loop and keeps it: no test is to blame for that."""
    zarr.zeros((1,))[...] = 1


def test_rain_looks_like_rain() -> None:
    rain = Rain(366)
    days = np.concatenate([rain.slab(day, day + 1) for day in range(0, 366, 15)])
    area = np.cos(np.radians(np.linspace(89.75, -89.75, LATITUDES)))[:, None] / LONGITUDES
    mean = float((days.mean(axis=0) * area).sum() / (area.sum() * LONGITUDES))
    assert 2.0 < mean < 3.2  # mm a day; the Earth's is 2.7
    assert 0.15 < (days > 0).mean() < 0.4
    equator, desert = days[:, 170:190].mean(), days[:, 120:130].mean()
    assert equator > 3 * desert
    np.testing.assert_array_equal(days % 0.25, 0)


def test_days_do_not_depend_on_how_they_are_asked_for() -> None:
    rain = Rain(40)
    whole = rain.slab(0, 40)
    np.testing.assert_array_equal(whole[7:9], Rain(40).slab(0, 16)[7:9])
    assert whole.dtype == np.float32
    assert whole[0].nbytes == DAY_NBYTES


def test_made_once_and_correct(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = data.ensure(20, progress=lambda done, total: seen.append((done, total)))
    assert path.parent == cache
    array = zarr.open_array(str(path), mode="r")
    assert (array.shape, array.chunks, array.dtype) == ((20, 360, 720), (1, 360, 720), np.dtype("f4"))
    assert array.metadata.zarr_format == 3
    assert [type(codec).__name__ for codec in array.compressors] == ["ZstdCodec"]
    np.testing.assert_array_equal(array[3:5], Rain(20).slab(3, 5))
    assert (seen[0], seen[-1]) == ((0, 20), (20, 20))
    before = path.stat().st_mtime_ns
    assert data.ensure(20, progress=lambda *_: pytest.fail("made again")) == path
    assert path.stat().st_mtime_ns == before
    assert sorted(entry.name for entry in cache.iterdir()) == ["lock", path.name]


def test_an_interrupt_leaves_nothing(cache: Path) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.ensure(40, progress=interrupt)
    assert [entry.name for entry in cache.iterdir()] == ["lock"]


def test_what_a_killed_process_left_is_cleared_away(cache: Path) -> None:
    left = cache / ".making-abc"
    left.mkdir(parents=True)
    (left / "chunk").write_bytes(b"x")
    data.ensure(2)
    assert not left.exists()


def test_two_processes_make_it_once(cache: Path) -> None:
    code = (
        "from userfault.cli._demo import data\n"
        "made = []\n"
        "data.ensure(16, progress=lambda done, total: made.append(done))\n"
        "print(bool(made))\n"
    )
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert answers == ["False", "True"]


def test_a_full_disk_is_told_before_anything_is_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(100, 99, 1))
    with pytest.raises(UserfaultError, match=r"need about .* has 1 B free; set XDG_CACHE_HOME"):
        data.ensure(3652)
    assert [entry.name for entry in cache.iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserfaultError, match="set XDG_CACHE_HOME to a folder with room"):
        data.ensure(2)
