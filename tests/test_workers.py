"""Worker processes: when they start and end, what they import, and what they leave alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import userfault
from support import run_python
from support.page_sources import ModulesSource, PatternSource, Trouble, TroubleSource, pattern
from support.pagers import SECOND, own_pager
from support.waiting import wait_until
from userfault import pager
from userfault.memory import PagedMemory
from userfault.sources._own import SourceRecipe
from userfault.sources._worker_data import WorkerData

TESTS = str(Path(__file__).parent)
NBYTES = 1 << 18


def children() -> list[psutil.Process]:
    """Return the worker processes of this process."""
    return [
        child for child in psutil.Process().children() if "userfault.workers" in " ".join(child.cmdline())
    ]


def same(array: np.ndarray[Any, Any]) -> bool:
    return bool(array.tobytes() == pattern(0, array.nbytes))


def test_workers_end_at_shutdown() -> None:
    array = userfault.open(PatternSource(NBYTES))
    workers = children()
    assert workers
    assert userfault.pager_stats().workers_alive == len(workers)
    assert not userfault.shutdown()
    assert same(array)
    del array
    assert userfault.shutdown()
    assert not any(worker.is_running() for worker in workers)
    assert userfault.pager_stats().workers_alive == 0
    assert not userfault.pager_stats().running
    assert userfault.shutdown()


def test_workers_linger_and_end() -> None:
    with own_pager(linger_ns=SECOND // 10):
        array = userfault.open(PatternSource(NBYTES))
        workers = children()
        del array
        wait_until(
            lambda: not any(worker.is_running() for worker in workers), "the workers end by themselves"
        )
        wait_until(lambda: not userfault.pager_stats().running, "the fault thread ends by itself")


def test_workers_that_linger_are_used_again() -> None:
    with own_pager(linger_ns=60 * SECOND):
        for seed in range(5):
            array = userfault.open(PatternSource(NBYTES, seed=seed))
            assert array.tobytes() == pattern(0, NBYTES, seed)
            del array
        assert userfault.pager_stats().workers_started <= 2
        assert userfault.pager_stats().workers_lost == 0


def test_an_ended_pager_starts_again() -> None:
    with own_pager() as own:
        for _ in range(3):
            array = userfault.open(PatternSource(NBYTES))
            assert same(array)
            del array
            own.shutdown()
            assert not children()


def test_memories_share_workers() -> None:
    with own_pager(workers=2):
        arrays = [userfault.open(PatternSource(NBYTES, seed=seed)) for seed in range(8)]
        for seed, array in enumerate(arrays):
            assert array.tobytes() == pattern(0, NBYTES, seed)
        assert 1 <= len(children()) <= 2
        assert userfault.pager_stats().workers_started <= 2
        del arrays, array


def test_native_sources_start_no_workers(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100_000))
    with own_pager():
        arrays = [userfault.open(tmp_path / "a.npy"), userfault.open(np.arange(100_000))]
        assert arrays[0].sum() == arrays[1].sum()
        assert userfault.pager_stats().workers_started == 0
        assert not children()
        del arrays


def test_no_more_workers_than_are_allowed() -> None:
    code = """
        import psutil, userfault
        from support.page_sources import PatternSource
        arrays = [userfault.open(PatternSource(1 << 20, seed=s, concurrency=4)) for s in range(4)]
        for a in arrays:
            a.sum()
        print(len(psutil.Process().children()))
    """
    assert run_python(code, env={"PYTHONPATH": TESTS, "USERFAULT_WORKERS": "1"}).check() == "1\n"


def modules(code: str = "", arguments: str = "") -> set[str]:
    """Return what a worker imports for a plain source of a fresh program, opened with these further `arguments`."""
    done = run_python(
        f"""
        import sys, userfault
        from support.page_sources import ModulesSource
        {code}
        a = userfault.open(ModulesSource(){arguments})
        sys.stdout.write(a.tobytes().rstrip(bytes(1)).decode())
        """,
        env={"PYTHONPATH": TESTS, "USERFAULT_WORKERS": "1"},
    )
    return set(done.check().splitlines())


@pytest.mark.parametrize("arguments", ["", ", dtype='<f4', shape=(128, 128)"])
def test_a_worker_imports_only_what_its_source_needs(arguments: str) -> None:
    imported = modules(arguments=arguments)
    assert {"userfault.workers._main", "support.page_sources"} <= imported
    heavy = {
        "numpy",
        "zarr",
        "fsspec",
        "obstore",
        "h5py",
        "userfault.arrays",
        "userfault.memory",
        "userfault.pager",
    }
    assert sorted(imported & heavy) == []


def test_a_source_that_prints_does_not_disturb_stdout(tmp_path: Path) -> None:
    done = run_python(
        """
        import pathlib, sys, userfault
        from support.page_sources import Trouble, TroubleSource, pattern
        source = TroubleSource(1 << 14, pathlib.Path(sys.argv[1]))
        source.trouble(Trouble("prints"))
        a = userfault.open(source)
        assert a.tobytes() == pattern(0, 1 << 14)
        print("done")
        """,
        arguments=[str(tmp_path)],
        env={"PYTHONPATH": TESTS},
    )
    assert done.check() == "done\n"
    assert "a line from the source" in done.stderr


def test_workers_read_nothing_from_stdin() -> None:
    array = userfault.open(PatternSource(NBYTES))
    for worker in children():
        folder = Path(f"/proc/{worker.pid}/fd")
        assert os.readlink(folder / "0") == "/dev/null"
        # Nor have they any of this process's descriptors but the engine's three.
        held = [os.readlink(path) for path in folder.iterdir() if int(path.name) > 5]
        assert not [target for target in held if "userfaultfd" in target or target.startswith("/")]
    assert same(array)


INTERRUPTED = """
import pathlib, signal, sys, userfault
from support.page_sources import PatternSource, pattern
a = userfault.open(PatternSource(1 << 18), block=4096, readahead=False)
assert a[0] == pattern(0, 1)[0]
try:
    print("ready", flush=True)
    sys.stdin.readline()
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(a.tobytes() == pattern(0, 1 << 18), userfault.pager_stats().workers_lost)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP])
def test_signals_of_the_terminal_leave_workers_alone(number: signal.Signals) -> None:
    prepare = f"import signal\nsignal.signal({int(number)}, signal.default_int_handler)\n"
    with subprocess.Popen(
        [sys.executable, "-c", prepare + INTERRUPTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": TESTS},
        start_new_session=True,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "interrupted\nTrue 0\n")


@pytest.mark.parametrize("busy", [False, True])
def test_workers_of_a_killed_program_end(busy: bool, tmp_path: Path) -> None:
    source = TroubleSource(1 << 18, tmp_path)
    if busy:
        source.trouble(Trouble("hangs"))
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, userfault\n"
            "from support.page_sources import TroubleSource\n"
            "a = userfault.open(TroubleSource(1 << 18, pathlib.Path(sys.argv[1])))\n"
            "userfault.memory_of(a).prefetch(wait=False)\n"
            "print('ready', flush=True)\n"
            "sys.stdin.readline()\n",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": TESTS},
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(source.reads, "a worker reads")
        workers = psutil.Process(process.pid).children()
        assert workers
        process.kill()
        # Before it is waited for: a zombie is as dead.
        wait_until(lambda: not any(alive(worker) for worker in workers), "the workers end")


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_source_is_closed_with_its_memory(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    with PagedMemory(WorkerData(SourceRecipe(Closes(str(closed)))), name="source", block=4096) as memory:
        memory.prefetch()
        assert not closed.exists()
    wait_until(closed.exists, "the source is closed")


class Closes(PatternSource):
    """Writes a file when it is closed."""

    def __init__(self, path: str) -> None:
        super().__init__(1 << 14)
        self.path = path

    def close(self) -> None:
        Path(self.path).touch()


def test_sys_path_reaches_workers(tmp_path: Path) -> None:
    done = run_python(
        """
        import sys, userfault
        from support.page_sources import PatternSource
        first = userfault.open(PatternSource(100))
        # After the workers started.
        sys.path.append(sys.argv[1])
        import late
        a = userfault.open(late.Late(1 << 14))
        print(a[:3].tolist())
        """,
        arguments=[str(tmp_path)],
        env={"PYTHONPATH": TESTS, "USERFAULT_WORKERS": "1"},
        cwd=module(tmp_path, "late"),
    )
    assert done.check() == str(list(pattern(0, 3))) + "\n"


def module(folder: Path, name: str) -> str:
    code = "from support.page_sources import PatternSource\nclass Late(PatternSource): pass\n"
    (folder / f"{name}.py").write_text(code)
    return "/"


def test_an_embedded_interpreter_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(userfault.WorkerError, match=r"sys\.executable is empty"):
        userfault.open(PatternSource(100))


def test_concurrent_reads_of_one_source() -> None:
    with own_pager(workers=2):
        array = userfault.open(PatternSource(4 << 20, concurrency=4), block=4096)
        userfault.memory_of(array).prefetch()
        assert same(array)
        del array
    assert pager.pager_stats().memories == 0


def test_modules_fit() -> None:
    # What the test above rests on: the source tells the truth.
    buffer = bytearray(ModulesSource.nbytes)
    ModulesSource().read_into(0, memoryview(buffer))
    assert b"support.page_sources\n" in buffer
