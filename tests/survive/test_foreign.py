"""What other code in the process does to an array's addresses: harmless, or loud. `docs/memory.md` says which."""

from __future__ import annotations

import signal

import pytest

from support.survival import WAYS, WRITABLE, survive

FOREIGN = """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
MAP_FAILED = ctypes.c_void_p(-1).value
NONE, READ, WRITE = 0, 1, 2
PRIVATE_ANONYMOUS, FIXED = 0x22, 0x10
MAYMOVE, MREMAP_FIXED, DONTUNMAP = 1, 2, 4
DONTNEED, FREE, DONTFORK, MERGEABLE, NOHUGEPAGE, WIPEONFORK, COLD, PAGEOUT, LOCKED = 4, 8, 10, 12, 15, 18, 20, 21, 24
KIB = 1 << 10

def call(name, *arguments):
    # The result, or the errno of a call that failed.
    result = getattr(libc, name)(*[ctypes.c_void_p(argument) for argument in arguments])
    return OSError(ctypes.get_errno(), name) if result in (-1, MAP_FAILED) else result

def done(name, *arguments):
    result = call(name, *arguments)
    if isinstance(result, OSError):
        raise result
    return result

def rest(start, stop):
    # Everything outside of these bytes is as it was, now and after it came anew.
    for _ in range(2):
        assert same(array[:start], right[:start]) and same(array[stop:], right[stop:])
        memory.evict((0, start))
        memory.evict((stop, len(array)))
    assert memory.stats().error_count == 0

def last(text):
    print(text, flush=True)

def anew():
    global array, memory, address, length
    array = open_way(sys.argv[1], folder, block="16 KiB", readahead=False)
    memory = userfault.memory_of(array)
    address, length = memory.address, (memory.nbytes + 4095) // 4096 * 4096

anew()
"""


@pytest.mark.parametrize("way", WAYS)
def test_dropped_pages_come_back_once(way: str) -> None:
    done = survive(
        FOREIGN
        + """
if array.flags.writeable:
    memory.flush() if sys.argv[1] in WRITTEN_BACK else memory.evict()  # what is not written back is lost with the pages
assert same(array, right)
before, reads = memory.stats(), memory.stats().bytes_read
done("madvise", address, 128 * KIB, DONTNEED)
assert same(array, right)
after = memory.stats()
# Eight blocks, each read again once; a fault or two more where a page was touched before its block was whole.
assert 128 * KIB <= after.bytes_read - reads <= 2 * 128 * KIB, after.bytes_read - reads
assert 8 <= after.faults - before.faults <= 64, after.faults - before.faults
assert after.resident_bytes == before.resident_bytes, (before.resident_bytes, after.resident_bytes)
# And that is all: no thread goes on refilling.
began = time.process_time()
threading.Event().wait(0.5)
assert memory.stats().faults == after.faults and time.process_time() - began < 0.4
last("came back")
        """,
        way,
    )
    assert done.check() == "came back\n"
    assert done.stderr.count("other code dropped pages of block 0 (madvise or the like)") == 1


@pytest.mark.parametrize("way", WRITABLE)
def test_dropped_pages_that_were_dirty_come_back_as_last_written_back(way: str) -> None:
    """What was written since is lost with the pages, as in any memory: of whole pages, and of no others."""
    done = survive(
        FOREIGN
        + """
def back(fill):
    array[: 256 * KIB] = fill
    memory.flush() if sys.argv[1] in WRITTEN_BACK else memory.evict()
    assert (array[: 256 * KIB] == fill).all()

for turn in range(1, 20):
    back(turn)
    # The second half of the blocks is dirty; pages from the middle of a clean block to that of a dirty one go.
    array[128 * KIB : 256 * KIB] = 100 + turn
    before = memory.stats()
    done("madvise", address + 40 * KIB, 160 * KIB, DONTNEED)
    after = array[: 256 * KIB].copy()
    assert (after[: 128 * KIB] == turn).all()
    assert (after[128 * KIB : 200 * KIB] == turn).all(), set(after[128 * KIB : 200 * KIB].tolist())
    assert (after[200 * KIB :] == 100 + turn).all(), set(after[200 * KIB :].tolist())
    assert memory.stats().faults - before.faults <= 160 // 4 + 8
    # It can be written, and is written back, as before.
    array[120 * KIB : 220 * KIB] = 200
    want = array.copy()
    memory.evict()
    assert same(array, want), turn
    if sys.argv[1] in WRITTEN_BACK:
        memory.flush()
        assert stored(folder) == want.tobytes()
    assert memory.stats().error_count == 0
began, faults = time.process_time(), memory.stats().faults
threading.Event().wait(0.3)
assert memory.stats().faults == faults and time.process_time() - began < 0.2
last("came back")
        """,
        way,
    )
    assert done.check() == "came back\n"


# What the kernel may be told of our pages without harm, or refuses by itself.
HARMLESS = """
# It makes pages present, from the kernel's side: in vain where the thread itself would have to do that, or where
# this user may not serve the kernel's faults.
mlock = partial(call if sys.argv[1] == "direct" or os.geteuid() else done, "mlock")

def mlock_and_drop():
    mlock(address, 64 * KIB)
    call("madvise", address, 64 * KIB, LOCKED)

def mlock_of_missing_pages():
    memory.evict()
    mlock(address, length)

def mlockall():
    call("mlockall", 7)
    call("munlockall")

def no_access_for_a_while():
    done("mprotect", address, 64 * KIB, NONE)
    memory.evict((0, 128 * KIB))
    memory.prefetch((64 * KIB, 128 * KIB))
    done("mprotect", address, 64 * KIB, READ | WRITE if array.flags.writeable else READ)

def to_more():
    assert call("mremap", address, length, length + 64 * KIB, 0).errno == 12

def moved_but_for_the_mapping():
    moved = done("mremap", address, length, length, MAYMOVE | DONTUNMAP, 0)
    done("munmap", moved, length)

calls = [
    lambda: done("madvise", address, length, FREE),
    lambda: done("madvise", address, length, PAGEOUT),
    lambda: done("madvise", address, length, COLD),
    lambda: call("madvise", address, length, MERGEABLE),
    lambda: call("madvise", address, length, NOHUGEPAGE),
    lambda: mlock(address, length),
    mlock_of_missing_pages,
    mlockall,
    no_access_for_a_while,
    lambda: done("mremap", address, length, length, 0) == address,
    to_more,
]
if not array.flags.writeable:
    # These take pages away, dirty ones too: no different from overwriting them.
    calls += [mlock_and_drop, moved_but_for_the_mapping]
"""


@pytest.mark.parametrize("way", WAYS)
def test_calls_that_are_harmless(way: str) -> None:
    done = survive(
        FOREIGN
        + HARMLESS
        + """
for number, make in enumerate(calls):
    assert same(array, right), number
    make()
    assert same(array, right), number
    memory.evict()
    assert same(array, right) and memory.stats().error_count == 0, number
    del memory, array
    anew()
del memory, array, calls
gc.collect()
last(userfault.shutdown())
        """,
        way,
    )
    assert done.check() == "True\n"


# Afterwards these addresses are not ours: the rest is right, and there it is SIGSEGV, never zeros that pass for data.
LOUD = """
def of_missing_pages():
    memory.evict()
    done("munmap", *hole)

def of_parts_of_blocks():
    done("munmap", hole[0] - 4096, hole[1] + 8192)

def mremap_away():
    place = done("mmap", 0, 32 * KIB, NONE, PRIVATE_ANONYMOUS, -1, 0)
    done("mremap", hole[0], 32 * KIB, 32 * KIB, MAYMOVE | MREMAP_FIXED, place)
    # What was present went along, and is the other code's now: eviction does not reach it.
    memory.evict()
    assert ctypes.string_at(place, 32 * KIB) == pattern(64 * KIB, 32 * KIB)
    done("munmap", place, 32 * KIB)

calls = {
    "munmap of present pages": lambda: done("munmap", *hole),
    "munmap of missing pages": of_missing_pages,
    "munmap of parts of blocks": of_parts_of_blocks,
    "mremap away": mremap_away,
    "mprotect": lambda: done("mprotect", *hole, NONE),
    "mmap over it": lambda: done("mmap", *hole, NONE, PRIVATE_ANONYMOUS | FIXED, -1, 0),
}

class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

def readable(at):
    # As the access itself would find it, without the signal.
    copy = ctypes.create_string_buffer(1)
    to, of = Vector(ctypes.addressof(copy), 1), Vector(at, 1)
    n = libc.process_vm_readv(os.getpid(), ctypes.byref(to), 1, ctypes.byref(of), 1, 0)
    return n == 1 or ctypes.get_errno() != 14
"""


# Looked at from the kernel's side, which needs a thread of the engine.
@pytest.mark.needs_kernel_faults
@pytest.mark.parametrize("way", [way for way in WAYS if way != "direct"])
def test_calls_that_take_a_part_away(way: str) -> None:
    done = survive(
        FOREIGN
        + LOUD
        + """
for name, make in calls.items():
    hole = (address + 64 * KIB, 32 * KIB)
    assert same(array, right)
    assert readable(hole[0])
    make()
    rest(60 * KIB, 100 * KIB)
    assert not readable(hole[0]) and not readable(hole[0] + 32 * KIB - 1), name
    assert readable(address) and readable(address + 100 * KIB)
    memory.close(force=True)
    anew()
last("all")
        """,
        way,
    )
    assert done.check() == "all\n"


def test_a_part_that_was_taken_away_raises_the_signal() -> None:
    done = survive(
        FOREIGN
        + """
done("munmap", address + 64 * KIB, 32 * KIB)
last(same(array[: 64 * KIB], right[: 64 * KIB]))
array[64 * KIB + 4096]
last("not a signal")
        """,
        "source",
    )
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "True\n"), done.stderr


@pytest.mark.parametrize("way", ["memory", "source"])
def test_a_write_after_mprotect_is_refused_and_said(way: str) -> None:
    done = survive(
        FOREIGN
        + """
assert same(array, right)
done("mprotect", address, length, READ | WRITE)
last("writing")
ctypes.memset(address + 5, 0, 1)
last("written")
        """,
        way,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "writing\n")
    # Where pages are installed unprotected, in read-only mappings, nobody can tell this from what mprotect is for.
    assert "a write to this read-only memory" in done.stderr


@pytest.mark.parametrize("advice", ["DONTFORK", "WIPEONFORK"])
@pytest.mark.parametrize("way", ["memory", "source"])
def test_advice_about_forks(advice: str, way: str) -> None:
    done = survive(
        FOREIGN
        + f"""
assert same(array, right)
done("madvise", address, length, {advice})
pid = os.fork()
if pid == 0:
    os._exit(0 if same(array, right) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), same(array, right))
        """,
        way,
    )
    if advice == "WIPEONFORK":
        assert done.check() == "0 True\n"
    else:
        assert done.check() == f"{-signal.SIGSEGV} True\n"
        assert "this forked process cannot serve it" in done.stderr
