"""Signals of all sorts while threads wait in faults: right bytes, and every handler runs."""

from __future__ import annotations

import signal

import pytest

from support.soak import rounds
from support.survival import WAYS, WRITABLE, survive


@pytest.mark.parametrize("way", WAYS)
def test_a_storm_of_signals(way: str) -> None:
    """Timers of all three kinds, and signals to threads that wait in a fault without the GIL."""
    done = survive(
        """
        heard = dict.fromkeys((signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGUSR1), 0)
        array = open_way(sys.argv[1], folder, memory="256 KiB", block="16 KiB")
        memory = userfault.memory_of(array)

        def hear(number, frame):
            # Reads, too: a fault in a handler, perhaps in the middle of another one's.
            heard[number] += 1
            at = heard[number] * 40_961 % NBYTES
            assert array[at] == right[at]

        for number in heard:
            signal.signal(number, hear)
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
        with readers([array], [right]) as some:
            rounds = 0
            while rounds < int(sys.argv[2]) or min(heard.values()) < 5:
                for thread in threading.enumerate():
                    signal.pthread_kill(thread.ident, signal.SIGUSR1)
                assert np.array_equal(array, right) and same(array, right)
                rounds += 1
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        assert same(array, right) and memory.stats().error_count == 0
        print("all heard")
        """,
        way,
        str(rounds(40, 4000)),
    )
    assert done.check() == "all heard\n"


@pytest.mark.parametrize("way", WRITABLE)
def test_a_storm_of_signals_while_threads_write(way: str) -> None:
    done = survive(
        """
        array = open_way(sys.argv[1], folder, memory="256 KiB", block="16 KiB")
        memory = userfault.memory_of(array)
        heard = 0
        with writers(array) as some:
            mine = some.want.nbytes // 4096 * 4096  # the last page, which none of them writes

            def hear(number, frame):
                global heard
                heard += 1
                array[mine:] = some.want[mine:] = heard % 251
                assert (array[mine:] == heard % 251).all()

            for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGUSR1):
                signal.signal(number, hear)
            signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
            signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
            done = 0
            while done < int(sys.argv[2]) or heard < 50:
                for thread in threading.enumerate():
                    signal.pthread_kill(thread.ident, signal.SIGUSR1)
                memory.flush()
                memory.evict((0, mine // 2))
                done += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        assert memory.stats().error_count == 0
        if sys.argv[1] in WRITTEN_BACK:
            memory.flush()
            assert stored(folder) == some.want.tobytes()
        print("all heard")
        """,
        way,
        str(rounds(40, 4000)),
    )
    assert done.check() == "all heard\n"


@pytest.mark.parametrize("way", WAYS[2:])
def test_a_storm_of_interrupts(way: str) -> None:
    """KeyboardInterrupt out of everything that waits; what it interrupted can be done again."""
    done = survive(
        """
        import subprocess
        array = open_way(sys.argv[1], folder, memory="512 KiB", block="16 KiB")
        memory = userfault.memory_of(array)
        interrupted, passes, wanted = 0, 0, int(sys.argv[2])

        def interrupt(number, frame):
            # Once for each time that it is caught.
            global armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        armed = False
        signal.signal(signal.SIGINT, interrupt)
        sender = subprocess.Popen(["sh", "-c", f"while kill -INT {os.getpid()}; do sleep 0.004; done 2>/dev/null"])
        while interrupted < wanted or passes < wanted:
            try:
                armed = True
                while interrupted < wanted or passes < wanted:
                    memory.evict()
                    memory.prefetch((0, 256 << 10))
                    assert np.array_equal(array, right)
                    passes += 1
                armed = False
            except KeyboardInterrupt:
                interrupted += 1
        sender.kill()
        sender.wait()
        assert np.array_equal(array, right)
        stats = memory.stats()
        print("again", stats.error_count, userfault.pager_stats().workers_lost)
        """,
        way,
        str(rounds(15, 1500)),
    )
    assert done.check() == "again 0 0\n"


def test_a_prefetch_that_waits_for_a_hanging_source_ends_with_its_deadline_and_then_interrupts() -> None:
    """The wait is native, and holds no GIL: other threads run, and the interrupt comes when the wait is over."""
    done = survive(
        """
        source = TroubleSource(1 << 16, folder)
        source.trouble(Trouble("hangs"))
        with own_pager(deadline_ns=SECOND // 2, attempts=2, workers=1):
            array = userfault.open(source)
            memory = userfault.memory_of(array)

            def interrupt():
                wait_until(source.failures, "a read hangs")
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                memory.prefetch((0, 4096))
            except KeyboardInterrupt:
                print("interrupted")
            except userfault.SourceError as error:
                print(error.detail)
            thread.join()
            source.trouble(None)
            assert same(array, expected(1 << 16))
            del array, memory
        """
    )
    assert done.check() in ("interrupted\n", "the source did not answer before the deadline\n")


@pytest.mark.parametrize("way", WAYS[2:])
def test_faulthandler_and_profilers_during_faults(way: str) -> None:
    done = survive(
        """
        import cProfile, faulthandler, tracemalloc
        array = open_way(sys.argv[1], folder, memory="256 KiB", block="16 KiB")
        log = open(folder / "stacks", "w")
        # From a native thread, from a signal handler, and with the interpreter's own hooks in place. The native thread
        # looks once only: it reads the frames of threads that run meanwhile, and CPython crashes in that now and then.
        faulthandler.register(signal.SIGUSR1, file=log, all_threads=False)
        tracemalloc.start()
        profile = cProfile.Profile()
        with readers([array], [right]):
            faulthandler.dump_traceback_later(0.05, file=log)
            profile.enable()
            n = 0
            while n < int(sys.argv[2]) or "Timeout" not in Path(log.name).read_text():
                n += 1
                for thread in threading.enumerate():
                    signal.pthread_kill(thread.ident, signal.SIGUSR1)
                assert np.array_equal(array, right) and same(array, right)
            profile.disable()
        log.close()
        text = Path(log.name).read_text()
        assert "Timeout" in text and "in _run" in text, text[-2000:]
        print("looked", len(profile.getstats()) > 0)
        """,
        way,
        str(rounds(20, 2000)),
    )
    assert done.check() == "looked True\n"


@pytest.mark.parametrize("way", ["memory", "source"])
def test_faulthandler_tells_where_a_poisoned_block_was_read(way: str) -> None:
    """The engine says which block and why, faulthandler says who."""
    done = survive(
        """
        if sys.argv[1] == "source":
            source = TroubleSource(1 << 16, folder)
            source.trouble(Trouble("OSError"))
            array = userfault.open(source, name="an array")
            array[0]
        else:
            array = open_way("memory", folder, name="an array")
            userfault.memory_of(array).close(force=True)
            array[0]
        """,
        way,
    )
    signals = {"source": (signal.SIGBUS, "Bus error"), "memory": (signal.SIGSEGV, "Segmentation fault")}
    number, text = signals[way]
    assert done.returncode == -number
    assert f"Fatal Python error: {text}" in done.stderr
    assert 'File "<string>"' in done.stderr
    assert ("userfault: an array: block 0" in done.stderr) == (way == "source")
