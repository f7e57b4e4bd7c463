"""The end of a program, of an exception, of a memory, while arrays are alive and threads wait for pages."""

from __future__ import annotations

import signal

import pytest

from support.survival import WAYS, survive

# How a program may end with arrays of all kinds alive. Each prints "ending" last, and ends with this status. That no
# worker outlives it shows in that the subprocess's pipes close: workers hold them, too.
ENDINGS = {
    "globals": ("", 0),
    "a cycle": ("cycle = [arrays]\ncycle.append(cycle)", 0),
    "a thread that reads on": (
        "some = readers(list(arrays), [right] * len(arrays))\n"
        "for thread in (entered := some.__enter__())._threads:\n"
        "    assert thread.is_alive()\n"
        "import atexit\n"
        "threading._register_atexit(lambda: some.__exit__(None, None, None))",
        0,
    ),
    "daemon threads that read": (
        "def read():\n"
        "    while True:\n"
        "        assert all(same(a, right) for a in arrays)\n"
        "for _ in range(3):\n"
        "    threading.Thread(target=read, daemon=True).start()",
        0,
    ),
    "a function at exit that reads": (
        "import atexit\natexit.register(lambda: print(all(same(a, right) for a in arrays), flush=True))",
        0,
    ),
    "an object that reads when it goes": (
        "class Last:\n"
        "    def __init__(self): self.arrays, self.right, self.same = arrays, right, np.array_equal\n"
        "    def __del__(self):\n"
        "        ok = all(bool((a[::4096] == self.right[::4096]).all()) for a in self.arrays)\n"
        "        print('right' if ok else 'wrong', flush=True)\n"
        "last = Last()\n"
        "itself = [last]; itself.append(itself)",
        0,
    ),
    "an exception": ("def fail(a):\n    b = a[100:]\n    raise ValueError(b[0])\nfail(arrays[0])", 1),
    "sys.exit in the middle": ("sys.exit(7)", 7),
    "os._exit": ("print('ending', flush=True)\nos._exit(5)", 5),
    "SIGTERM": ("print('ending', flush=True)\nos.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "SIGKILL": ("print('ending', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "abort": ("print('ending', flush=True)\nos.abort()", -signal.SIGABRT),
    "another program": ("print('ending', flush=True)\nos.execv('/bin/sh', ['sh', '-c', 'exit 9'])", 9),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_program_ends_with_live_arrays(name: str) -> None:
    code, status = ENDINGS[name]
    done = survive(
        f"""
from support.survival import WAYS
arrays = []
for way in WAYS:
    (folder / way).mkdir()
    arrays.append(open_way(way, folder / way, memory="256 KiB", block="16 KiB"))
assert all(same(a[:300_000], right[:300_000]) for a in arrays)
{code if status in (0, 9) or status < 0 or status == 5 else ""}
print("ending", flush=True)
{code if status in (1, 7) else ""}
        """
    )
    assert done.returncode == status, done.stderr
    lines = done.stdout.splitlines()
    assert "ending" in lines
    assert set(lines) <= {"ending", "True", "right"}
    # What reads at the end did so.
    assert ("True" in lines) == name.startswith("a function")
    assert "Fatal" not in done.stderr.replace("Fatal Python error: Aborted", "")


@pytest.mark.parametrize("way", WAYS)
def test_an_array_outlives_the_exceptions_that_hold_it(way: str) -> None:
    done = survive(
        """
        array = open_way(sys.argv[1], folder, memory="256 KiB", block="16 KiB")
        memory = userfault.memory_of(array)
        kept = []

        def fail(view, depth):
            if depth:
                fail(view[1:], depth - 1)
            raise ValueError(int(view[-1]))

        for _ in range(50):
            try:
                fail(array, 5)
            except ValueError as error:
                kept.append(error)
        try:
            with memory:
                raise KeyError("inside")
        except KeyError as error:
            kept.append(error)
        # Arrays were alive when the block was left: it is open still, and refuses.
        assert not memory.closed
        try:
            memory.close()
        except userfault.ExportedError as error:
            print("refused")
        assert same(array, right)
        reference = array.ctypes.data
        del array
        kept.clear()
        gc.collect()
        memory.close()
        print(memory.closed)
        """,
        way,
    )
    assert done.check() == "refused\nTrue\n"


@pytest.mark.parametrize("way", WAYS)
def test_close_is_refused_while_anything_of_it_is_alive(way: str) -> None:
    done = survive(
        """
        array = open_way(sys.argv[1], folder, memory="256 KiB", block="16 KiB")
        memory = userfault.memory_of(array)
        with readers([array], [right]) as some:
            for hold in (lambda: array[5:], lambda: memoryview(array), lambda: memoryview(memory)[10:]):
                held = hold()
                for _ in range(20):
                    try:
                        memory.close()
                        print("closed")
                    except userfault.ExportedError:
                        pass
                del held
            seen = sum(some.passes)
            wait_until(lambda: sum(some.passes) > seen, "the readers come on")
        assert same(array, right)
        del array
        gc.collect()
        memory.close()
        print("refused until now")
        """,
        way,
    )
    assert done.check() == "refused until now\n"


CLOSED = """
how = sys.argv[1]
source = TroubleSource(1 << 18, folder)
if how == "waits":
    source.trouble(Trouble("hangs"))
array = userfault.open(source, name="an array", readahead=False)
memory = userfault.memory_of(array)

def read():
    print("wrong" if not same(array, expected(1 << 18)) else "right", flush=True)

if how != "later":
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_until(source.reads, "a reader waits")
print("closing", flush=True)
memory.close(force=True)
if how == "later":
    read()
thread.join(30)
print("no signal", thread.is_alive(), flush=True)
"""


@pytest.mark.parametrize("how", ["waits", "later"])
def test_who_waits_in_a_memory_that_is_closed_dies_with_a_reason(how: str) -> None:
    done = survive(CLOSED, how)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert done.stdout == "closing\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("userfault: an array")]
    assert any("close" in line for line in said), done.stderr


def test_a_shutdown_waits_for_nobody_and_ends_nothing_that_is_used() -> None:
    done = survive(
        """
        array = open_way("source", folder, memory="256 KiB", block="16 KiB")
        with readers([array], [right]) as some:
            for _ in range(50):
                assert not userfault.shutdown()
            seen = sum(some.passes)
            wait_until(lambda: sum(some.passes) > seen, "the readers come on")
        del array, some
        gc.collect()
        ended = userfault.shutdown()

        def engine_threads():
            names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
            return [name for name in names if name.exists() and name.read_text().startswith("uf-")]

        wait_until(lambda: not engine_threads(), "the engine's threads have gone")
        print(ended)
        """
    )
    assert done.check() == "True\n"
