"""The socket of a watched process: who may use it, what it answers, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from support import run_python
from support.waiting import wait_until
from userfault import observe, options
from userfault.errors import KernelError, PrivilegeError
from userfault.observe._sockets import connect, waiting_pids

PATIENCE_S = 20.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path / "userfault"
    observe.stop()


def ask(path: Path, request: bytes = b"stats\n") -> dict[str, Any]:
    pid = int(path.stem)
    with connect(path.parent, pid, PATIENCE_S) as connection, connection.makefile("rwb") as stream:
        stream.write(request)
        stream.flush()
        answer: dict[str, Any] = json.loads(stream.readline())
        return answer


def test_only_this_user_can_reach_it(folder: Path) -> None:
    path = observe.serve()
    assert path == folder / f"{os.getpid()}.sock"
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_wide_umask_does_not_open_it(folder: Path) -> None:
    before = os.umask(0)
    try:
        path = observe.serve()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_it_answers_line_by_line(folder: Path) -> None:
    path = observe.serve()
    with connect(folder, os.getpid(), PATIENCE_S) as connection, connection.makefile("rwb") as stream:
        for faults in range(3):
            stream.write(b"stats\n")
            stream.flush()
            answer = json.loads(stream.readline())
            assert answer["pid"] == os.getpid(), faults
        stream.write(b"reboot\nstats\n")
        stream.flush()
        assert "'reboot' is not a request" in json.loads(stream.readline())["error"]
        assert "memories" in json.loads(stream.readline())
    assert ask(path)["version"] == 1


def test_it_tells_what_the_memory_counts(folder: Path) -> None:
    path = observe.serve()
    array = userfault.open(np.arange(100_000.0), name="numbers", block=4096, readahead=False)
    assert array[0] == 0.0
    assert array[50_000] == 50_000.0
    memory = userfault.memory_of(array)
    # A fault's latency is counted after its thread was woken.
    wait_until(lambda: memory.stats().latency["fault"].count == 2, "both faults are counted")
    (told,) = ask(path)["memories"]
    assert told["name"] == "numbers"
    assert told["faults"] == 2
    assert told["nbytes"] == 800_000
    assert told["latency"]["fault"]["count"] == 2
    assert sum(count for _, count in told["latency"]["fault"]["buckets"]) == 2


def test_who_never_ends_a_line_is_let_go(folder: Path) -> None:
    observe.serve()
    with connect(folder, os.getpid(), PATIENCE_S) as connection:
        connection.sendall(b"x" * 5000)
        # Closed with bytes unread: the kernel says so by a reset.
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert ask(folder / f"{os.getpid()}.sock")["pid"] == os.getpid()


def test_who_does_not_read_keeps_nobody_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userfault.observe._server._SEND_TIMEOUT_S", 0.05)
    path = observe.serve()
    with connect(folder, os.getpid(), 0.2) as deaf:
        # Fills what the kernel keeps for it, both ways.
        with contextlib.suppress(OSError):
            while True:
                deaf.sendall(b"stats\n" * 100)
        assert ask(path)["pid"] == os.getpid()


def test_serving_twice_is_serving_once(folder: Path) -> None:
    assert observe.serve() == observe.serve()
    assert waiting_pids(folder) == [os.getpid()]


def test_stopping_leaves_nothing(folder: Path) -> None:
    path = observe.serve()
    with connect(folder, os.getpid(), PATIENCE_S) as connection:
        observe.stop()
        assert connection.recv(1) == b""
    observe.stop()
    assert not folder.exists()
    assert observe.serve() == path
    assert ask(path)["pid"] == os.getpid()


def test_a_folder_with_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than an address of a Unix socket may be."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    try:
        assert ask(observe.serve())["pid"] == os.getpid()
    finally:
        observe.stop()


def test_without_a_runtime_folder_it_is_in_the_temporary_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        path = observe.serve()
        assert path.parent == tmp_path / f"userfault-{os.geteuid()}"
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        observe.stop()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert options.socket_dirs()[0] == path.parent


def test_a_folder_that_is_open_to_others_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(PrivilegeError, match=rf"mode 755\): chmod 700 {folder}"):
        observe.serve()


def test_a_link_in_its_place_is_refused(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(PrivilegeError, match="not a folder of this user"):
        observe.serve()
    assert list(elsewhere.iterdir()) == []


def test_where_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file in its place: permissions do not stop root.
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="Set XDG_RUNTIME_DIR or TMPDIR"):
        observe.serve()


def test_the_last_one_takes_the_folder_and_only_the_last(folder: Path) -> None:
    observe.serve()
    (folder / "1.sock").write_text("")
    observe.stop()
    assert [path.name for path in folder.iterdir()] == ["1.sock"]


def test_a_folder_that_another_process_removes_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def removed(where: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            where.rmdir()

    monkeypatch.setattr("userfault.observe._sockets.remove_stale", removed)
    assert ask(observe.serve())["pid"] == os.getpid()
    assert calls == 2


def test_sockets_of_dead_processes_are_removed(folder: Path) -> None:
    code = """
        import os, signal
        from userfault import observe
        print(observe.serve(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = run_python(code)
    left = Path(done.stdout.strip())
    assert left.exists()
    observe.serve()
    assert not left.exists()
    assert waiting_pids(folder) == [os.getpid()]


def test_ending_a_program_removes_its_socket(folder: Path) -> None:
    code = "from userfault import observe; print(observe.serve())"
    path = Path(run_python(code).check().strip())
    assert path.parent == folder
    assert not path.exists()


def test_a_forked_child_does_not_answer_for_its_parent(folder: Path) -> None:
    code = """
        import os, sys, warnings
        from userfault import observe
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        path = observe.serve()
        before = set(os.listdir("/proc/self/fd"))
        pid = os.fork()
        if pid == 0:
            sockets = [os.readlink(f"/proc/self/fd/{fd}") for fd in before if os.path.exists(f"/proc/self/fd/{fd}")]
            held = [name for name in sockets if name.startswith("socket:") or "eventfd" in name]
            assert held == [], held
            own = observe.serve()
            assert own.name == f"{os.getpid()}.sock" and own != path, own
            observe.stop()
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        # The child's end, exit handlers included, took nothing of ours.
        assert path.exists()
        print(observe.serve() == path)
    """
    assert run_python(code).check() == "True\n"


def test_the_variable_has_the_first_open_serve(folder: Path) -> None:
    code = """
        import os, numpy as np, userfault
        from pathlib import Path
        folder = Path(os.environ["XDG_RUNTIME_DIR"], "userfault")
        assert not folder.exists()
        a = userfault.open(np.arange(10.0))
        print([path.name for path in folder.iterdir()] == [f"{os.getpid()}.sock"])
    """
    assert run_python(code, env={"USERFAULT_WATCH": "1"}).check() == "True\n"
    assert not folder.exists()
    quiet = code.replace("[path.name for path in folder.iterdir()] ==", "not folder.exists() and [] !=")
    assert "iterdir" not in quiet
    assert run_python(quiet, env={"USERFAULT_WATCH": "0"}).check() == "True\n"


def test_a_variable_that_cannot_be_obeyed_is_logged_and_open_works(tmp_path: Path) -> None:
    (tmp_path / "userfault").mkdir(0o755)
    (tmp_path / "userfault").chmod(0o755)
    code = """
        import logging, numpy as np, userfault
        logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
        print(userfault.open(np.arange(10.0)).sum(), userfault.open(np.arange(3.0)).sum())
    """
    done = run_python(code, env={"USERFAULT_WATCH": "1", "XDG_RUNTIME_DIR": str(tmp_path)})
    assert done.check() == "45.0 3.0\n"
    assert done.stderr.count("userfault WARNING USERFAULT_WATCH: this process cannot be watched") == 1


@pytest.mark.needs_privilege("another user")
def test_the_kernel_is_asked_who_connects(folder: Path) -> None:
    """Permissions aside: another user is not answered."""
    path = observe.serve()
    folder.chmod(0o777)
    path.chmod(0o666)
    code = f"""
        import os, socket
        os.chdir({str(folder)!r})
        os.seteuid(65534)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout({PATIENCE_S})
        connection.connect({path.name!r})
        try:
            connection.sendall(b"stats\\n")
            print(connection.recv(1))
        except (BrokenPipeError, ConnectionResetError):
            print(b"")
    """
    assert run_python(code).check() == "b''\n"


def test_more_watchers_than_it_serves(folder: Path) -> None:
    path = observe.serve()
    connections: list[socket.socket] = []
    try:
        for _ in range(16):
            connections.append(connect(folder, os.getpid(), PATIENCE_S))
            connections[-1].sendall(b"stats\n")
            assert connections[-1].recv(1) == b"{"
        with connect(folder, os.getpid(), PATIENCE_S) as late:
            assert late.recv(1) == b""
    finally:
        for connection in connections:
            connection.close()

    def answers_again() -> bool:
        try:
            return "memories" in ask(path)
        except (OSError, ValueError):
            return False

    wait_until(answers_again, "a watcher's place is free")
