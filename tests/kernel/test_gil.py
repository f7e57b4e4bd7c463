"""The GIL trap, and the three arrangements that work (top of `userfault.kernel.userfaultfd`)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.processes import run_python

TRAP = """
import mmap, sys, threading
from userfault.kernel import Mapping, Userfaultfd

memory = Mapping.anonymous(mmap.PAGESIZE)
uffd = Userfaultfd()
uffd.register(memory)
served = threading.Event()

def serve():
    for fault in uffd.read_events(timeout_s=None):
        uffd.copy(fault.address, b"x" * mmap.PAGESIZE)
        served.set()

threading.Thread(target=serve, daemon=True).start()
view = memory.view()
print("about to touch", flush=True)
first = view[0]  # waits in the kernel with the GIL held
print("served", first, flush=True)
"""


def test_the_trap() -> None:
    """Touched by Python itself, with the handler in a thread: a hang that only SIGKILL ends."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("there is no GIL")
    with subprocess.Popen([sys.executable, "-c", TRAP], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "about to touch\n"
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
            process.terminate()  # Python's handlers would need the GIL too; the default action needs none
        finally:
            process.kill()
        assert process.stdout.read() == ""


def test_first_arrangement_the_touch_releases_the_gil() -> None:
    """`Mapping.read`, `os.readv` and ctypes functions let a handler thread run."""
    run_python(
        """
        import ctypes, mmap, os, threading
        from userfault.kernel import Mapping, Userfaultfd

        PAGE = mmap.PAGESIZE
        with Mapping.anonymous(4 * PAGE) as memory, Userfaultfd() as uffd:
            uffd.register(memory)

            def serve():
                for _ in range(3):
                    for fault in uffd.read_events(timeout_s=30):
                        index = (fault.address - memory.address) // PAGE
                        uffd.copy(fault.address, bytes([65 + index]) * PAGE)

            handler = threading.Thread(target=serve)
            handler.start()
            assert memory.read(0, 3) == b"AAA"
            memory.write(PAGE, b"b")
            target = ctypes.create_string_buffer(2)
            ctypes.CDLL(None).memcpy(target, ctypes.c_void_p(memory.address + 2 * PAGE), ctypes.c_size_t(2))
            assert target.raw == b"CC"
            handler.join()
            assert memory.read(PAGE, 2) == b"bB"
        """
    ).check()


@pytest.mark.needs_kernel_faults
def test_first_arrangement_by_system_calls() -> None:
    """System calls release the GIL too, where kernel-mode faults may be trapped."""
    run_python(
        """
        import mmap, os, threading
        from userfault.kernel import Mapping, Userfaultfd

        PAGE = mmap.PAGESIZE
        receiver, sender = os.pipe()
        with Mapping.anonymous(PAGE) as memory, Userfaultfd() as uffd:
            uffd.register(memory)

            def serve():
                for fault in uffd.read_events(timeout_s=30):
                    uffd.copy(fault.address, b"s" * PAGE)

            handler = threading.Thread(target=serve)
            handler.start()
            with memory.view() as view:
                os.writev(sender, [view[:5]])
            assert os.read(receiver, 5) == b"sssss"
            handler.join()
        """
    ).check()


def test_second_arrangement_the_handler_is_another_process() -> None:
    """A forked child serves its parent by the inherited descriptor: Python may touch the memory as it likes."""
    run_python(
        """
        import mmap, os, signal
        from userfault.kernel import Mapping, Userfaultfd

        PAGE = mmap.PAGESIZE
        memory = Mapping.anonymous(8 * PAGE)
        uffd = Userfaultfd()
        uffd.register(memory)
        handler = os.fork()
        if handler == 0:
            while True:
                for fault in uffd.read_events(timeout_s=None):
                    uffd.copy(fault.address, bytes([(fault.address - memory.address) // PAGE]) * PAGE)
        with memory.view() as view:
            assert [view[index * PAGE] for index in range(8)] == list(range(8))
            import numpy
            assert int(numpy.frombuffer(view, numpy.uint8).sum()) == sum(range(8)) * PAGE
        os.kill(handler, signal.SIGKILL)
        os.waitpid(handler, 0)
        """
    ).check()


@pytest.mark.needs_feature("WP_ASYNC")
@pytest.mark.needs_linux("PAGEMAP_SCAN")
def test_third_arrangement_no_handler_is_needed() -> None:
    """Write tracking without messages: plain Python writes, and the scan tells where."""
    run_python(
        """
        import mmap
        from userfault.kernel import Feature, Mapping, RegisterMode, Userfaultfd, pagemap
        from userfault.kernel.abi import PageCategory

        PAGE = mmap.PAGESIZE
        with Mapping.anonymous(8 * PAGE) as memory, Userfaultfd(Feature.WP_ASYNC) as uffd:
            uffd.register(memory, mode=RegisterMode.WP)
            uffd.writeprotect(memory)
            with memory.view() as view:
                view[3 * PAGE] = 1
                view[5 * PAGE + 7] = 1
            scan = pagemap.scan(memory, mask=PageCategory.WRITTEN, returns=PageCategory.WRITTEN)
            dirty = [(int(r["start"]) - memory.address) // PAGE for r in scan.regions]
            assert dirty == [3, 5], dirty
        """
    ).check()


def test_or_everything_is_filled_before_it_is_touched() -> None:
    """Nobody waits where nothing is missing."""
    run_python(
        """
        import mmap
        from userfault.kernel import Mapping, Userfaultfd, serving

        with Mapping.anonymous(4 * mmap.PAGESIZE) as memory, Userfaultfd() as uffd:
            uffd.register(memory)
            serving.copy_all(uffd, memory, b"f" * memory.length)
            with memory.view() as view:
                assert bytes(view) == b"f" * memory.length
        """
    ).check()
