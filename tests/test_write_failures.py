"""What becomes of changes that cannot be stored, or not at once."""

from __future__ import annotations

import errno
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest

from support import run_python
from support.page_sources import PatternSource
from support.pagers import own_pager
from support.written import (
    BLOCK,
    BLOCKS,
    CONTENT,
    DIRTY,
    NBYTES,
    changed,
    invert,
    mapped,
    matrix,
    new_file,
    new_store,
    of_file,
)
from userfault.errors import (
    ClosedError,
    FlushError,
    ModeError,
    SourceError,
    SourceNotFoundError,
    WriteFailure,
)
from userfault.memory import PagedMemory
from userfault.sources._native import FileData, MemoryData, ZeroData
from userfault.sources._own import SourceRecipe
from userfault.sources._worker_data import WorkerData

# What the engine says where a failure is of no block.
NO_BLOCK = (1 << 64) - 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return new_file(tmp_path)


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        ("raises", "OSError: [Errno 28] No space left on device"),
        ("short", f"OSError: write_from returned {BLOCK // 2}, but was to store {BLOCK} bytes"),
        ("spoils", "TypeError: cannot modify read-only memory"),
    ],
)
def test_what_cannot_be_written_stays_and_is_written_later(kind: str, detail: str, tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with own_pager(attempts=2), mapped(store) as memory:
        invert(memory, 3, 4, 9, 20)
        store.trouble(kind, 4 * BLOCK, 10 * BLOCK)
        for _ in range(2):
            with pytest.raises(FlushError, match="could not be written back") as caught:
                memory.flush()
            error = caught.value
            assert isinstance(error, SourceError)
            assert [(f.offset, f.length) for f in error.failures] == [(4 * BLOCK, BLOCK), (9 * BLOCK, BLOCK)]
            assert all(isinstance(f, WriteFailure) and f.detail == detail for f in error.failures)
            assert (error.source_name, error.offset, error.length) == ("store", 4 * BLOCK, BLOCK)
            assert error.detail == detail
            assert memory.residency()[[4, 9]].tolist() == [DIRTY, DIRTY]
        assert memory.stats().write_errors >= 2
        assert any(error.write and not error.poisoned for error in memory.stats().errors)
        # It can be read, written and evicted as before; nothing is given up.
        assert memory.evict((4 * BLOCK, 5 * BLOCK)) == 0
        invert(memory, 9)
        invert(memory, 10)
        with memoryview(memory) as view:
            assert view == changed(3, 4, 10, 20)
        store.trouble(None)
        memory.flush()
        assert store.content() == changed(3, 4, 10, 20)


def test_neighbours_that_fail_are_one_range(tmp_path: Path) -> None:
    content = CONTENT[: -BLOCK // 2]
    store = new_store(tmp_path, content)
    with own_pager(attempts=1), mapped(store) as memory:
        view = np.frombuffer(memory, np.uint8)
        view[:] ^= 0xFF
        store.trouble("raises", (BLOCKS - 4) * BLOCK)
        with pytest.raises(FlushError) as caught:
            memory.flush()
        (failure,) = caught.value.failures
        assert (failure.offset, failure.offset + failure.length) == ((BLOCKS - 4) * BLOCK, len(content))
        store.trouble(None)
        memory.flush()
        assert store.content() == changed(*range(BLOCKS))[: len(content)]
        del view


@pytest.mark.parametrize("transactional", [False, True])
def test_a_commit_that_fails_is_tried_again(transactional: bool, tmp_path: Path) -> None:
    store = new_store(tmp_path, transactional=transactional)
    with own_pager(attempts=1), mapped(store) as memory:
        invert(memory, 3)
        store.trouble("commit")
        with pytest.raises(
            FlushError, match=r"store could not be made durable: .*somebody else committed"
        ) as caught:
            memory.flush()
        assert caught.value.failures == ()
        store.trouble(None)
        memory.flush()
        assert store.content() == changed(3)
        assert store.log()[-1] == ("flush", 0, 0)


@pytest.mark.parametrize("detail", ["fdatasync: Input/output error", ""])
def test_a_sync_that_fails_is_said_of_no_range(
    detail: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file here fails to sync: what the engine says then is put in its mouth."""
    with of_file(file) as memory:
        invert(memory, 3)
        for failed in (
            [(NO_BLOCK, errno.EIO, detail)],
            [(3, errno.ENOSPC, ""), (NO_BLOCK, errno.EIO, detail)],
        ):
            with monkeypatch.context() as patch:
                patch.setattr(memory, "_flush", lambda first, count, failed=failed: failed)
                with pytest.raises(FlushError) as caught:
                    memory.flush()
            error = caught.value
            if len(failed) == 1:
                assert str(error).startswith(
                    f"file could not be made durable: {detail or 'Input/output error'}"
                )
                assert (error.failures, error.errno) == ((), errno.EIO)
            else:
                assert [(f.offset, f.length, f.errno) for f in error.failures] == [
                    (3 * BLOCK, BLOCK, errno.ENOSPC)
                ]
    assert file.read_bytes() == b"head" + changed(3) + b"tail"


def test_a_file_that_may_not_grow_is_written_once_it_may(tmp_path: Path) -> None:
    code = """
        import resource, signal, sys
        import userfault
        from pathlib import Path

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path(sys.argv[1], "big.raw")
        a = userfault.open(path, "w+", dtype="u1", shape=(1 << 20,), block="64 KiB", memory="512 KiB")
        memory = userfault.memory_of(a)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, unlimited[1]))
        a[:] = 5                        # twice its budget
        try:
            memory.flush()
        except userfault.FlushError as error:
            print([(f.offset, f.length, f.detail) for f in error.failures])
        print(memory.stats().dirty_bytes, int(a.sum()), path.read_bytes().count(5))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        memory.flush()
        print(memory.stats().dirty_bytes, path.read_bytes() == b"\5" * (1 << 20))
        a[:] = 6
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, unlimited[1]))
    """
    done = run_python(textwrap.dedent(code), arguments=[str(tmp_path)], timeout_s=60)
    assert done.check().splitlines() == [
        f"[({256 << 10}, {768 << 10}, 'File too large')]",
        f"{768 << 10} {5 << 20} {256 << 10}",
        "0 True",
    ]
    # And at the end of the program it is said once.
    assert done.stderr.count("big.raw: changes of bytes [262144, 1048576) are lost: File too large") == 1


def test_changes_that_scratch_has_no_room_for_stay_in_memory() -> None:
    code = """
        import resource, signal
        import numpy as np, userfault

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
        right = np.random.default_rng(1).integers(0, 256, 2 << 20).astype("u1")
        a = userfault.zeros(len(right), "u1", memory="512 KiB")
        memory = userfault.memory_of(a)
        a[:] = right
        stats = memory.stats()
        print(np.array_equal(a, right), stats.dirty_bytes == len(right), stats.write_errors > 0, stats.scratch_bytes)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        print(memory.evict() == len(right), memory.stats().resident_bytes, memory.stats().scratch_bytes >= len(right))
        print(np.array_equal(a, right), memory.stats().resident_bytes <= 512 << 10)
    """
    done = run_python(textwrap.dedent(code), timeout_s=60)
    assert done.check().splitlines() == ["True True True 0", "True 0 True", "True True"]
    assert "cannot be written to scratch: File too large" in done.stderr
    assert "stays in memory, beyond the budget if need be" in done.stderr


@pytest.mark.parametrize("transactional", [False, True])
def test_a_worker_that_dies_in_a_write_costs_nothing(transactional: bool, tmp_path: Path) -> None:
    store = new_store(tmp_path, transactional=transactional)
    with own_pager(), mapped(store) as memory:
        invert(memory, 3, 4, 5)
        store.trouble("killed", 4 * BLOCK, 5 * BLOCK, times=1)
        memory.flush()
        assert store.content() == changed(3, 4, 5)


def test_a_failed_close_leaves_the_memory_open(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with own_pager(attempts=1):
        memory = mapped(store)
        invert(memory, 3, 8)
        store.trouble("raises", 8 * BLOCK)
        with pytest.raises(FlushError):
            memory.close()
        assert not memory.closed
        assert matrix(memory).tobytes() == changed(3, 8)
        with pytest.warns(
            RuntimeWarning, match=rf"bytes \[{8 * BLOCK}, {9 * BLOCK}\) are lost.*No space left"
        ):
            memory.close(force=True)
        assert memory.closed
        assert store.content()[: 8 * BLOCK] == changed(3)[: 8 * BLOCK]
        with pytest.raises(ClosedError):
            memory.flush()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for source in (
        MemoryData(CONTENT, 0, NBYTES),
        ZeroData(NBYTES),
        WorkerData(SourceRecipe(PatternSource(NBYTES))),
        WorkerData(SourceRecipe(new_store(tmp_path, writable=False))),
    ):
        with pytest.raises(ModeError, match=r"mode 'r\+': it cannot be written.*Mode 'c'"):
            PagedMemory(source, name="it", mode="r+")
    with pytest.raises(ModeError, match="mode 'x' is not known"):
        PagedMemory(ZeroData(NBYTES), name="it", mode="x")  # type: ignore[arg-type]
    with pytest.raises(ModeError, match="delivery='post' is not known"):
        PagedMemory(ZeroData(NBYTES), name="it", delivery="post")  # type: ignore[arg-type]
    with pytest.raises(SourceNotFoundError):
        PagedMemory(FileData(str(tmp_path / "gone"), 0, 10), name="gone", mode="r+")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_refused(file: Path) -> None:
    file.chmod(0o400)
    with pytest.raises(ModeError, match=r"Permission denied.*mode 'c'"):
        of_file(file)
    with of_file(file, "c") as memory:
        invert(memory, 3)
        memory.evict()
        with memoryview(memory) as view:
            assert view == changed(3)
    file.chmod(0o000)
    with pytest.raises(SourceError, match="Permission denied"):
        of_file(file)
