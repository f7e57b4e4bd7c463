"""NumPy's large arrays on pages of their own: told of from birth to death, and NumPy none the wiser."""

from __future__ import annotations

import textwrap

from support import run_python

# Each in a process of its own: arrays keep a handler for ever, and the handler is the process's.
_BEGIN = """
import gc, mmap, os, sys, threading
import numpy as np
from userfault import _allocations as allocations
from userfault._allocations import BORN, DIED

MIB = 1 << 20
allocations.start(MIB, allocations.PAGES_HUGE, 1 << 40)
assert allocations.install()

def address(array):
    return array.__array_interface__["data"][0]

def drain():
    return [event[:3] for event in allocations.drain(0)]

def born(array):
    assert drain() == [(BORN, address(array), array.nbytes)], (drain(), array.nbytes)
    assert address(array) % mmap.PAGESIZE == 0

def died(where, nbytes):
    assert drain() == [(DIED, where, nbytes)]
    assert allocations.release(where)
    assert not allocations.release(where)
"""


def run(code: str) -> str:
    return run_python(_BEGIN + textwrap.dedent(code)).check()


def test_large_arrays_are_told_of_and_small_ones_are_not() -> None:
    run(
        """
        small = np.ones(MIB - 1, np.uint8)
        assert drain() == []
        for make in (np.empty, np.zeros, np.ones):
            array = make((3, MIB // 4), np.float64)
            array[:] = 7
            born(array)
            assert address(array) % (2 * MIB if array.nbytes >= 4 * MIB else 1) == 0
            where, nbytes = address(array), array.nbytes
            view = array[1:, 5:].T
            del array
            assert drain() == []  # the view keeps it
            assert view[0, 0] == 7
            del view
            died(where, nbytes)
        assert allocations.stats()["live"] == allocations.stats()["dead"] == 0
        """
    )


def test_operations_give_the_same_results_as_without() -> None:
    run(
        """
        def results():
            a = np.arange(3 * MIB // 8, dtype=np.float64)
            yield a.sum()
            yield (np.sin(a) @ a, a[::-3].copy().sum(), np.sort(-a)[::1000].tobytes())
            yield np.resize(a, (7, len(a) // 2)).tobytes()
            b = a.copy()
            b.resize(2 * len(a), refcheck=False)  # grows in place of itself, with zeros
            yield b.tobytes()
            b.resize(len(a) + 5, refcheck=False)
            yield b.tobytes()
            b.resize(3, refcheck=False)  # no longer large
            yield b.tobytes()
            yield np.fromiter((x * x for x in range(700_000)), np.float64).tobytes()  # grows step by step
            yield np.fromstring(",".join(map(str, range(500_000))), sep=",").tobytes()
            yield np.concatenate([a, a]).astype(np.float32).tobytes()
            yield np.zeros(0).tobytes() + np.zeros((0, 5 * MIB)).tobytes()

        class Sub(np.ndarray):
            pass

        with_handler = list(results())
        sub = np.ones(2 * MIB, np.uint8).view(Sub)
        assert (sub + sub).sum() == 4 * MIB and type(sub + sub) is Sub
        assert len(drain()) == 1 and allocations.stats()["brief"] > 10 and allocations.stats()["live"] == 1
        allocations.uninstall()
        brief = allocations.stats()["brief"]
        assert list(results()) == with_handler
        assert allocations.stats()["brief"] == brief
        """
    )


def test_arrays_made_and_freed_in_other_threads() -> None:
    run(
        """
        made = []

        def work():
            made.append(np.ones(MIB))
        thread = threading.Thread(target=work)
        thread.start(); thread.join()
        assert drain() == []  # a thread begins with an empty context
        made.clear()

        def enter(*_):
            sys.setprofile(None)
            allocations.install()
        threading.setprofile(enter)
        thread = threading.Thread(target=work)
        thread.start(); thread.join()
        born(made[0])
        where = address(made[0])
        thread = threading.Thread(target=made.clear)
        thread.start(); thread.join()
        died(where, 8 * MIB)
        """
    )


def test_an_array_that_dies_young_is_only_counted() -> None:
    run(
        """
        for _ in range(1000):
            np.ones(MIB, np.uint8)
        assert allocations.drain(0) == []
        found = allocations.stats()
        assert (found["brief"], found["brief_bytes"], found["brief_most"]) == (1000, 1000 * MIB, MIB), found
        assert found["spare_bytes"] == MIB  # served again and again
        keep = np.ones(MIB, np.uint8)
        assert allocations.drain(3600 * 10**9) == []  # too young
        assert allocations.is_young(address(keep) + MIB - 1)
        born(keep)
        assert not allocations.is_young(address(keep))
        """
    )


def test_addresses_of_the_dead_are_not_used_again_before_they_are_released() -> None:
    run(
        """
        array = np.full(MIB, 3, np.uint8)
        born(array)
        where = address(array)
        del array
        others = [np.empty(MIB, np.uint8) for _ in range(100)]
        assert where not in map(address, others)
        import ctypes
        assert ctypes.string_at(where, MIB) == b"\\3" * MIB  # still there for who looks
        events = drain()
        assert events[:-1] == [(BORN, address(other), MIB) for other in others]
        assert events[-1] == (DIED, where, MIB) and allocations.release(where)
        """
    )


def test_a_handler_of_the_programs_own_stays() -> None:
    # The capsule is a copy of ours under another name: what a program's own handler looks like from outside.
    run(
        """
        import ctypes
        try:
            from numpy._core import _multiarray_umath as module
        except ImportError:
            from numpy.core import _multiarray_umath as module
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        table = ctypes.cast(get(module._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
        get_handler = ctypes.PYFUNCTYPE(ctypes.py_object)(table[305])
        set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])
        ours = get_handler()
        copy = ctypes.create_string_buffer(ctypes.string_at(get(ours, b"mem_handler"), 256))
        copy[0:4] = b"mine"
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        name = b"mem_handler"
        mine = new(ctypes.addressof(copy), name, None)
        assert set_handler(mine) is ours
        assert not allocations.install() and get_handler() is mine
        allocations.uninstall()
        assert get_handler() is mine
        set_handler(ours)
        assert allocations.install()
        """
    )


def test_what_outlives_the_end_works_on() -> None:
    run(
        """
        known, dead = np.ones(MIB), np.ones(MIB)
        assert len(drain()) == 2
        del dead
        young = np.ones(MIB)
        allocations.stop()
        assert allocations.stats()["dead"] == 0 and allocations.stats()["live"] == 2
        assert known.sum() + young.sum() == 2 * MIB
        known.resize(2 * MIB, refcheck=False)
        assert known.sum() == MIB
        del known, young
        assert allocations.stats()["live"] == 0
        allocations.start(MIB, allocations.PAGES_SMALL, 0)
        try:
            allocations.start(MIB, allocations.PAGES_SMALL, 0)
        except OSError as error:
            assert "already" in str(error)
        else:
            raise AssertionError
        again = np.ones(MIB)
        born(again)
        """
    )


def test_a_forked_child_goes_its_own_way() -> None:
    run(
        """
        array = np.ones(MIB)
        born(array)
        pid = os.fork()
        if pid == 0:
            try:
                more = np.ones(MIB) + array
                assert more.sum() == 2 * MIB and drain() == []
                del array, more
                assert allocations.stats()["live"] == 0
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert array.sum() == MIB and drain() == []
        """
    )


def test_looking_at_a_functions_variables_leaves_nothing_behind() -> None:
    run(
        """
        import weakref

        class Thing:
            pass

        def look(frame):
            found = allocations.frame_locals(frame)
            assert found["big"] is not None and allocations.frame_locals(frame) == found
            return set(found)

        def function():
            big = Thing()
            gone = weakref.ref(big)
            cell = 5
            assert look(sys._getframe()) == {"big", "gone", "cell"}, (lambda: cell)()
            del big
            assert gone() is None

        def with_the_dict():
            big = Thing()
            mine = sys._getframe().f_locals
            look(sys._getframe())
            assert mine["big"] is big  # the program has it too

        def with_locals():
            big = Thing()
            for name in locals():  # a look must not change its size
                found = allocations.frame_locals(sys._getframe())
                assert found == {} or sys.version_info >= (3, 13)

        function(), with_the_dict(), with_locals()
        assert allocations.frame_locals(sys._getframe()).keys() == globals().keys()
        """
    )


def test_looking_at_functions_of_running_threads() -> None:
    run(
        """
        stop = threading.Event()
        failures = []

        def work():
            try:
                while not stop.is_set():
                    big = [0]
                    other = [big]
                    for number in range(50):
                        big[0] += number
                    assert other[0] is big and big == [1225]
                    del big
            except BaseException as error:
                failures.append(error)

        crowd = [threading.Thread(target=work) for _ in range(4)]
        sys.setswitchinterval(1e-5)
        for thread in crowd:
            thread.start()
        seen = set()
        for _ in range(2000):
            for frame in sys._current_frames().values():
                if frame.f_code is work.__code__:
                    seen |= set(allocations.frame_locals(frame))
        stop.set()
        for thread in crowd:
            thread.join()
        assert not failures, failures
        assert "other" in seen or not getattr(sys, "_is_gil_enabled", lambda: True)(), seen
        """
    )
