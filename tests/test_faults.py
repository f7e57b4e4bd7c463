"""Sources that fail while they are read: tried again, given up loudly, never zeros, never a hang."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import userfault
from support import Finished, run_python, unloadable
from support.page_sources import Trouble, TroubleSource, pattern
from support.pagers import SECOND, own_pager
from support.waiting import wait_until
from userfault.errors import ClosedError, SourceError, SourcePickleError, WorkerError
from userfault.memory import PagedMemory

PAGE = 4096
BLOCKS = 32
NBYTES = BLOCKS * PAGE
TESTS = str(Path(__file__).parent)


@pytest.fixture
def source(tmp_path: Path) -> TroubleSource:
    return TroubleSource(NBYTES, tmp_path)


def in_a_process(code: str, *arguments: str, **options: Any) -> Finished:
    return run_python(code, arguments=arguments, env={"PYTHONPATH": TESTS}, **options)


def touch(source: TroubleSource, trouble: Trouble, at: int) -> Finished:
    """Have a process of its own read one byte of the source, and print what it got."""
    source.trouble(trouble)
    return in_a_process(
        """
        import pathlib, sys, userfault
        from support.page_sources import TroubleSource
        source = TroubleSource(int(sys.argv[2]), pathlib.Path(sys.argv[1]))
        a = userfault.open(source, name="an array")
        print("reading", flush=True)
        print(a[int(sys.argv[3])], flush=True)
        """,
        str(source.folder),
        str(NBYTES),
        str(at),
    )


@pytest.mark.parametrize("kind", ["OSError", "OddError", "SystemExit", "KeyboardInterrupt", "too much"])
def test_a_block_that_cannot_be_read_kills_its_reader(kind: Any, source: TroubleSource) -> None:
    done = touch(source, Trouble(kind, 5 * PAGE, 6 * PAGE), 5 * PAGE + 1)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "reading\n")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("userfault: ")]
    assert line.startswith(
        f"userfault: an array: block 5 (bytes {5 * PAGE}-{6 * PAGE}) cannot be read after 4 attempts: "
    )
    cause = {
        "OSError": "OSError: [Errno 5] the disk is on fire",
        "OddError": "OddError: fire and water",
        "SystemExit": "SystemExit: enough",
        "KeyboardInterrupt": "KeyboardInterrupt: ",
        "too much": "ValueError: ",
    }
    assert f"attempts: {cause[kind]}" in line
    assert line.endswith("It is poisoned: reading it raises SIGBUS.")
    assert source.failures() == 4


def test_the_blocks_around_a_bad_one_are_good(source: TroubleSource) -> None:
    source.trouble(Trouble("OSError", 5 * PAGE, 6 * PAGE))
    done = in_a_process(
        """
        import pathlib, sys, userfault
        from support.page_sources import TroubleSource, pattern
        nbytes = int(sys.argv[2])
        a = userfault.open(TroubleSource(nbytes, pathlib.Path(sys.argv[1])))
        for block in [*range(5), *range(6, nbytes // 4096)]:
            assert a[block * 4096 : (block + 1) * 4096].tobytes() == pattern(block * 4096, 4096), block
        print("the others are good", flush=True)
        a[5 * 4096]
        """,
        str(source.folder),
        str(NBYTES),
    )
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "the others are good\n")


def failed(memory: PagedMemory) -> bool:
    return memory.stats().error_count > 0


@pytest.mark.parametrize("times", [1, 3])
def test_a_source_that_recovers_is_read(source: TroubleSource, times: int) -> None:
    source.trouble(Trouble("OSError", times=times))
    with own_pager():
        array = userfault.open(source, readahead=False)
        assert array[PAGE] == pattern(PAGE, 1)[0]
        stats = userfault.memory_of(array).stats()
        assert (stats.retries, stats.error_count, stats.poisoned_blocks) == (times, 0, 0)
        assert source.failures() == times
        del array


def test_prefetch_raises_what_the_source_said(source: TroubleSource) -> None:
    source.trouble(Trouble("OSError", 5 * PAGE, 6 * PAGE))
    with own_pager():
        array = userfault.open(source, name="an array")
        memory = userfault.memory_of(array)
        for call in (memory.prefetch, memory.populate):
            with pytest.raises(
                SourceError, match=r"an array: bytes \[20480, 24576\) cannot be read: OSError: "
            ) as caught:
                call()
            error = caught.value
            assert (error.source_name, error.offset, error.length) == ("an array", 5 * PAGE, PAGE)
            assert error.detail == "OSError: [Errno 5] the disk is on fire"
            assert error.errno == 5
            assert isinstance(error, OSError)
        stats = memory.stats()
        assert stats.poisoned_blocks == 0
        assert stats.error_count == len(stats.errors) == 2
        for record in stats.errors:
            assert (record.block, record.offset, record.length, record.attempts) == (5, 5 * PAGE, PAGE, 4)
            assert (record.detail, record.poisoned) == ("OSError: [Errno 5] the disk is on fire", False)
            assert record.time_ns > 0
        told = json.loads(json.dumps(stats.as_dict()))
        assert told["errors"][0]["detail"] == "OSError: [Errno 5] the disk is on fire"
        assert memory.residency()[5] == 0
        # Once it can be read, it is.
        source.trouble(None)
        memory.prefetch()
        assert array.tobytes() == pattern(0, NBYTES)
        del array, memory, call, caught, error


def test_errors_of_a_prefetch_in_the_background_are_recorded(source: TroubleSource) -> None:
    source.trouble(Trouble("OSError", 5 * PAGE, 6 * PAGE))
    with own_pager():
        array = userfault.open(source)
        memory = userfault.memory_of(array)
        memory.prefetch((5 * PAGE, 6 * PAGE), wait=False)
        wait_until(partial(failed, memory), "the error is recorded")
        assert memory.stats().poisoned_blocks == 0
        source.trouble(None)
        assert array[5 * PAGE] == pattern(5 * PAGE, 1)[0]
        del array, memory


def test_the_newest_errors_are_kept(source: TroubleSource) -> None:
    source.trouble(Trouble("OSError"))
    with own_pager(attempts=1):
        array = userfault.open(source)
        memory = userfault.memory_of(array)
        for block in range(20):
            with pytest.raises(SourceError):
                memory.prefetch((block * PAGE, block * PAGE + 1))
        stats = memory.stats()
        assert stats.error_count == 20
        assert [record.block for record in stats.errors] == list(range(4, 20))
        del array, memory


@pytest.mark.needs_kernel_faults
def test_a_poisoned_block_is_seen_by_others_and_can_be_read_later(source: TroubleSource) -> None:
    done = in_a_process(
        """
        import ctypes, os, pathlib, signal, sys, threading, userfault
        from support.page_sources import Trouble, TroubleSource, pattern
        from support.waiting import wait_until
        source = TroubleSource(int(sys.argv[2]), pathlib.Path(sys.argv[1]))
        source.trouble(Trouble("OSError", 5 * 4096, 6 * 4096))
        a = userfault.open(source, name="an array")
        memory = userfault.memory_of(a)
        # A system call that reads a poisoned page fails; the process lives on.
        r, w = os.pipe()
        try:
            os.write(w, a[5 * 4096 : 5 * 4096 + 10])
        except OSError as error:
            print(error.errno)
        stats = memory.stats()
        print(stats.poisoned_blocks, [(e.block, e.poisoned, e.attempts) for e in stats.errors])
        print(memory.residency()[4:7].tolist()[1])
        try:
            memory.prefetch((5 * 4096, 6 * 4096))
        except userfault.SourceError as error:
            print(error.detail)
        print(memory.stats().poisoned_blocks)
        source.trouble(None)
        memory.prefetch((5 * 4096, 6 * 4096))
        print(memory.stats().poisoned_blocks)
        assert a.tobytes() == pattern(0, len(a))
        """,
        str(source.folder),
        str(NBYTES),
    )
    assert done.check().splitlines() == [
        "14",
        "1 [(5, True, 4)]",
        "7",
        "OSError: [Errno 5] the disk is on fire",
        "1",
        "0",
    ]


def test_a_file_that_is_cut_kills_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "numbers.npy"
    np.save(path, np.arange(1 << 16))
    done = in_a_process(
        """
        import os, sys, userfault
        a = userfault.open(sys.argv[1], block=4096, name="numbers", readahead=False)
        memory = userfault.memory_of(a)
        assert a[0] == 0
        os.truncate(sys.argv[1], 128 + 8 * 1000)
        try:
            memory.prefetch((4096, 8192))
        except userfault.SourceError as error:
            print(error.detail)
        os.truncate(sys.argv[1], 128 + (8 << 16))
        memory.prefetch((4096, 8192))
        print(a[513], flush=True)
        os.truncate(sys.argv[1], 100)
        print(a[-1])
        """,
        str(path),
    )
    assert (done.returncode, done.stdout) == (
        -signal.SIGBUS,
        "the file ends before this block: it was cut after it was opened\n513\n".replace(
            "513", done.stdout.split()[-1]
        ),
    )
    assert "userfault: numbers: block 127 (bytes 520192-524288) cannot be read" in done.stderr
    assert "it was cut after it was opened" in done.stderr


def test_a_read_that_hangs_is_ended(source: TroubleSource, capfd: pytest.CaptureFixture[str]) -> None:
    source.trouble(Trouble("hangs", times=1))
    with own_pager(deadline_ns=SECOND // 2):
        array = userfault.open(source, readahead=False)
        assert array[PAGE] == pattern(PAGE, 1)[0]
        assert userfault.pager_stats().workers_lost == 1
        assert userfault.pager_stats().requests_reissued == 1
        del array
    assert (
        "(by userfault: it kept a read longer than the deadline); its requests are issued again."
        in capfd.readouterr().err
    )


def test_a_read_that_always_hangs_is_an_error(
    source: TroubleSource, capfd: pytest.CaptureFixture[str]
) -> None:
    source.trouble(Trouble("hangs"))
    with own_pager(deadline_ns=SECOND, attempts=2, workers=1):
        array = userfault.open(source)
        memory = userfault.memory_of(array)
        with pytest.raises(SourceError, match="the source did not answer before the deadline"):
            memory.prefetch((0, PAGE))
        assert 1 <= source.failures() <= 2
        source.trouble(None)
        memory.prefetch((0, PAGE))
        del array, memory
    assert "worker 0" in capfd.readouterr().err


def test_closing_a_memory_whose_source_hangs_does_not_wait(source: TroubleSource) -> None:
    source.trouble(Trouble("hangs"))
    with own_pager():
        array = userfault.open(source)
        memory = userfault.memory_of(array)
        memory.prefetch(wait=False)
        wait_until(source.reads, "a worker reads")
        del array
        memory.close()
        with pytest.raises(ClosedError):
            memory.prefetch()


def test_a_read_that_kills_its_worker_is_done_by_another(
    source: TroubleSource, capfd: pytest.CaptureFixture[str]
) -> None:
    source.trouble(Trouble("killed", times=3))
    with own_pager():
        array = userfault.open(source, readahead=False)
        assert array.tobytes() == pattern(0, NBYTES)
        assert userfault.pager_stats().workers_lost == 3
        assert userfault.memory_of(array).stats().error_count == 0
        del array
    # One that died before it answered anything leaves no line: it may be the third to do so.
    assert "was killed by signal 9; its requests are issued again." in capfd.readouterr().err


def test_killing_workers_under_load_costs_nothing_but_time(
    source: TroubleSource, capfd: pytest.CaptureFixture[str]
) -> None:
    with own_pager(limit=8 * PAGE):
        array = userfault.open(source)
        kills = 0
        for round_ in range(6):
            for block in np.random.default_rng(round_).permutation(BLOCKS).tolist():
                assert array[block * PAGE : (block + 1) * PAGE].tobytes() == pattern(block * PAGE, PAGE)
                if block % 10 == 0:
                    for worker in psutil.Process().children():
                        if worker.pid in source.workers():
                            worker.send_signal(signal.SIGKILL)
                            kills += 1
        assert kills > 6
        assert userfault.memory_of(array).stats().error_count == 0
        wait_until(lambda: userfault.pager_stats().workers_lost >= min(kills, 6), "the dead are counted")
        del array
    capfd.readouterr()


def test_a_worker_that_never_comes_up_is_an_error() -> None:
    done = in_a_process(
        """
        import os, sys, userfault
        from support.page_sources import PatternSource
        python = sys.executable
        sys.executable = "/nowhere/python"
        try:
            userfault.open(PatternSource(100))
        except userfault.WorkerError as error:
            print(error)
        """
    )
    assert (
        "no worker process loaded the source: cannot run /nowhere/python: No such file or directory"
        in done.check()
    )


def test_a_python_that_always_dies_is_an_error(tmp_path: Path) -> None:
    done = in_a_process(
        """
        import sys, userfault
        from support.page_sources import PatternSource
        sys.executable = "/bin/false"
        try:
            userfault.open(PatternSource(100))
        except userfault.WorkerError as error:
            print(error)
        """
    )
    assert "ended with exit status 1, 3 times in a row, before it answered anything" in done.check()


def test_a_module_that_only_the_program_has(tmp_path: Path) -> None:
    (tmp_path / "lonely.py").write_text(
        "from support.page_sources import PatternSource\nclass Lonely(PatternSource):\n    pass\n"
    )
    done = in_a_process(
        """
        import os, sys, userfault
        sys.path.insert(0, sys.argv[1])
        import lonely
        os.unlink(lonely.__file__)
        try:
            userfault.open(lonely.Lonely(100))
        except ModuleNotFoundError as error:
            print(error)
        """,
        str(tmp_path),
        cwd=tmp_path,
    )
    assert done.check() == "No module named 'lonely'\n"


MAIN = """
import sys, userfault

class Squares(userfault.PageSource):
    nbytes = 1 << 20

    def read_into(self, offset, buffer):
        for i in range(0, len(buffer)):
            buffer[i] = (offset + i) ** 2 % 251

if sys.argv[1] == "hide":
    sys.modules["cloudpickle"] = None
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "cloudpickle" else real(name, *rest)
try:
    a = userfault.open(Squares(), block=4096)
except userfault.SourcePickleError as error:
    print(error)
else:
    print(a[123456] == 123456 ** 2 % 251)
"""


def test_a_source_of_the_script_itself() -> None:
    pytest.importorskip(
        "cloudpickle", reason="cloudpickle is not installed: pip install 'userfault[cloudpickle]'"
    )
    assert in_a_process(MAIN, "keep").check() == "True\n"


def test_a_source_of_the_script_itself_without_cloudpickle() -> None:
    said = in_a_process(MAIN, "hide").check()
    assert "Squares is defined in __main__" in said
    assert "pip install 'userfault[cloudpickle]'" in said


@pytest.mark.parametrize(
    ("kind", "type_", "message"),
    [
        ("missing", FileNotFoundError, r"not there: 'the/file'"),
        ("odd", WorkerError, "OddError: no and length"),
        # Not as they are: they would end this program.
        ("exit", WorkerError, "SystemExit: 3"),
        ("interrupt", WorkerError, "KeyboardInterrupt"),
    ],
)
def test_a_source_that_fails_to_load(kind: str, type_: type[BaseException], message: str) -> None:
    # Whatever it is: SystemExit would end pytest itself.
    with pytest.raises(BaseException, match=message) as caught:
        userfault.open(unloadable.Unloadable(kind))
    assert type(caught.value) is type_


def test_a_source_that_kills_whoever_loads_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerError, match=r"the worker that loaded it (was killed by signal 9|ended)"):
        userfault.open(unloadable.Unloadable("killed"))
    capfd.readouterr()


def test_a_source_that_cannot_be_sent() -> None:
    with pytest.raises(SourcePickleError, match="the source cannot be sent to a worker process: no, never"):
        userfault.open(unloadable.Unsendable())
