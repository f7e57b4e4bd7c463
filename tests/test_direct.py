"""`delivery="direct"`: threads resolve their own faults in a handler of SIGBUS, and others keep theirs."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import userfault
from support.page_sources import PatternSource
from support.survival import survive
from userfault import _engine
from userfault.kernel.abi import Feature

pytestmark = pytest.mark.skipif(
    not _engine.host()["features"] & Feature.SIGBUS, reason="the kernel lacks UFFD_FEATURE_SIGBUS"
)
RIGHT = np.arange(1 << 18, dtype="<u4")


def direct(source: object = RIGHT, **options: Any) -> np.ndarray[Any, Any]:
    """Open an array that is larger than its budget."""
    array = userfault.open(source, **{"delivery": "direct", "memory": "256 KiB", "block": "4 KiB"} | options)
    assert isinstance(array, np.ndarray)
    return array


@contextmanager
def replaced() -> Iterator[None]:
    """Have another handler of SIGBUS, and then ours again."""
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    try:
        yield
    finally:
        userfault.rearm()


def test_it_reads_and_writes_within_a_budget() -> None:
    array = direct()
    assert np.array_equal(array, RIGHT)
    assert np.array_equal(array[::-1], RIGHT[::-1])
    stats = userfault.memory_of(array).stats()
    assert stats.evictions
    assert stats.resident_peak < array.nbytes / 2
    changed = direct(mode="c")
    changed[::1000] = 7
    expected = RIGHT.copy()
    expected[::1000] = 7
    assert np.array_equal(changed, expected)
    assert np.array_equal(array, RIGHT)


@pytest.mark.parametrize("readahead", [True, False])
def test_it_reads_a_source_in_python(readahead: bool) -> None:
    source = PatternSource(1 << 20)
    array = direct(source, readahead=readahead)
    expected = np.frombuffer(bytearray(1 << 20), np.uint8)
    source.read_into(0, expected.data)
    assert np.array_equal(array, expected)
    assert userfault.memory_of(array).stats().error_count == 0


def test_system_calls_cannot_wait() -> None:
    array = direct(mode="c")
    memory = userfault.memory_of(array)
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="Bad address") as caught:
            os.write(writer, array[:4])
        assert caught.value.errno == errno.EFAULT
        memory.populate(array[:4])
        assert os.write(writer, array[:4]) == 16
        array[:4] = 1  # the first write must be the program's
        assert os.readv(reader, [array[:4].view("u1").data]) == 16
        assert array[:6].tolist() == [0, 1, 2, 3, 4, 5]
    finally:
        os.close(reader)
        os.close(writer)


def test_a_handler_that_was_replaced_is_told_once_until_rearm_mends_it() -> None:
    array = direct()
    memory = userfault.memory_of(array)
    assert userfault.rearm() is False
    with replaced():
        with pytest.warns(RuntimeWarning, match=r"array.*userfault\.rearm\(\)") as told:
            memory.stats()
        assert told[0].filename == __file__
        memory.stats()  # a second warning would be an error
        memory.prefetch((0, 100))
        assert userfault.rearm() is True
        assert np.array_equal(array, RIGHT)
    with replaced(), pytest.warns(RuntimeWarning, match="delivery='direct'") as told:
        memory.prefetch((0, 100))
    assert told[0].filename == __file__


def test_opening_another_one_mends_it_too() -> None:
    array = direct()
    with replaced():
        other = direct()
        assert userfault.rearm() is False
        assert np.array_equal(array, other)


def test_memory_with_a_thread_does_not_care() -> None:
    array = direct(delivery="thread")
    with replaced():
        assert userfault.memory_of(array).stats().faults == 0
        assert np.array_equal(array, RIGHT)


# A touch of poison, and another of a file that was cut: both real bus errors. The second is no memory of ours.
_BUS_ERRORS = {
    "poison": "bad[0]",
    "another mapping": "cut[0]",
}
_BUS_ERROR = """
import faulthandler, mmap
bad = userfault.open(TroubleSource(1 << 16, folder), delivery="direct", readahead=False)
cut_file = open(folder / "cut", "w+b")
cut_file.truncate(4096)
cut = mmap.mmap(cut_file.fileno(), 4096)
cut_file.truncate(0)
good = userfault.open(right, delivery="direct", memory="256 KiB", block="4 KiB")
userfault.memory_of(bad)  # opened: now its source breaks
TroubleSource(1 << 16, folder).trouble(Trouble("OSError"))
"""


@pytest.mark.parametrize("touch", _BUS_ERRORS.values(), ids=_BUS_ERRORS)
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_faulthandler_tells_of_real_bus_errors(when: str, touch: str) -> None:
    """Once: it was enabled before us, or after us and put behind us, when it passes them on to us in turn."""
    steps = {
        "before": "faulthandler.enable()" + _BUS_ERROR,
        "after": "faulthandler.disable()" + _BUS_ERROR + "faulthandler.enable()\nassert userfault.rearm()",
        "never": "import faulthandler; faulthandler.disable()" + _BUS_ERROR,
    }
    # The interpreter runs with -X faulthandler.
    code = (
        f"import faulthandler\n{steps[when]}\nassert same(good, right)\nprint('good', flush=True)\n{touch}\n"
    )
    done = survive(code)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "good\n"
    assert done.stderr.count("Fatal Python error: Bus error") == (when != "never")


def test_a_fork_of_multiprocessing_reads_and_writes_what_it_inherited() -> None:
    done = survive(
        """
        import multiprocessing
        array = userfault.open(right, "c", delivery="direct", memory="256 KiB", block="4 KiB")
        source = userfault.open(PatternSource(NBYTES), delivery="direct", memory="256 KiB", block="4 KiB")
        array[::5000] += 1

        def child(connection):
            told = same(source, right), int((array != right).sum())
            array[::5000] += 1
            connection.send((*told, int(array[0]) - int(right[0]) & 0xFF, userfault.rearm()))

        with readers([source], [right]):
            for _ in range(3):
                here, there = multiprocessing.Pipe()
                process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
                process.start()
                assert here.poll(60)
                print(*here.recv())
                process.join()
                assert process.exitcode == 0
        changed = right.copy()
        changed[::5000] += 1
        assert same(array, changed)
        """
    )
    count = len(range(0, (1 << 20) + 5000, 5000))
    assert done.check() == f"True {count} 2 False\n" * 3


def test_another_thread_runs_while_one_waits_without_the_gil() -> None:
    """What opens the gate is Python code, and runs while a thread waits for the gate in a fault."""
    done = survive(
        """
        from support.page_sources import GateSource
        source = GateSource(NBYTES, folder)
        array = userfault.open(source, delivery="direct", memory="256 KiB", readahead=False)
        thread = threading.Thread(target=lambda: print(same(array, right)))
        thread.start()
        wait_until(source.asked.exists, "a read")
        assert userfault.memory_of(array).stats().blocks_read == 0 and thread.is_alive()
        source.gate.touch()
        thread.join()
        """
    )
    assert done.check() == "True\n"


def test_threads_that_hold_the_gil_while_they_wait() -> None:
    done = survive(
        """
        options = {"memory": "128 KiB", "block": "4 KiB", "readahead": False}
        array = userfault.open(PatternSource(NBYTES), delivery="direct", **options)
        counted = 0

        def count():
            global counted
            while thread.is_alive():
                counted += 1

        def read():
            assert array.tolist() == right.tolist()  # an element at a time, the GIL held

        thread = threading.Thread(target=read)
        counter = threading.Thread(target=count)
        thread.start()
        counter.start()
        read()
        thread.join()
        counter.join()
        print(counted > 0)
        """
    )
    assert done.check() == "True\n"


@pytest.mark.parametrize("source", ["right", "PatternSource(NBYTES)"])
def test_a_storm_of_signals(source: str) -> None:
    done = survive(
        f"""
        array = userfault.open({source}, delivery="direct", memory="256 KiB", block="4 KiB")
        heard = dict.fromkeys((signal.SIGALRM, signal.SIGPROF, signal.SIGUSR1), 0)

        def hear(number, frame):
            heard[number] += 1
            at = heard[number] * 40_961 % NBYTES
            assert array[at] == right[at]

        for number in heard:
            signal.signal(number, hear)
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
        with readers([array], [right]) as some:
            rounds = 0
            while rounds < 30 or min(heard.values()) < 5:
                for thread in threading.enumerate():
                    signal.pthread_kill(thread.ident, signal.SIGUSR1)
                assert np.array_equal(array, right) and same(array, right)
                rounds += 1
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        print(userfault.memory_of(array).stats().error_count)
        """
    )
    assert done.check() == "0\n"


def test_a_signal_ends_a_process_that_waits_for_a_source() -> None:
    """The handler blocks signals, but not for as long as the source takes."""
    done = survive(
        """
        from support.page_sources import GateSource
        source = GateSource(NBYTES, folder)
        array = userfault.open(source, delivery="direct", readahead=False)
        pid = os.getpid()
        if not os.fork():  # a process, since the GIL is with who waits
            os.setpgid(0, 0)
            wait_until(source.asked.exists, "a read")
            os.kill(pid, signal.SIGTERM)
            os._exit(0)
        array[0]
        """
    )
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == ""


@pytest.mark.parametrize("spin_us", [0, 50.5, 1000])
def test_the_fault_thread_goes_where_it_is_told(spin_us: float) -> None:
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    try:
        userfault.fault_thread(cpu=np.int64(cpu), spin_us=spin_us)
        array = direct(delivery="thread")
        assert np.array_equal(array, RIGHT)
        (task,) = (task for task in os.listdir("/proc/self/task") if _name(task) == "uf-fault-0")
        assert os.sched_getaffinity(int(task)) == {cpu}
        userfault.fault_thread()
        assert os.sched_getaffinity(int(task)) == allowed
        assert np.array_equal(array[::-1], RIGHT[::-1])
    finally:
        userfault.fault_thread()


def _name(task: str) -> str:
    with open(f"/proc/self/task/{task}/comm") as file:
        return file.read().strip()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cpu": -1}, r"cpu=-1 is no CPU"),
        ({"cpu": 1 << 40}, rf"cpu={1 << 40}: this process may not use that CPU; it runs on \d"),
        ({"spin_us": -0.5}, r"spin_us=-0\.5 is not a time from 0 to 1000"),
        ({"spin_us": 1001}, r"spin_us=1001"),
        ({"spin_us": float("nan")}, r"spin_us=nan"),
    ],
)
def test_what_the_fault_thread_cannot_do_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(userfault.OptionError, match=match):
        userfault.fault_thread(**options)
    with pytest.raises(TypeError):
        userfault.fault_thread(cpu="0")  # type: ignore[arg-type]
