"""The check that runs after every test sees each kind of thing that a test may leave behind."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support import leaks


@contextmanager
def a_thread() -> Iterator[None]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-over")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def a_descriptor() -> Iterator[None]:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def a_memfd() -> Iterator[None]:
    fd = os.memfd_create("userfault-test")
    os.ftruncate(fd, 4096)
    mapping = mmap.mmap(fd, 4096)
    os.close(fd)
    try:
        yield
    finally:
        mapping.close()


@contextmanager
def a_process() -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ):
        yield


@contextmanager
def a_file() -> Iterator[None]:
    path = Path(tempfile.gettempdir(), "left-over")
    path.touch()
    try:
        yield
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("leave", "word"),
    [
        (a_thread, "left-over"),
        (a_descriptor, "/dev/null"),
        (a_memfd, "mapping"),
        (a_process, "child process"),
        (a_file, "temporary file"),
    ],
)
def test_what_is_left_behind_is_named(leave: Callable[[], ExitStack], word: str) -> None:
    before = leaks.Holdings.now()
    with leave():
        left = leaks.leaks_since(before, settle_s=0.05)
    assert any(word in line for line in left), left
    assert leaks.leaks_since(before) == []


def test_a_registered_mapping_is_named() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user_mode_only = 1
    fd = libc.syscall(323 if os.uname().machine == "x86_64" else 282, os.O_CLOEXEC | user_mode_only)
    if fd < 0:
        pytest.skip(f"userfaultfd(2): {os.strerror(ctypes.get_errno())}")
    import fcntl
    import struct

    before = leaks.Holdings.now()
    with mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        fcntl.ioctl(fd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
        fcntl.ioctl(
            fd, 0xC020AA00, bytearray(struct.pack("QQQQ", ctypes.addressof(view), len(mapping), 1, 0))
        )
        left = leaks.leaks_since(before, settle_s=0.0)
        os.close(fd)
        del view
    assert len(left) == 1, left
    assert "registered" in left[0]
