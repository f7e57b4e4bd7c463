"""Forked children see right bytes, or die loudly: never zeros, never a hang."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from support import Finished, run_python
from support.zoo import KINDS

TESTS = str(Path(__file__).parent)

# From Python 3.12 on, forking a process with threads gives a DeprecationWarning. This one always has some.
PRELUDE = """
import gc, os, sys, tempfile, threading, warnings
from pathlib import Path
import numpy as np, userfault
from support.page_sources import pattern
from support.zoo import KINDS, expected, open_kind
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
right = expected()

def same(array):
    return np.array_equal(array, right)

def in_child(work):
    # Runs `work` in a forked child; returns how that ended.
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = work() or 0
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def script(code: str, *arguments: str, **options: Any) -> Finished:
    import textwrap

    return run_python(
        PRELUDE + textwrap.dedent(code), arguments=arguments, env={"PYTHONPATH": TESTS}, **options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["nothing", "part", "all"])
def test_a_child_reads_right_bytes(kind: str, before: str) -> None:
    done = script(
        """
        a = open_kind(sys.argv[1], folder)
        if sys.argv[2] == "part":
            assert np.array_equal(a[1000:400_000], right[1000:400_000])
        elif sys.argv[2] == "all":
            userfault.memory_of(a).prefetch()
        print(in_child(lambda: not same(a)))
        print(same(a))
        """,
        kind,
        before,
    )
    assert done.check() == "0\nTrue\n"


def test_a_child_has_all_of_userfault() -> None:
    done = script(
        """
        arrays = {kind: open_kind(kind, folder, memory="1 MiB") for kind in KINDS}

        def work():
            for kind, a in arrays.items():
                memory = userfault.memory_of(a)
                memory.evict()
                memory.prefetch((0, 1 << 19))
                assert same(a), kind
                assert memory.stats().resident_bytes <= 1 << 20, memory.stats().resident_bytes
            other = open_kind("zarr", Path(tempfile.mkdtemp(dir=folder)))
            assert same(other)
            # And a grandchild.
            assert in_child(lambda: not all(map(same, arrays.values()))) == 0
            del a, other, memory
            arrays.clear()
            gc.collect()
            assert userfault.shutdown()

        print(in_child(work))
        print(all(map(same, arrays.values())))
        arrays.clear()
        gc.collect()
        print(userfault.shutdown())
        """
    )
    assert done.check() == "0\nTrue\nTrue\n"


def test_many_children_at_once() -> None:
    done = script(
        """
        a = open_kind("source", folder, memory="512 KiB")
        pids = []
        for i in range(6):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if same(a[::-1][::-1]) else 3)
            pids.append(pid)
        same(a)
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
        """
    )
    assert done.check() == "[0, 0, 0, 0, 0, 0]\n"


@pytest.mark.parametrize("kind", ["memory", "raw", "source"])
def test_forks_while_threads_fault(kind: str) -> None:
    done = script(
        """
        import ctypes
        a = open_kind(sys.argv[1], folder, memory="512 KiB")
        memory = userfault.memory_of(a)
        memcmp = ctypes.CDLL(None).memcmp
        memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        stop, wrong = threading.Event(), []

        def read():
            # Without the GIL, so that a fork finds it waiting in a fault.
            while not stop.is_set():
                if memcmp(memory.address, right.ctypes.data, len(right)):
                    wrong.append(1)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        codes = [in_child(lambda: not same(a)) for _ in range(15)]
        stop.set()
        for thread in threads:
            thread.join()
        print(codes == [0] * 15, wrong, same(a))
        """,
        kind,
    )
    assert done.check() == "True [] True\n"


def test_a_closed_array_kills_the_child_that_reads_it() -> None:
    done = script(
        """
        a = open_kind("memory", folder)
        b = open_kind("source", folder)
        assert same(a)
        userfault.memory_of(a).close(force=True)
        print(in_child(lambda: int(a[0]) + 100))
        print(in_child(lambda: not same(b)))
        """
    )
    assert done.check() == f"-{signal.SIGSEGV.value}\n0\n"


def test_a_memory_closed_in_the_child_is_open_in_the_parent() -> None:
    done = script(
        """
        a = open_kind("zarr", folder)

        def work():
            userfault.memory_of(a).close(force=True)
            os.fork() or os._exit(0)
            a[0]

        print(in_child(work))
        print(same(a))
        """
    )
    assert done.check() == f"-{signal.SIGSEGV.value}\nTrue\n"


def test_a_child_without_open_memories_can_open_some() -> None:
    done = script(
        """
        assert same(open_kind("source", folder))
        gc.collect()
        print(in_child(lambda: not same(open_kind("source", folder))))
        print(same(open_kind("source", folder)))
        """
    )
    assert done.check() == "0\nTrue\n"


@pytest.mark.parametrize("ended", [False, True])
def test_the_parent_may_end_first(ended: bool) -> None:
    done = script(
        f"""
        a = open_kind("source", folder)
        assert a[0] == right[0]
        r, w = os.pipe()
        parent = os.getpid()
        if os.fork():
            os.close(w)
            if {ended}:
                os._exit(0)
            os.read(r, 1)
            os._exit(0)
        # Reads on after its parent, and that one's workers, are gone.
        os.close(r)
        os.close(w)
        from support.waiting import wait_until
        wait_until(lambda: os.getppid() != parent, "the parent ends")
        print(same(a))
        """
    )
    assert done.check() == "True\n"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    # A file, not a string: spawned children import their parent's script.
    program = tmp_path / "program.py"
    program.write_text(
        """
import multiprocessing, sys, warnings
from pathlib import Path
import numpy as np, userfault
from support.zoo import KINDS, expected, open_kind

def check(kind, array, folder):
    # A forked child has the parent's array; others open it themselves.
    if array is None:
        array = userfault.open(folder / "a.raw", dtype="u1") if kind == "raw" else open_kind(kind, folder / kind)
    return bool(np.array_equal(array, expected()))

def child(kind, array, folder, answers):
    answers.put((kind, check(kind, array, folder)))

if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    folder, method = Path(sys.argv[1]), sys.argv[2]
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    arrays, processes = {}, []
    for kind in KINDS:
        (folder / kind).mkdir()
        arrays[kind] = open_kind(kind, folder if kind == "raw" else folder / kind)
    for kind in KINDS:
        if method != "fork":
            import shutil
            if kind != "raw":
                shutil.rmtree(folder / kind)
                (folder / kind).mkdir()
        given = arrays[kind] if method == "fork" else None
        process = context.Process(target=child, args=(kind, given, folder, answers))
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
        assert process.exitcode == 0, process.exitcode
    print(sorted(answers.get() for _ in KINDS) == sorted((kind, True) for kind in KINDS))
"""
    )
    done = run_python(
        "import runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        arguments=[str(program), str(tmp_path), method],
        env={"PYTHONPATH": TESTS},
    )
    assert done.check() == "True\n"


def test_a_pool_of_forked_processes_shares_an_array() -> None:
    done = script(
        """
        import multiprocessing
        a = open_kind("zarr", folder, memory="1 MiB")
        whole = int(right.astype(np.int64).sum())

        def part(i):
            return int(a[i::7].astype(np.int64).sum())

        with multiprocessing.get_context("fork").Pool(3) as pool:
            print(sum(pool.map(part, range(7))) == whole)
        """
    )
    assert done.check() == "True\n"


def test_subprocesses_are_not_disturbed() -> None:
    done = script(
        """
        import subprocess
        a = open_kind("source", folder, memory="512 KiB")
        for i in range(3):
            assert np.array_equal(a[i << 16 :], right[i << 16 :])
            listing = "import os; print([os.readlink(f.path) for f in os.scandir('/proc/self/fd') if int(f.name) > 5])"
            command = [sys.executable, "-c", listing]
            out = subprocess.run(command, capture_output=True, text=True, check=True, close_fds=False).stdout
            assert "anon_inode" not in out and "memfd" not in out and "userfault" not in out, out
            # Through vfork and through fork.
            subprocess.run(["true"], check=True)
            subprocess.run(["true"], check=True, preexec_fn=lambda: None)
        print(same(a))
        """
    )
    assert done.check() == "True\n"


def test_a_forked_child_that_executes_another_program_leaves_no_worker_behind() -> None:
    done = script(
        """
        a = open_kind("source", folder)
        assert same(a)

        def work():
            assert same(a[: 1 << 20]) is False
            userfault.memory_of(a).evict()
            assert same(a)
            os.execv("/bin/sh", ["sh", "-c", "exit 5"])

        print(in_child(work))
        print(same(a))
        """
    )
    assert done.check() == "5\nTrue\n"
