"""Every style of fork while other threads fault: right bytes on both sides, and to each its own threads and workers."""

from __future__ import annotations

import pytest

from support import run_python
from support.soak import patience_s, rounds
from support.survival import WAYS, WRITABLE, survive

FORKS = """
import psutil

def threads_of(pid="self"):
    # The engine's threads in a process, by name.
    names = []
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            names.append(Path(f"/proc/{pid}/task/{task}/comm").read_text().strip())
        except FileNotFoundError:
            pass
    return sorted(name for name in names if name.startswith("uf-"))

def own_threads():
    return [name for name in threads_of() if name != "uf-io"]

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def in_group():
    # Whoever is left of this process group (support.run_python makes one for each program).
    alive = set()
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == os.getpgrp() and process.status() != psutil.STATUS_ZOMBIE:
                alive.add(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    return alive

def nothing_but(pids):
    wait_until(lambda: in_group() <= pids, f"only {pids} are left: {in_group()}")
"""


CHECKED = """
def check(array, way):
    # In a child. A thread names itself, a little after it was started.
    wait_until(lambda: own_threads() == ["uf-fault-0", "uf-super"], f"one thread of each kind: {threads_of()}")
    assert not psutil.Process().children() or way == "source"
    if not same(array, right):
        return 3
    workers = psutil.Process().children()
    assert (len(workers) > 0) == (way == "source"), workers
    return 0

def child(work, *arguments):
    code = 70
    try:
        code = work(*arguments)
    except BaseException as error:
        print("child:", repr(error), file=sys.stderr)
    os._exit(code)
"""


@pytest.mark.parametrize("way", WAYS)
def test_forks_while_threads_fault(way: str) -> None:
    done = survive(
        FORKS
        + CHECKED
        + """
way = sys.argv[1]
array = open_way(way, folder, memory="256 KiB", block="16 KiB")
pids = {os.getpid()}
with readers([array], [right]) as some:
    mine = set(process.pid for process in psutil.Process().children())
    for _ in range(int(sys.argv[2])):
        pid = os.fork()
        if pid == 0:
            child(check, array, way)
        assert ended(pid) == 0
    seen = list(some.passes)
    wait_until(lambda: sum(some.passes) > sum(seen), "the parent's readers come on")
    # The parent's workers are still those that it had (or more), and the children's are gone.
    mine_now = set(process.pid for process in psutil.Process().children())
    assert mine <= mine_now and userfault.pager_stats().workers_lost == 0, (mine, mine_now)
    nothing_but(pids | mine_now)
assert own_threads() == ["uf-fault-0", "uf-super"], threads_of()
assert same(array, right)
del array, some
gc.collect()
print(userfault.shutdown(), threads_of())
nothing_but(pids)
        """,
        way,
        str(rounds(6, 300)),
    )
    assert done.check() == "True []\n"


@pytest.mark.parametrize("way", WAYS)
def test_c_forks_while_native_threads_fault(way: str) -> None:
    """A C fork runs none of Python's handlers for it, only those that C code registered (pthread_atfork).

    The threads are not Python's: a child may run no Python if others waited for the interpreter's lock at that moment.
    """
    done = survive(
        FORKS
        + CHECKED
        + """
way = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
fork = ctypes.PyDLL(None).fork  # with the GIL held: the main thread is the child's
scan = ctypes.cast(libc.wcslen, ctypes.c_void_p)
array = open_way(way, folder, memory="256 KiB", block="16 KiB")
# wcslen reads until four bytes are zero: here those behind the end, and earlier if there was a page of zeros.
padded = np.zeros((NBYTES + 4095) // 4096 * 4096, np.uint8)
padded[:NBYTES] = right
length = int(np.flatnonzero(padded.view(np.uint32) == 0)[0])
assert length * 4 >= NBYTES - 4

def start():
    thread = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(thread), None, scan, ctypes.c_void_p(array.ctypes.data)) == 0
    return thread

def scanned(thread):
    result = ctypes.c_size_t()
    assert libc.pthread_join(thread, ctypes.byref(result)) == 0
    return result.value

for _ in range(int(sys.argv[2])):
    threads = [start() for _ in range(4)]
    pid = fork()
    if pid == 0:
        child(check, array, way)
    assert [scanned(thread) for thread in threads] == [length] * 4
    assert ended(pid) == 0
mine = set(process.pid for process in psutil.Process().children())
assert userfault.pager_stats().workers_lost == 0
nothing_but({os.getpid()} | mine)
assert same(array, right)
del array
gc.collect()
print(userfault.shutdown(), threads_of())
nothing_but({os.getpid()})
        """,
        way,
        str(rounds(6, 300)),
    )
    assert done.check() == "True []\n"


@pytest.mark.parametrize("way", WRITABLE)
def test_forks_while_threads_write(way: str) -> None:
    """The child sees what was there when it was forked and keeps its own changes; the parent loses none of its own."""
    done = survive(
        FORKS
        + CHECKED
        + """
way = sys.argv[1]

def check_writes():
    before = array.copy()
    # What a thread was writing at that moment may be there, or not, or in part.
    if some.wrong_pages():
        return 3
    array[::5000] = 1
    memory.evict()
    if not (array[::5000] == 1).all() or not np.array_equal(array[1::5000], before[1::5000]):
        return 4
    if way in WRITTEN_BACK:
        try:
            memory.flush()
        except userfault.ForkedError:
            return 0
        return 5
    return 0

# Of a file, what is not in memory when it is forked is read when it is touched, perhaps newer: here all of it is.
array = open_way(way, folder, memory="8 MiB" if way in WRITTEN_BACK else "256 KiB", block="16 KiB")
memory = userfault.memory_of(array)
for _ in range(int(sys.argv[2])):
    with writers(array, 3) as some:
        pids = []
        for _ in range(3):
            wait_until(lambda: min(some.passes) > 20, "the writers come on")
            some.passes[:] = [0] * 3
            pid = os.fork()
            if pid == 0:
                child(check_writes)
            pids.append(pid)
        assert [ended(pid) for pid in pids] == [0, 0, 0]
    if way in WRITTEN_BACK:
        memory.flush()
        assert stored(folder) == some.want.tobytes()
print("nothing lost", memory.stats().error_count)
        """,
        way,
        str(rounds(2, 200)),
    )
    assert done.check() == "nothing lost 0\n"


def test_a_thread_forks_while_the_main_thread_waits_in_a_fault() -> None:
    """The thread that forked is the child's only one: the GIL's owner elsewhere is not there any more."""
    done = survive(
        FORKS
        + """
source = TroubleSource(1 << 18, folder)
array = userfault.open(source, memory="128 KiB", readahead=False)
right = expected(array.nbytes)
codes = []

def forks():
    for _ in range(int(sys.argv[1])):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = 0 if same(array, right) and np.array_equal(array, right) else 3
            finally:
                os._exit(code)
        codes.append(ended(pid))

thread = threading.Thread(target=forks)
thread.start()
# With the GIL (NumPy) and without it (memcmp), by turns.
while thread.is_alive():
    assert np.array_equal(array, right) and same(array, right)
thread.join()
print(set(codes), len(codes) == int(sys.argv[1]))
        """,
        str(rounds(8, 300)),
    )
    assert done.check() == "{0} True\n"


def test_children_of_children_while_all_of_them_fault() -> None:
    done = survive(
        FORKS
        + """
array = open_way("source", folder, memory="256 KiB", block="16 KiB")
program = os.getpid()

def family(depth):
    with readers([array], [right], 2):
        if depth:
            pids = []
            for _ in range(2):
                pid = os.fork()
                if pid == 0:
                    code = 70
                    try:
                        family(depth - 1)
                        code = 0
                    except BaseException as error:
                        print("child:", repr(error), file=sys.stderr)
                    os._exit(code)
                pids.append(pid)
            assert [ended(pid) for pid in pids] == [0, 0]
        assert same(array, right)

family(int(sys.argv[1]))
del array
gc.collect()
print(userfault.shutdown())
nothing_but({program})
        """,
        str(rounds(2, 4)),
    )
    assert done.check() == "True\n"


@pytest.mark.parametrize("style", ["vfork", "posix_spawn", "fork and exec", "system"])
def test_programs_are_run_while_threads_fault(style: str) -> None:
    """None of the engine's descriptors goes to them, and none of them takes a page or a worker along."""
    done = survive(
        FORKS
        + """
import subprocess
style = sys.argv[1]
array = open_way("source", folder, memory="256 KiB", block="16 KiB")
listing = "{ readlink /proc/$$/fd/*; true; }"

def run():
    if style == "vfork":
        return subprocess.run(["sh", "-c", listing], capture_output=True, text=True, close_fds=False).stdout
    if style == "fork and exec":
        return subprocess.run(
            ["sh", "-c", listing], capture_output=True, text=True, close_fds=False, preexec_fn=lambda: None
        ).stdout
    out = folder / "listing"
    if style == "system":
        assert os.system(f"{listing} > {out}") == 0
    else:
        assert ended(os.posix_spawn("/bin/sh", ["sh", "-c", f"{listing} > {out}"], os.environ)) == 0
    return out.read_text()

with readers([array], [right]) as some:
    mine = set(process.pid for process in psutil.Process().children())
    for _ in range(int(sys.argv[2])):
        text = run()
        assert "/dev/null" in text, text
        ours = ("userfault]", "/dev/userfault", "anon_inode", "memfd", "pagemap")
        assert not any(word in text for word in ours), text
    seen = sum(some.passes)
    wait_until(lambda: sum(some.passes) > seen, "the readers come on")
    assert mine <= set(process.pid for process in psutil.Process().children())
    assert userfault.pager_stats().workers_lost == 0
print("the same workers", same(array, right))
        """,
        style,
        str(rounds(5, 200)),
    )
    assert done.check() == "the same workers True\n"


MULTIPROCESSING = """
import gc, multiprocessing, sys, tempfile, warnings
from pathlib import Path
import userfault
from support.survival import expected, open_way, readers, same

def child(way, array, folder, pipe):
    # A forked child has the parent's array, with threads of the parent waiting in it; others open their own.
    import psutil
    if array is None:
        array = open_way(way, Path(folder))
    good = same(array, expected())
    pipe.send((way, good, len(psutil.Process().children()) > 0))

if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    method, ways = sys.argv[1], sys.argv[2].split(",")
    context = multiprocessing.get_context(method)
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            array = open_way(way, Path(folder), memory="256 KiB", block="16 KiB")
            with readers([array], [expected()], 2):
                for _ in range(int(sys.argv[3])):
                    own = None if method == "fork" else tempfile.mkdtemp(dir=folder)
                    receiving, sending = context.Pipe(duplex=False)
                    given = array if method == "fork" else None
                    process = context.Process(target=child, args=(way, given, own, sending))
                    process.start()
                    sending.close()
                    assert receiving.recv() == (way, True, way == "source"), way
                    process.join()
                    assert process.exitcode == 0
                    process.close()
                    receiving.close()
            assert same(array, expected())
            del array, given
            gc.collect()
    print(userfault.shutdown())
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing_while_threads_fault(method: str, tmp_path: object) -> None:
    # A file, not a string: spawned children import their parent's script.
    program = f"{tmp_path}/program.py"
    with open(program, "w") as file:
        file.write(MULTIPROCESSING)
    tests = __file__.rpartition("/survive/")[0]
    done = run_python(
        "import runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        patience_s(),
        arguments=[program, method, ",".join(WAYS), str(rounds(1, 30))],
        env={"PYTHONPATH": tests},
    )
    assert done.check() == "True\n"
