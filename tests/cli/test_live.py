"""The live line is on a terminal only, on stderr, and gone at the end; what the kernel says of residency."""

from __future__ import annotations

import mmap
import os
import pty
import subprocess
import sys
from pathlib import Path

from userfault.cli._demo.smaps import resident_bytes

_CODE = """
from userfault.cli._demo.live import LiveLine
with LiveLine() as live:
    for done in range(4):
        live.step("making the data", done, 3)
print("result")
"""


def run(stderr: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", _CODE],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )


def test_nothing_where_there_is_no_terminal() -> None:
    done = run(subprocess.PIPE)
    assert done.stderr == ""
    assert done.stdout == "result\n"


def test_a_line_on_a_terminal_that_is_gone_when_done() -> None:
    terminal, other = pty.openpty()
    try:
        done = run(other)
        os.close(other)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # EIO: nobody has the other side open any more
                break
            if not part:
                break
            shown += part
    finally:
        os.close(terminal)
    assert done.stdout == "result\n"
    assert b"making the data" in shown
    # The last thing is to erase the line.
    assert shown.rstrip().endswith((b"\x1b[2K", b"\x1b[?25h")) or shown.rpartition(b"making")[2].count(
        b"\x1b[2K"
    )


def test_smaps_counts_touched_pages() -> None:
    pages = 64
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(15)  # MADV_NOHUGEPAGE: one page per touch
        address = _address(memory)
        before = resident_bytes(address, len(memory))
        for page in range(10):
            memory[page * mmap.PAGESIZE] = 1
        assert resident_bytes(address, len(memory)) - before == 10 * mmap.PAGESIZE


def _address(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_smaps_adds_up_only_what_overlaps(tmp_path: Path) -> None:
    text = (
        "1000-3000 r--p 00000000 00:00 0 \nSize: 8 kB\nRss:                 8 kB\n"
        "3000-5000 r--p 00000000 00:00 0 \nRss:                 4 kB\nPss: 4 kB\n"
        "7000-9000 r--p 00000000 00:00 0 \nRss:                 8 kB\n"
    )
    (tmp_path / "smaps").write_text(text)
    assert resident_bytes(0x2000, 0x2000, str(tmp_path / "smaps")) == 12 << 10
    assert resident_bytes(0x5000, 0x2000, str(tmp_path / "smaps")) == 0
