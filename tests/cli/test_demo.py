"""`userfault demo`, whole: on its own data and on files, in text, JSON and pictures."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cli import run_cli
from support.web import serve

pytest.importorskip("zarr", reason="zarr is not installed: pip install 'userfault[zarr]'")

_DAYS = 48  # 47 MiB: a budget of 4.7 MiB


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose cache folder is private, and is filled by the first test that needs it."""
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def check_run(values: dict[str, Any], nbytes: int) -> None:
    assert values["nbytes"] == nbytes
    assert values["checked"] is True
    assert [phase["name"] for phase in values["phases"]] == ["look-ups", "windowed scan", "full reduction"]
    for phase in values["phases"]:
        assert phase["checked"] is True
        assert phase["seconds"] > 0
    lookups, _, whole = values["phases"]
    assert lookups["touched_bytes"] > 0
    assert lookups["asked_bytes"] < lookups["touched_bytes"]
    assert whole["asked_bytes"] == nbytes
    assert values["resident_peak"] <= values["budget"]
    assert 0 < values["fault_p50_ns"] <= values["fault_p99_ns"]


def test_on_its_own_data(cache: dict[str, str], tmp_path: Path) -> None:
    done = run_cli("demo", "--days", str(_DAYS), "--json", cwd=tmp_path, env=cache)
    values = json.loads(done.check())
    check_run(values, _DAYS * 360 * 720 * 4)
    assert values["reference"] == "zarr"
    assert values["budget"] <= values["nbytes"] // 10
    # What is in flight when the kernel is asked comes on top.
    assert values["kernel_peak"] <= values["budget"] + (16 << 20)
    assert values["result"].startswith("mean of all 12,441,600 elements: 1.")
    assert values["picture"] == "userfault-demo.png"
    assert (tmp_path / "userfault-demo.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr == ""
    made = list(Path(cache["XDG_CACHE_HOME"]).rglob("rain-48-days-*.zarr"))
    assert len(made) == 1


def test_the_table_and_an_svg(cache: dict[str, str], tmp_path: Path) -> None:
    done = run_cli("demo", "--days", str(_DAYS), "-m", "8 MiB", "-o", "run.svg", cwd=tmp_path, env=cache)
    text = done.check()
    for expected in (
        "within a budget of",
        "time with zarr alone",
        "faults waited for",
        "resident peak:",
        "a fault took",
    ):
        assert expected in text
    assert text.count("yes") == 3
    assert text.endswith("picture: run.svg\n")
    assert (tmp_path / "run.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("order", ["C", "F"])
def test_on_an_npy_file(tmp_path: Path, order: str) -> None:
    array = np.random.default_rng(0).standard_normal((60, 90, 130)).astype("f4")
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))  # type: ignore[call-overload]
    values = json.loads(run_cli("demo", "a.npy", "--json", cwd=tmp_path).check())
    check_run(values, array.nbytes)
    assert values["reference"] == "numpy.memmap"


def test_on_a_raw_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff" * 12 + np.arange(1 << 20, dtype="<i8").tobytes())
    arguments = ("demo", "a.bin", "--dtype", "<i8", "--shape", "1024,1024", "--offset", "12", "--json")
    check_run(json.loads(run_cli(*arguments, cwd=tmp_path).check()), 8 << 20)


def test_on_a_file_of_tensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {
        "w": np.random.default_rng(0).standard_normal((900, 700)),
        "b": np.arange(5),
        "e": np.zeros((0, 2)),
    }
    safetensors.save_file(arrays, tmp_path / "m.safetensors")
    values = json.loads(run_cli("demo", "m.safetensors", "--json", cwd=tmp_path).check())
    check_run(values, 900 * 700 * 8 + 5 * 8)


def test_on_a_url(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'userfault[fsspec]'")
    array = np.random.default_rng(0).standard_normal((40, 300, 50))
    np.save(tmp_path / "a.npy", array)
    with serve() as web:
        web.add_folder(tmp_path)
        values = json.loads(run_cli("demo", f"{web.url}/a.npy", "--json", cwd=tmp_path).check())
    check_run(values, array.nbytes)
    assert (values["name"], values["reference"]) == ("a.npy", "plain reads")


def test_an_existing_picture_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"precious")
    np.save(tmp_path / "a.npy", np.zeros(1 << 17))
    done = run_cli("demo", "a.npy", "-o", "mine.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "userfault: mine.png exists; add --force to overwrite it\n"
    assert (tmp_path / "mine.png").read_bytes() == b"precious"
    run_cli("demo", "a.npy", "-o", "mine.png", "--force", cwd=tmp_path).check()
    assert (tmp_path / "mine.png").read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("missing.npy",), 1, "missing.npy does not exist"),
        (("empty.npy",), 1, "has no elements"),
        (("a.npy", "--memory", "1 B"), 1, "is too small"),
        (("a.npy", "--memory", "lots"), 1, "'lots' is not a size"),
        (("a.npy", "-o", "x.gif"), 2, "a picture ends in .png, .svg, .pdf"),
        (("a.npy", "-o", "no/such/x.png"), 1, "there is no folder no/such"),
        (("a.npy", "--shape", "3,4"), 2, "give --dtype too"),
        (("a.bin", "--dtype", "f4", "--shape", "3,x"), 2, "give numbers with commas"),
        (("a.npy", "--dtype", "f4"), 1, "leave dtype= out"),
    ],
)
def test_errors(tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1 << 16))
    np.save(tmp_path / "empty.npy", np.zeros((0, 3)))
    done = run_cli("demo", *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_wrong_values_are_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1 << 17))
    lies = (
        "from userfault.cli._demo import reference\n"
        "read = reference._Mapped.read\n"
        "first = slice(0, 8192)\n"
        "reference._Mapped.read = lambda self, piece: read(self, piece) + (piece.index[0] == first)\n"
        "from userfault.cli import main; main()"
    )
    done = run_cli("demo", "a.npy", cwd=tmp_path, code=lies)
    assert done.returncode == 1
    assert "NO" in done.stdout
    assert "differ from those of numpy.memmap" in done.stderr


def test_without_matplotlib_the_terminal_has_to_do(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1 << 17))
    without = "import sys; sys.modules['matplotlib'] = None; from userfault.cli import main; main()"
    done = run_cli("demo", "a.npy", cwd=tmp_path, code=without)
    assert "▀" in done.check()
    assert "drawing a picture needs matplotlib: pip install 'userfault[cli]'" in done.stderr
    assert not (tmp_path / "userfault-demo.png").exists()
    asked = run_cli("demo", "a.npy", "-o", "x.png", cwd=tmp_path, code=without)
    assert asked.returncode == 1


def test_an_interrupt_is_130_and_leaves_no_process(cache: dict[str, str], tmp_path: Path) -> None:
    # The live line on a terminal shows when the run is under way: only then comes the interrupt.
    terminal, other = pty.openpty()
    environment = {**os.environ, **cache, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", "from userfault.cli import main; main()", "demo", "--days", "96"],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=other,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(other)
        shown = b""
        while b"resident" not in shown and (part := _read(terminal)):
            shown += part
        os.killpg(process.pid, signal.SIGINT)
        while part := _read(terminal):
            shown += part
        assert process.wait(timeout=60) == 130, shown.decode(errors="replace")
    os.close(terminal)
    assert b"userfault: interrupted" in shown
    assert b"Traceback" not in shown


def _read(terminal: int) -> bytes:
    """Read what was written to the other side; nothing when the last process has closed it."""
    try:
        return os.read(terminal, 65536)
    except OSError as error:
        if error.errno == errno.EIO:
            return b""
        raise
