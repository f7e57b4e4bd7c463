"""Arrays as other libraries and the kernel see them: ordinary memory."""

from __future__ import annotations

import ctypes
import hashlib
import io
import mmap
import os
import pickle
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from support.page_sources import pattern
from support.zoo import KINDS, NBYTES, expected, open_kind

BLOCK = 16 << 10

Opener = Callable[[], np.ndarray[Any, np.dtype[np.uint8]]]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def opener(kind: str, tmp_path: Path) -> Opener:
    """Return what opens an array whose budget holds a quarter of it.

    Not the array: pytest would keep that beyond the end of the test.
    """
    return lambda: open_kind(kind, tmp_path, memory="640 KiB", block=BLOCK)


def test_it_is_a_plain_array(opener: Opener) -> None:
    array = opener()
    assert type(array) is np.ndarray
    assert array.flags.c_contiguous
    assert not array.flags.writeable
    assert not array.flags.owndata
    assert array.shape == (NBYTES,)


def test_reductions(opener: Opener) -> None:
    array = opener()
    right = expected()
    assert array.sum() == right.sum()
    assert array.max() == right.max()
    assert np.array_equal(np.bincount(array), np.bincount(right))
    words, right_words = array[: NBYTES // 8 * 8].view("<i8"), right[: NBYTES // 8 * 8].view("<i8")
    assert np.array_equal(np.sort(words), np.sort(right_words))
    assert np.array_equal(np.diff(array), np.diff(right))
    table, right_table = words[:300_000].reshape(500, 600), right_words[:300_000].reshape(500, 600)
    for axis in (0, 1):
        assert np.array_equal(table.min(axis), right_table.min(axis))
    assert np.array_equal(table.T.astype("f8") @ np.ones(500), right_table.T.astype("f8") @ np.ones(500))
    assert np.array_equal(table[::-7, ::3], right_table[::-7, ::3])
    chosen = np.random.default_rng(0).integers(0, len(words), 1000)
    assert np.array_equal(words[chosen], right_words[chosen])


def test_buffers(opener: Opener) -> None:
    array = opener()
    right = pattern(0, NBYTES)
    view = memoryview(array)
    assert (view.readonly, view.contiguous, view.nbytes) == (True, True, NBYTES)
    assert hashlib.sha256(view).digest() == hashlib.sha256(right).digest()
    assert zlib.crc32(array) == zlib.crc32(right)
    assert bytes(view) == right
    assert bytearray(array) == right
    assert b"".join([view[:1000], view[-1000:]]) == right[:1000] + right[-1000:]
    assert struct.unpack_from("<Q", array, 70_000) == struct.unpack_from("<Q", right, 70_000)
    assert view.tobytes() == right
    del view


def test_c_code(opener: Opener) -> None:
    array = opener()
    copy = ctypes.create_string_buffer(NBYTES)
    ctypes.memmove(copy, array.ctypes.data, NBYTES)
    assert copy.raw == pattern(0, NBYTES)


def test_copies_are_ordinary(opener: Opener) -> None:
    array = opener()
    for copy in (array.copy(), np.array(array), array + 0, np.ascontiguousarray(array[::2])):
        with pytest.raises(userfault.RangeError):
            userfault.memory_of(copy)
    writable = array.copy()
    writable[:] = 1


def test_pickling_and_saving(opener: Opener) -> None:
    array = opener()
    again = pickle.loads(pickle.dumps(array))
    assert np.array_equal(again, expected())
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    assert len(header) < 1000
    assert np.array_equal(pickle.loads(header, buffers=buffers), expected())
    del buffers
    file = io.BytesIO()
    np.save(file, array)
    assert np.array_equal(np.load(io.BytesIO(file.getvalue())), expected())


@pytest.mark.needs_kernel_faults
class TestSystemCalls:
    """The kernel itself touches missing pages."""

    def test_files(self, opener: Opener, tmp_path: Path) -> None:
        array = opener()
        path = tmp_path / "copy"
        array.tofile(path)
        assert path.read_bytes() == pattern(0, NBYTES)
        with path.open("wb") as file:
            file.write(array)
        assert path.read_bytes() == pattern(0, NBYTES)
        fd = os.open(path, os.O_RDWR | os.O_TRUNC)
        try:
            done = 0
            while done < NBYTES:
                done += os.write(fd, array[done:])
            assert os.pwritev(fd, [array[5000:6000], array[900_000:900_100]], 100) == 1100
        finally:
            os.close(fd)
        right = bytearray(pattern(0, NBYTES))
        right[100:1200] = pattern(5000, 1000) + pattern(900_000, 100)
        assert path.read_bytes() == right

    def test_sockets(self, opener: Opener) -> None:
        array = opener()
        ours, theirs = socket.socketpair()
        received = bytearray()

        def receive() -> None:
            while part := theirs.recv(1 << 20):
                received.extend(part)

        with ours, theirs:
            thread = threading.Thread(target=receive)
            thread.start()
            ours.send(array[:0])
            ours.sendall(array)
            ours.sendmsg([array[70_000:70_100], array[:100]])
            ours.shutdown(socket.SHUT_WR)
            thread.join()
        assert received == pattern(0, NBYTES) + pattern(70_000, 100) + pattern(0, 100)

    def test_pipes(self, opener: Opener) -> None:
        array = opener()
        r, w = os.pipe()
        try:
            for at in range(0, NBYTES - 4096, 100_003):
                assert os.write(w, array[at : at + 4096]) == 4096
                assert os.read(r, 4096) == pattern(at, 4096)
        finally:
            os.close(r)
            os.close(w)

    def test_process_vm_readv(self, opener: Opener) -> None:
        array = opener()

        class IoVec(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

        copy = ctypes.create_string_buffer(10_000)
        libc = ctypes.CDLL(None, use_errno=True)
        local = IoVec(ctypes.addressof(copy), 10_000)
        remote = IoVec(array.ctypes.data + 300_000, 10_000)
        done = libc.process_vm_readv(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        # It takes no faults for pages of others, and says so by a short count: never zeros.
        assert copy.raw[: max(done, 0)] == pattern(300_000, max(done, 0))

    def test_read_into_it_is_refused(self, opener: Opener) -> None:
        array = opener()
        with open("/dev/zero", "rb", buffering=0) as zeros:
            with pytest.raises(TypeError, match="read-write"):
                zeros.readinto(array)
            libc = ctypes.CDLL(None, use_errno=True)
            libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
            assert libc.read(zeros.fileno(), array.ctypes.data, 100) == -1
        assert array[:100].tobytes() == pattern(0, 100)


def test_populate_serves_system_calls_without_the_right_to_trap_them(kind: str, tmp_path: Path) -> None:
    from support.pagers import own_pager

    with own_pager(user_mode_only=True):
        array = open_kind(kind, tmp_path, memory="1 MiB", block=BLOCK)
        memory = userfault.memory_of(array)
        r, w = os.pipe()
        try:
            with pytest.raises(OSError, match="Bad address"):
                os.write(w, array[1 << 20 : (1 << 20) + 100])
            memory.populate(array[1 << 20 : (1 << 20) + 100])
            assert os.write(w, array[1 << 20 : (1 << 20) + 100]) == 100
            assert os.read(r, 100) == pattern(1 << 20, 100)
        finally:
            os.close(r)
            os.close(w)
        assert array.tobytes() == pattern(0, NBYTES)
        del array, memory


def test_mapped_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(0, NBYTES))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        array = userfault.open(mapped, memory="640 KiB", block=BLOCK)
        assert array.tobytes() == pattern(0, NBYTES)
        userfault.memory_of(array).evict()
        assert array[NBYTES - 1] == pattern(NBYTES - 1, 1)[0]
        del array
    array = userfault.open(np.memmap(path, mode="r"), memory="640 KiB", block=BLOCK)
    assert array.tobytes() == pattern(0, NBYTES)


def test_torch(opener: Opener) -> None:
    array = opener()
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    import warnings

    with warnings.catch_warnings():
        # Tensors know no read-only memory; a write to this one would be SIGSEGV.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        tensor = torch.from_numpy(array)
    assert userfault.memory_of(tensor) is userfault.memory_of(array)
    assert userfault.memory_of(tensor[70_000:]) is userfault.memory_of(array)
    assert tensor.sum().item() == expected().sum()
    assert torch.equal(tensor[::5], torch.tensor(expected()[::5]))
    del tensor


def test_arrow(opener: Opener) -> None:
    array = opener()
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    compute = pytest.importorskip("pyarrow.compute")

    column = pyarrow.array(array)
    assert column.buffers()[1].address == array.ctypes.data
    assert compute.sum(column).as_py() == expected().sum()
    buffer = pyarrow.py_buffer(array)
    assert userfault.memory_of(buffer) is userfault.memory_of(array)
    assert buffer.to_pybytes() == pattern(0, NBYTES)
    assert userfault.memory_of(column.buffers()[1].slice(1000)) is userfault.memory_of(array)
    del column, buffer


def test_many_threads(opener: Opener) -> None:
    array = opener()
    right = expected()
    start = threading.Barrier(8)
    wrong: list[int] = []

    def read(seed: int) -> None:
        start.wait()
        places = np.random.default_rng(seed).integers(0, NBYTES - 5000, 200).tolist()
        wrong.extend(at for at in places if not np.array_equal(array[at : at + 5000], right[at : at + 5000]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
