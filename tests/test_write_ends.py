"""Writable memory and the end of things: of the last array, the interpreter, a forked child, a scratch folder."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from support import Finished, run_python
from support.page_sources import pattern
from support.page_stores import FileStore
from support.pagers import own_pager
from userfault.errors import SourceError

TESTS = str(Path(__file__).parent)
BLOCK = 16 << 10
NBYTES = 16 * BLOCK
CONTENT = pattern(0, NBYTES)

# From Python 3.12 on, forking a process with threads gives a DeprecationWarning. This one always has some.
PRELUDE = """
import gc, os, sys, warnings
from pathlib import Path
import numpy as np, userfault
from support.page_stores import FileStore
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
path = Path(sys.argv[1], "content")
BLOCK = 16 << 10

def child(work):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        work()
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def script(code: str, folder: Path) -> Finished:
    import textwrap

    return run_python(
        PRELUDE + textwrap.dedent(code), arguments=[str(folder)], env={"PYTHONPATH": TESTS}, timeout_s=40
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "content").write_bytes(CONTENT)
    return tmp_path / "content"


def inverted(*blocks: int) -> bytes:
    array = np.frombuffer(CONTENT, np.uint8).reshape(-1, BLOCK).copy()
    array[list(blocks)] ^= 0xFF
    return array.tobytes()


@pytest.mark.parametrize(
    "end",
    ["pass", "sys.exit(0)", "keep = [a]; keep.append(keep); del a; gc.disable()"],
)
def test_an_interpreter_that_exits_writes_back(end: str, path: Path) -> None:
    script(
        f"""
        a = userfault.open(path, "r+", dtype="u1", shape=(16, BLOCK), block=BLOCK)
        a[3] ^= 0xff
        {end}
        """,
        path.parent,
    ).check()
    assert path.read_bytes() == inverted(3)


def test_an_exception_that_ends_the_program_loses_nothing(path: Path) -> None:
    done = script(
        """
        a = userfault.open(path, "r+", dtype="u1", shape=(16, BLOCK))
        a[5] ^= 0xff
        raise RuntimeError("oops")
        """,
        path.parent,
    )
    assert done.returncode == 1
    assert "oops" in done.stderr
    assert path.read_bytes() == inverted(5)


def test_a_store_that_fails_at_exit_is_told_of(tmp_path: Path) -> None:
    done = script(
        """
        store = FileStore(Path(sys.argv[1]), bytes(16 * BLOCK), block=BLOCK)
        a = userfault.open(store, "r+", shape=(16, BLOCK))
        a[3:5] = 1
        store.trouble("raises", 4 * BLOCK)
        """,
        tmp_path,
    )
    done.check()
    assert (
        done.stderr.count(f"userfault: FileStore: changes of bytes [{4 * BLOCK}, {5 * BLOCK}) are lost") == 1
    )
    assert "No space left on device" in done.stderr
    assert (tmp_path / "content").read_bytes()[: 4 * BLOCK] == bytes(3 * BLOCK) + b"\1" * BLOCK


def test_what_a_last_array_could_not_store_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    store = FileStore(tmp_path, CONTENT, block=BLOCK)
    with own_pager(attempts=1):
        array: Any = userfault.open(store, "r+")
        array[:10] = 0
        store.trouble("raises")
        with caplog.at_level(logging.ERROR, "userfault"):
            del array
    (record,) = caplog.records
    assert record.name == "userfault"
    assert f"FileStore: changes of bytes [0, {BLOCK}) are lost" in record.getMessage()
    assert record.getMessage() in capfd.readouterr().err


def test_a_closed_memory_has_nothing_to_say_at_exit(path: Path) -> None:
    done = script(
        """
        a = userfault.open(path, "r+", dtype="u1", shape=(16, BLOCK))
        b = userfault.open(path, "r", dtype="u1")
        c = userfault.empty(100)
        c[:] = 1
        a[0] ^= 0xff
        userfault.memory_of(a).flush()
        memory = userfault.memory_of(a)
        del a
        memory.close()
        """,
        path.parent,
    )
    assert (done.check(), done.stderr) == ("", "")
    assert path.read_bytes() == inverted(0)


def test_a_forked_child_does_not_write_back(path: Path) -> None:
    done = script(
        """
        a = userfault.open(path, "r+", dtype="u1", shape=(16, BLOCK), block=BLOCK)
        a[3] ^= 0xff

        def work():
            memory = userfault.memory_of(a)
            a[4] ^= 0xff
            try:
                memory.flush()
            except userfault.ForkedError as error:
                assert isinstance(error, RuntimeError)
                print(error)
            else:
                sys.exit("flush went through")
            # It exits with the array alive: the hooks must do nothing.

        content = path.read_bytes()
        assert child(work) == 0
        assert path.read_bytes() == content
        def closes():
            global a
            memory = userfault.memory_of(a)
            a[5] ^= 0xff
            del a
            memory.close()
            assert memory.closed
        assert child(closes) == 0
        assert path.read_bytes() == content
        userfault.memory_of(a).flush()
        """,
        path.parent,
    )
    assert "content was opened by the process that forked this one" in done.check()
    assert "lost" not in done.stderr
    assert path.read_bytes() == inverted(3)


def test_a_child_writes_back_what_it_opened_itself(path: Path) -> None:
    script(
        """
        a = userfault.open(path, "r+", dtype="u1", shape=(16, BLOCK), block=BLOCK)
        a[3] ^= 0xff

        def work():
            b = userfault.open(path, "r+", dtype="u1", shape=(16, BLOCK), block=BLOCK)
            b[7] ^= 0xff
            globals()["b"] = b

        assert child(work) == 0
        """,
        path.parent,
    ).check()
    assert path.read_bytes() == inverted(3, 7)


@pytest.mark.parametrize("folder", ["gone", "file"])
def test_a_scratch_folder_that_is_none(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("USERFAULT_SCRATCH", str(tmp_path / folder))
    with pytest.raises(SourceError, match=f"no scratch file can be made in .*{folder}.*USERFAULT_SCRATCH"):
        userfault.empty(1000)


def test_scratch_files_have_no_name(tmp_path: Path) -> None:
    with own_pager(scratch_dir=str(tmp_path)):
        a = userfault.empty((64, BLOCK), "u1", memory=8 * BLOCK, block=BLOCK)
        a[:] = np.random.default_rng(1).integers(0, 255, a.shape, "u1")
        stats = userfault.memory_of(a).stats()
        assert stats.scratch_bytes > 0
        assert list(tmp_path.iterdir()) == []
        del a


def test_closing_by_force_warns_even_where_warnings_are_errors(tmp_path: Path) -> None:
    store = FileStore(tmp_path, CONTENT, block=BLOCK)
    with own_pager(attempts=1):
        array: Any = userfault.open(store, "r+")
        array[0] = 1
        memory = userfault.memory_of(array)
        del array
        store.trouble("raises")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match="are lost"):
                memory.close(force=True)
        assert memory.closed
