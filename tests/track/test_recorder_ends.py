"""How recordings end: with the program, by a signal, and in forked children."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from support import run_python
from userfault.track import read_trace

pytestmark = pytest.mark.needs_feature("WP_ASYNC")

PROGRAM = """
    import gc, mmap, os, signal, sys, threading, time
    import numpy as np
    from userfault.track import Recorder, read_trace
    from userfault.track._ledger import ledger
    path = sys.argv[1]
    a = np.frombuffer(mmap.mmap(-1, 64 * mmap.PAGESIZE), np.uint8).reshape(64, -1)

    def looked(recorder):
        seen = recorder.cost.samples
        while recorder.cost.samples < seen + 2:
            time.sleep(0.001)
"""


def pages(path: Path) -> int:
    return int(read_trace(path).runs["count"].sum())


def test_the_file_is_closed_when_the_program_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    run_python(PROGRAM + "    Recorder(a=a, to=path).start(); a[10:20, 0] = 1", arguments=[str(path)]).check()
    assert read_trace(path).complete
    assert pages(path) == 10


def test_an_exception_closes_it_too(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    code = """
    with Recorder(a=a, to=path):
        a[10:20, 0] = 1
        raise SystemExit(3)
    """
    assert run_python(PROGRAM + code, arguments=[str(path)]).returncode == 3
    assert read_trace(path).complete
    assert pages(path) == 10


def test_a_program_that_is_killed_leaves_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    code = """
    recorder = Recorder(a=a, to=path, every=0.001, budget=1).start()
    while not len(read_trace(path).runs):  # two seconds of samples at the latest
        a[:] = 1
    os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(PROGRAM + code, arguments=[str(path)]).returncode == -signal.SIGKILL
    trace = read_trace(path)
    assert not trace.complete
    assert [thing.name for thing in trace.objects] == ["a"]
    assert pages(path) >= 64


def test_a_forked_child_records_nothing_and_the_parent_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    code = """
    from userfault.errors import ForkedError
    with Recorder(a=a, to=path, every=0.001, budget=1) as recorder:
        a[0, 0] = 1
        recorder.look()
        inside, outside = os.pipe()
        if not (pid := os.fork()):
            gc.collect()
            assert not recorder.running and recorder.names == ()
            assert ledger.areas == [], ledger.areas
            assert threading.active_count() == 1
            a[:, 0] = 2
            try:
                recorder.stop()
            except ForkedError:
                with Recorder(a=a, every=1000) as own:
                    a[3, 0] = 3
                assert own.trace.runs["count"].sum() == 1
                recorder.__exit__(None, None, None)
                os._exit(7)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] >> 8 == 7
        a[32, 0] = 1
        looked(recorder)
    trace = read_trace(path)
    assert trace.complete
    assert trace.runs["page"].tolist() == [0, 32], trace.runs
    """
    run_python(PROGRAM + code, arguments=[str(path)]).check()


def test_a_child_that_exits_normally_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.uft"
    code = """
    recorder = Recorder(a=a, to=path, every=1000).start()
    size = os.path.getsize(path)
    if not os.fork():
        a[5, 0] = 1
        sys.exit(0)
    assert os.wait()[1] == 0
    assert os.path.getsize(path) == size
    a[7, 0] = 1
    recorder.stop()
    """
    run_python(PROGRAM + code, arguments=[str(path)]).check()
    assert pages(path) == 1
