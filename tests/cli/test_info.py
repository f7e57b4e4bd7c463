"""`userfault info`: what it says of each format, and that it reads nothing but metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cli import run_cli
from support.web import serve


def info(*arguments: str, cwd: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(run_cli("info", *arguments, "--json", cwd=cwd).check())
    return values


def test_a_zarr_array(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: pip install 'userfault[zarr]'")
    array = zarr.create_array(tmp_path / "a.zarr", shape=(64, 50, 40), chunks=(8, 25, 40), dtype="<f4")
    array[...] = 1.0
    values = info("a.zarr", cwd=tmp_path)
    assert values["format"] == "zarr v3"
    assert (values["dtype"], values["shape"], values["order"]) == ("float32", [64, 50, 40], "C")
    assert values["chunks"] == [8, 25, 40]
    assert values["codecs"] == ["zstd"]
    assert values["nbytes"] == 64 * 50 * 40 * 4
    assert 0 < values["stored_bytes"] < values["nbytes"]
    # Two chunks side by side make a band: their decoded bytes are what a scan wants at least.
    assert values["scan_bytes"] >= 8 * 50 * 40 * 4
    assert "worker process" in values["served_by"]
    text = run_cli("info", "a.zarr", cwd=tmp_path).check()
    for expected in ("zarr v3", "64 × 50 × 40", "8 × 25 × 40", "times smaller", "a scan wants", "zstd"):
        assert expected in text


def test_an_npy_file_in_fortran_order(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((300, 200), order="F"))
    values = info("a.npy", cwd=tmp_path)
    assert (values["format"], values["order"], values["shape"]) == ("npy", "F", [300, 200])
    assert values["served_by"] == "the engine itself, from the file"
    assert values["stored_bytes"] == (tmp_path / "a.npy").stat().st_size


def test_a_raw_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100_000))
    values = info("a.bin", "--dtype", "<i2", "--offset", "10", cwd=tmp_path)
    assert (values["format"], values["dtype"], values["shape"]) == ("raw", "int16", [49_995])


def test_a_file_of_tensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {f"layer.{i}": np.zeros((i + 1, 8), np.float32) for i in range(45)}
    safetensors.save_file(arrays, tmp_path / "m.safetensors")
    values = info("m.safetensors", cwd=tmp_path)
    assert values["format"] == "safetensors"
    assert len(values["arrays"]) == 45
    assert values["arrays"]["layer.3"] == {"dtype": "float32", "shape": [4, 8], "nbytes": 128}
    text = run_cli("info", "m.safetensors", cwd=tmp_path).check()
    assert "layer.44" in text
    assert "and 5 smaller ones" in text


def test_a_url(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'userfault[fsspec]'")
    np.save(tmp_path / "a.npy", np.zeros((300, 200)))
    with serve() as web:
        web.add_folder(tmp_path)
        values = info(f"{web.url}/a.npy", cwd=tmp_path)
    assert (values["shape"], values["stored_bytes"]) == ([300, 200], None)
    assert "worker process" in values["served_by"]


def test_an_array_without_elements(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((0, 4)))
    values = info("a.npy", cwd=tmp_path)
    assert (values["nbytes"], values["block"], values["shape"]) == (0, None, [0, 4])
    assert "no elements" in run_cli("info", "a.npy", cwd=tmp_path).check()


def test_what_is_not_there(tmp_path: Path) -> None:
    done = run_cli("info", "nothing.zarr", cwd=tmp_path)
    assert done.returncode == 1
    assert "nothing.zarr does not exist" in done.stderr
    as_json = run_cli("info", "nothing.zarr", "--json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["error"]["type"] == "SourceNotFoundError"
