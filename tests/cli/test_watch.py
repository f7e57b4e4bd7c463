"""`userfault watch`: a running process as others see it, also when it cannot answer, ends, or never offered to."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from pathlib import Path

import pytest

from support import run_python
from support.cli import run_cli
from support.waiting import wait_until
from userfault.cli._watch.client import BusyError, Client, EndedError

TESTS = str(Path(__file__).parent.parent)

# Says when it is ready, then does what each line on stdin asks for.
PROGRAM = """
import os, sys, tempfile
from pathlib import Path
import numpy as np, userfault
from userfault import observe
from support.page_sources import PatternSource, Trouble, TroubleSource
array = userfault.open(np.arange(100_000.0), name="numbers", block=4096, readahead=False)
observe.serve()
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
HANG = (
    "s = TroubleSource(1 << 16, Path(tempfile.mkdtemp(dir=os.environ['XDG_RUNTIME_DIR']))); "
    "s.trouble(Trouble('hangs')); b = userfault.open(s, name='never'); print('touching', flush=True); b[0]"
)


class Program:
    """A process that can be watched."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def do(self, line: str) -> None:
        self.tell(line)
        assert self.read() == "done"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def program(runtime: Path) -> Iterator[Program]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])},
        text=True,
        start_new_session=True,
    ) as process:
        try:
            found = Program(process)
            assert found.read() == "ready"
            yield found
        finally:
            process.kill()


def test_once_in_json(program: Program) -> None:
    program.do("array[0], array[50_000]")
    values = json.loads(run_cli("watch", str(program.pid), "--once", "--json").check())
    (memory,) = values["memories"]
    assert (values["pid"], memory["name"], memory["nbytes"]) == (program.pid, "numbers", 800_000)
    assert memory["faults"] == 2
    assert values["pager"]["memories"] == 1


def test_once_as_text(program: Program) -> None:
    program.do("array[0]")
    shown = run_cli("watch", str(program.pid), "--once").check()
    for expected in (str(program.pid), "numbers", "781 KiB", "1 faults", "since opened", "p50 / p99"):
        assert expected in shown
    # Where there is no terminal to draw on, it looks once.
    assert "numbers" in run_cli("watch", str(program.pid)).check()


def test_the_list(program: Program) -> None:
    shown = run_cli("watch").check()
    assert str(program.pid) in shown
    assert "-c" in shown
    values = json.loads(run_cli("watch", "--json").check())
    (only,) = values["processes"]
    assert (only["pid"], only["memories"], only["busy"]) == (program.pid, 1, False)


def test_an_empty_list_says_how_to_get_on_it(runtime: Path) -> None:
    assert "USERFAULT_WATCH=1" in run_cli("watch").check()
    assert json.loads(run_cli("watch", "--json").check()) == {"processes": []}


def test_lines_of_json_until_it_ends(program: Program) -> None:
    watching = subprocess.Popen(
        [sys.executable, "-m", "userfault", "watch", str(program.pid), "--json", "-i", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        program.do("array[0]")
        assert first["memories"][0]["faults"] == 0
        lines = iter(watching.stdout.readline, "")
        assert any(json.loads(line)["memories"][0]["faults"] == 1 for line in lines)
        program.kill()
        assert all("memories" in json.loads(line) for line in lines)
        _, errors = watching.communicate(timeout=30)
    assert (watching.returncode, errors) == (0, "")


def test_a_process_whose_gil_is_held_by_a_fault_is_busy(program: Program) -> None:
    """No Python runs there: the command must say so rather than hang."""
    program.tell(HANG)
    assert program.read() == "touching"

    def busy() -> bool:
        values = json.loads(run_cli("watch", "--json").check())
        return bool(values["processes"][0]["busy"])

    # The touch comes a moment after the word.
    wait_until(busy, "the process is busy")
    assert "busy" in run_cli("watch").check()
    done = run_cli("watch", str(program.pid), "--once")
    assert done.returncode == 1
    assert re.search(rf"process {program.pid} has not answered for 5 s: .* holds the GIL", done.stderr)


def is_stopped(pid: int) -> bool:
    stats = [task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(") ")[2].startswith("T") for stat in stats)


def test_an_answer_that_comes_late_is_still_the_answer(program: Program) -> None:
    with Client(program.pid) as client:
        os.kill(program.pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(program.pid), "every thread is stopped")
        try:
            for _ in range(2):
                with pytest.raises(BusyError, match="it is stopped"):
                    client.ask(0.05)
        finally:
            os.kill(program.pid, signal.SIGCONT)
        assert client.ask(20.0)["pid"] == program.pid
        program.do("array[0]")
        assert client.ask(20.0)["memories"][0]["faults"] == 1
        program.kill()
        with pytest.raises(EndedError, match=rf"process {program.pid} ended"):
            client.ask(20.0)


def test_a_process_that_stops_serving(program: Program) -> None:
    with Client(program.pid) as client:
        client.ask(20.0)
        program.do("observe.stop()")
        with pytest.raises(EndedError, match="stopped serving"):
            client.ask(20.0)
    done = run_cli("watch", str(program.pid))
    assert done.returncode == 1
    assert "opened no socket" in done.stderr


def test_a_process_that_never_offered_it(runtime: Path) -> None:
    done = run_cli("watch", str(os.getpid()))
    assert done.returncode == 1
    for expected in (
        f"process {os.getpid()} cannot be watched",
        "USERFAULT_WATCH=1",
        "userfault.observe.serve()",
    ):
        assert expected in done.stderr
    assert (
        json.loads(run_cli("watch", str(os.getpid()), "--json").stdout)["error"]["type"] == "UserfaultError"
    )


def test_a_process_that_is_not_there(runtime: Path) -> None:
    with open("/proc/sys/kernel/pid_max") as file:
        beyond = int(file.read()) + 1
    done = run_cli("watch", str(beyond))
    assert done.returncode == 1
    assert f"there is no process {beyond}" in done.stderr


def test_the_socket_of_a_dead_process_with_this_number(program: Program, runtime: Path) -> None:
    """A socket is believed only if the process that listens on it has the number it is named after."""
    sockets = runtime / "userfault"
    (sockets / f"{program.pid}.sock").rename(sockets / f"{os.getpid()}.sock")
    done = run_cli("watch", str(os.getpid()))
    assert done.returncode == 1
    assert "opened no socket" in done.stderr


@pytest.mark.needs_privilege("another user")
def test_another_users_process(program: Program) -> None:
    # The imports come first: the other user may not be able to read this Python's files.
    code = f"""
        import os, tempfile
        from userfault.cli._watch.client import Client
        from userfault.errors import PrivilegeError
        os.seteuid(65534)
        try:
            Client({program.pid})
        except PrivilegeError as error:
            print(error)
    """
    said = run_python(code).check()
    assert said == f"process {program.pid} belongs to user 0: only that user and root may watch it\n"


@contextmanager
def terminal(columns: int, rows: int) -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return {**kept, "TERM": "xterm"}


def plain(shown: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))


@pytest.mark.parametrize("ends", ["interrupted", "process gone"])
@pytest.mark.parametrize("columns", [80, 140])
def test_the_live_view(program: Program, columns: int, ends: str) -> None:
    shown = b""
    with terminal(columns, 24) as (ours, theirs):
        watching = subprocess.Popen(
            [sys.executable, "-m", "userfault", "watch", str(program.pid), "-i", "0.05"],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        with watching:
            os.set_blocking(ours, False)

            def shows(text: str) -> bool:
                nonlocal shown
                with suppress(BlockingIOError):
                    shown += os.read(ours, 1 << 16)
                return text in plain(shown)

            wait_until(lambda: shows("a second"), "rates")
            program.do("array[0], array[50_000]")
            wait_until(lambda: shows("8 of 784 KiB"), "two blocks are resident")
            os.kill(program.pid, signal.SIGSTOP)
            wait_until(lambda: shows("busy for"), "it says that nobody answers")
            os.kill(program.pid, signal.SIGCONT)
            if ends == "interrupted":
                watching.send_signal(signal.SIGINT)
            else:
                program.kill()
            _, errors = watching.communicate(timeout=30)
        shows("")
    if ends == "interrupted":
        assert (watching.returncode, errors) == (0, "")
    else:
        assert (watching.returncode, errors) == (1, f"userfault: process {program.pid} ended\n")
    # The cursor is shown again.
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert max(len(line.rstrip("\r\n")) for line in re.split(r"\r\n|\r", plain(shown))) <= columns
    assert ("since opened" in plain(shown).rpartition("p50 / p99")[0][-80:]) == (columns == 140)


@pytest.mark.parametrize("arguments", [("0",), ("x",), ("1", "-i", "0")], ids=" ".join)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run_cli("watch", *arguments).returncode == 2


def test_it_needs_no_engine(runtime: Path) -> None:
    """Watching works where the engine cannot be loaded, and starts at once."""
    code = (
        "import sys\n"
        "from userfault.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('userfault._engine' in sys.modules, file=sys.stderr)\n"
    )
    done = run_cli("watch", code=code)
    assert done.stderr == "False\n"
