"""Memory, descriptors, threads and mappings that run out: a typed error, nothing half made, and arrays that go on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.soak import SOAK, rounds
from support.survival import WAYS, survive

# Each of them is somewhere else short of something; what the others do not show is shown in a soak.
FEW = WAYS if SOAK else ("raw", "source", "empty", "direct")

SHORT = """
import resource
from support.leaks import Holdings
from userfault import pager
from userfault.errors import UserfaultError

way = sys.argv[1]
# Whatever is imported at first use is imported now. Threads and workers are started afresh in each attempt.
del (first := [open_way(way, folder, block="16 KiB")])[:]
gc.collect()
assert userfault.shutdown()

def held():
    return Holdings.now()

def settled(start):
    # Idle threads and workers end by themselves; here at once.
    def look():
        gc.collect()
        userfault.shutdown()
        return not held().growth(start)
    wait_until(look, f"nothing is left: {held().growth(start)}")

def attempts(limits, limited):
    # Opens under each limit; returns how many of the attempts failed, and how.
    outcomes = []
    for limit in limits:
        start = held()
        array = None
        with limited(limit):
            try:
                array = open_way(way, folder, block="16 KiB")
                good = same(array, right)
            except (UserfaultError, MemoryError, OSError, RuntimeError) as error:
                # RuntimeError: Python cannot start a thread of its own.
                outcomes.append(error)
            else:
                outcomes.append(None)
                assert good
        del array
        for error in outcomes[-1:]:
            error is None or error.__traceback__ is None or error.with_traceback(None)
        settled(start)
    return outcomes
"""


@pytest.mark.parametrize("way", FEW)
def test_no_descriptor_is_left(way: str) -> None:
    done = survive(
        SHORT
        + """
from contextlib import contextmanager
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

@contextmanager
def limited(limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

# Descriptors of the engine are made above 16, and the listing of this process needs one, too.
highest = max(int(name) for name in os.listdir("/proc/self/fd"))
outcomes = attempts(range(highest + 1, highest + 30, int(sys.argv[2])), limited)
errors = [outcome for outcome in outcomes if outcome is not None]
assert errors, "it works with any number"
for error in errors:
    assert isinstance(error, OSError) or "Too many open files" in str(error), repr(error)
assert any(isinstance(error, UserfaultError) for error in errors), errors
assert same(array := open_way(way, folder, block="16 KiB"), right)
print("survived")
        """,
        way,
        str(rounds(2, 1) if way == "source" else 1),
    )
    assert done.check() == "survived\n"


@pytest.mark.parametrize("way", FEW)
def test_no_address_space_is_left(way: str) -> None:
    done = survive(
        SHORT
        + """
from contextlib import contextmanager
soft, hard = resource.getrlimit(resource.RLIMIT_AS)

@contextmanager
def limited(extra):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

outcomes = attempts([n << 20 for n in (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64, 128)], limited)
errors = [outcome for outcome in outcomes if outcome is not None]
assert errors, "it works with no address space"
assert any(isinstance(error, UserfaultError) for error in errors), errors
assert same(array := open_way(way, folder, block="16 KiB"), right)
print("survived")
        """,
        way,
    )
    assert done.check() == "survived\n"


@pytest.mark.needs_privilege("another user id, whose threads nobody else counts")
@pytest.mark.parametrize("way", FEW)
def test_no_thread_can_be_started(way: str) -> None:
    done = survive(
        SHORT
        + """
import support.leaks
from contextlib import contextmanager

class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

# RLIMIT_NPROC counts all threads of the real user id, here one that nothing else runs under, and binds whoever has
# neither CAP_SYS_ADMIN nor CAP_SYS_RESOURCE. Files stay open to the effective user id, root.
libc = ctypes.CDLL(None, use_errno=True)
header, sets = Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(ctypes.byref(header), sets) == 0
for number in range(3):
    sets[number] &= ~(1 << 21 | 1 << 24)
assert libc.capset(ctypes.byref(header), sets) == 0
os.setresuid(61_234, 0, 0)

@contextmanager
def limited(limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    mine = len(os.listdir("/proc/self/task"))
    resource.setrlimit(resource.RLIMIT_NPROC, (mine + limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))

outcomes = attempts(range(8), limited)
errors = [outcome for outcome in outcomes if outcome is not None]
assert errors, "it works without a thread"
for error in errors:
    assert "ulimit -u" in str(error) or "Resource temporarily unavailable" in str(error), repr(error)
assert outcomes[-1] is None, outcomes
assert same(array := open_way(way, folder, block="16 KiB"), right)
print("survived")
        """,
        way,
    )
    assert done.check() == "survived\n"


def test_no_mapping_is_left() -> None:
    """vm.max_map_count: new memories are refused, old ones are served, with small pages if need be."""
    done = survive(
        """
        import mmap
        from userfault.errors import KernelError
        libc = ctypes.CDLL(None, use_errno=True)
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        if most > 300_000:
            print("refused True True")  # too many to make; the kernel's default is 65,530
            sys.exit()
        nbytes = 8 << 20
        array = open_way("memory", folder, nbytes, memory="4 MiB", block="16 KiB")
        memory = userfault.memory_of(array)
        all_right = expected(nbytes)
        area = mmap.mmap(-1, 2 * most * 4096)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        page = 0

        def use_up():
            # What a thread that ends gives back, too.
            global page
            while libc.mprotect(ctypes.c_void_p(start + page * 4096), ctypes.c_size_t(4096), 0) == 0:
                page += 2
            assert ctypes.get_errno() == 12

        use_up()
        assert page > most // 2
        errors, opened = [], []
        for _ in range(10):
            use_up()
            try:
                opened.append(userfault.open(right.copy()))
            except (KernelError, MemoryError) as error:
                errors.append(type(error))
        del opened
        good = True
        for _ in range(3):
            good &= same(array, all_right)
            memory.evict()
            try:
                memory.prefetch((2 << 20, 4 << 20))
            except userfault.SourceError as error:
                assert error.errno == 12 and 0 <= error.offset < nbytes, error
            good &= same(array, all_right)
        # Room again.
        libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(2 * most * 4096), 3)
        print("refused" if errors else "not refused", good, same(userfault.open(right.copy()), right))
        """
    )
    assert done.check() == "refused True True\n"


def _memory_groups() -> list[tuple[Path, str]]:
    """Folders in which control groups with a limit of memory can be made, and the name of the limit's file."""
    found = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup2" and "memory" in Path(folder, "cgroup.subtree_control").read_text().split():
            found.append((Path(folder), "memory.max"))
        if kind == "cgroup" and "memory" in options.split(","):
            found.append((Path(folder), "memory.limit_in_bytes"))
    return found


@contextlib.contextmanager
def _limited_group(nbytes: int) -> Iterator[Path]:
    for root, name in _memory_groups():
        group = root / f"userfault-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(nbytes))
            yield group
        finally:
            group.rmdir()
        return
    pytest.skip("no control group with a memory limit can be made here")


@pytest.mark.needs_privilege("a control group with a limit of its own")
@pytest.mark.parametrize("way", FEW)
def test_a_control_group_with_little_memory(way: str) -> None:
    """The default budget heeds the group's limit: an array larger than the limit is read, and nothing is killed."""
    limit = (192 if way == "source" else 128) << 20  # workers are in it, too
    with _limited_group(limit) as group:
        join = (
            f"import os, sys; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        done = survive(
            """
            nbytes, budget = int(sys.argv[2]), int(sys.argv[3])
            assert userfault.limit() == budget, userfault.limit()
            # The expected bytes are made piece by piece: all of them would not fit, either.
            if sys.argv[1] == "memory":
                array = userfault.open(np.zeros(nbytes, np.uint8))  # zero pages that nobody wrote take no room
                want = lambda at, length: bytes(length)
            elif sys.argv[1] == "source":
                array = userfault.open(PatternSource(nbytes))
                want = pattern
            else:
                path = folder / "big.raw"
                with path.open("wb") as file:
                    for at in range(0, nbytes, 1 << 20):
                        file.write(pattern(at, 1 << 20))
                mode = {"raw": "r", "c": "c", "r+": "r+", "direct": "r+"}.get(sys.argv[1])
                if mode is None:
                    array = userfault.empty(nbytes, np.uint8)
                else:
                    how = "direct" if sys.argv[1] == "direct" else "thread"
                    array = userfault.open(path, dtype="u1", mode=mode, delivery=how)
                want = pattern
                if mode != "r":
                    for at in range(0, nbytes, 1 << 20):
                        array[at : at + (1 << 20)] = np.frombuffer(pattern(at, 1 << 20), np.uint8)
            for _ in range(2):
                for at in range(0, nbytes, 1 << 20):
                    assert array[at : at + (1 << 20)].tobytes() == want(at, 1 << 20), at
            print("survived")
            """,
            way,
            str(limit // 2 * 3),
            str(limit // 2),
            executable=[sys.executable, "-c", join],
        )
    assert done.check() == "survived\n"
