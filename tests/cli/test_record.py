"""`userfault record`: programs run as they do without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli import run_cli
from support.recording import LOOKS, pages_of, record, untold, write_program
from userfault.track import read_trace

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(untold(), reason="this kernel does not tell which pages are written")


# --- programs run as without it


def test_a_program_finds_itself_at_home(tmp_path: Path) -> None:
    write_program(tmp_path, "value = 5", "neighbour.py")
    path = write_program(
        tmp_path,
        """
        import inspect, neighbour, os, pickle, sys
        assert neighbour.value == 5
        assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
        assert sys.argv[0] == "program.py" and __file__ == os.path.abspath("program.py")
        assert inspect.ismodule(__builtins__) and __loader__.get_filename() == __file__
        class Thing: pass
        assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
        print(sys.argv[1:])
        print(sys.path[0])
        """,
    )
    assert path == str(tmp_path / "program.py")
    finished = run_cli("record", "program.py", "--every", "-m", "--json", cwd=tmp_path)
    assert finished.check().splitlines() == [str(["--every", "-m", "--json"]), str(tmp_path)]
    assert "userfault: no large arrays" in finished.stderr
    assert (tmp_path / "program.uft").exists()


def test_a_trace_that_the_program_removes_is_told_of(tmp_path: Path) -> None:
    path = write_program(tmp_path, "import os; os.remove('program.uft')")
    finished = run_cli("record", path, cwd=tmp_path)
    assert finished.check() == ""
    assert "userfault: there is no trace" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_module(tmp_path: Path) -> None:
    write_program(tmp_path, "", "package/__init__.py")
    write_program(
        tmp_path, "import sys, package; print(__name__, sys.argv[1:], sys.path[0])", "package/__main__.py"
    )
    finished = run_cli("record", "-m", "package", "--force", cwd=tmp_path)
    assert finished.check().split() == ["__main__", "['--force']", str(tmp_path)]
    assert (tmp_path / "package.uft").exists()


def test_a_folder_with_a_main_program(tmp_path: Path) -> None:
    write_program(tmp_path, "print('here', __name__)", "folder/__main__.py")
    assert run_cli("record", "folder", cwd=tmp_path).check().split() == ["here", "__main__"]


def test_an_exception_is_shown_as_ever(tmp_path: Path) -> None:
    path = write_program(tmp_path, "def f():\n    raise ValueError('what')\nf()\n")
    finished, _, trace = record(path, folder=tmp_path)
    assert finished.returncode == 1
    lines = finished.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{path}", line 3, in <module>'
    assert "ValueError: what" in lines
    assert trace.complete


def test_a_mistake_in_its_syntax(tmp_path: Path) -> None:
    finished, _, _ = record(write_program(tmp_path, "a b c"), folder=tmp_path)
    assert finished.returncode == 1
    assert "SyntaxError" in finished.stderr
    assert finished.stderr.startswith("  File ")  # no frame of ours


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("raise SystemExit", 0),
        ("import sys; sys.exit('bad')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass", 130),
    ],
)
def test_its_exit_code_is_passed_on(tmp_path: Path, code: str, expected: int) -> None:
    finished, _, trace = record(write_program(tmp_path, code), folder=tmp_path)
    assert finished.returncode == expected
    assert trace.complete


def test_what_happens_after_its_last_line_is_recorded(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import atexit, threading
import numpy as np
def late():
    threading.main_thread().join()
    in_thread = np.zeros(1 << 20)
    wait(5)
def last():
    at_exit = np.zeros(1 << 20)
    wait(5)
threading.Thread(target=late).start()
atexit.register(last)
""",
    )
    _, _, trace = record(path, folder=tmp_path)
    assert {"in_thread", "at_exit"} <= {one.name for one in trace.objects}


def test_a_program_that_ends_at_once_leaves_a_trace_that_can_be_read(tmp_path: Path) -> None:
    path = write_program(tmp_path, "import os; os._exit(7)")
    assert run_cli("record", path, cwd=tmp_path).returncode == 7
    assert not read_trace(tmp_path / "program.uft").complete


def test_arrays_that_the_recorder_had_no_time_for_are_counted(tmp_path: Path) -> None:
    path = write_program(tmp_path, "import numpy as np; one = np.ones(1 << 20); other = one * 2")
    finished = run_cli("record", "--every", "30", path, cwd=tmp_path)
    finished.check()
    assert (
        "because the program ended before they were looked at: 2 arrays, the largest of 8 MiB"
        in finished.stderr
    )


def test_forks_and_processes_go_their_own_way(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import multiprocessing, os, sys
import numpy as np
def work(number):
    array = np.full(1 << 18, number)
    return int(array.sum())
if __name__ == "__main__":
    kept = np.zeros(1 << 20)
    wait(5)
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            print(pool.map(work, range(3)))
    pid = os.fork()
    if pid == 0:
        kept[:] = 1
        del kept
        sys.exit(4)  # as an interpreter ends
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert kept.sum() == 0
    kept[0] = 1
    wait(3)
""",
    )
    finished, _, trace = record("--no-huge", path, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[:2] == [str([0, 1 << 18, 1 << 19])] * 2
    assert len(finished.stdout.splitlines()) == 3  # one summary
    assert trace.complete
    assert pages_of(trace, "kept") == {0}


# --- the command


def test_the_summary(tmp_path: Path) -> None:
    path = write_program(
        tmp_path, LOOKS + "import numpy as np\ngrid = np.zeros(1 << 20)\nwait(5)\nprint('own')"
    )
    finished = run_cli("record", "--every", "0.02", path, cwd=tmp_path)
    assert finished.check() == "own\n"
    first, cost, trace, *rest = finished.stderr.splitlines()
    assert first.startswith("userfault: 1 array of 8 MiB (grid) in ")
    assert first.endswith(", nothing lost")
    assert cost.startswith("  cost: ")
    assert trace.startswith("  trace: program.uft (")
    assert rest[-1] == "  next: userfault report heatmap program.uft"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.py"], 2, "missing.py: there is no such file"),
        (["-m", "no.such.module"], 2, "no.such.module"),
        (["--budget", "200%", "program.py"], 2, "--budget '200%': give a share above 0"),
        (["--larger-than", "big", "program.py"], 1, "--larger-than: 'big' is not a size"),
        (["-o", "trace.png", "program.py"], 2, "a trace ends in .uft"),
        (["-o", "nowhere/trace.uft", "program.py"], 1, "there is no folder"),
        (["-o", "there.uft", "program.py"], 1, "there.uft exists; add --force"),
    ],
)
def test_mistakes_are_told_before_the_program_runs(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    write_program(tmp_path, "print('ran')")
    (tmp_path / "there.uft").touch()
    finished = run_cli("record", *arguments, cwd=tmp_path)
    assert finished.returncode == code
    assert finished.stdout == ""
    assert message in finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["stencil.py", "--size", "512"],
        ["matmul.py", "--size", "512", "--tile", "128"],
        ["random_walk.py", "--nodes", "100000"],
        ["groupby.py", "--rows", "100000"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_examples(tmp_path: Path, arguments: list[str]) -> None:
    script, *rest = arguments
    finished = run_cli("record", str(EXAMPLES / script), *rest, "--seconds", "0.5", cwd=tmp_path)
    finished.check()
    assert read_trace(tmp_path / f"{Path(script).stem}.uft").complete
