"""What runs code apart from the tests always ends, and takes its children with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import run_python
from support.waiting import wait_until


def test_output_and_exit_code() -> None:
    done = run_python("import sys; print(sys.argv[1]); sys.exit('no')", 30, arguments=["yes"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "yes\n", "no\n")
    with pytest.raises(AssertionError, match="exit 1"):
        done.check()


def test_a_signal_is_a_negative_exit_code() -> None:
    assert run_python("import os; os.kill(os.getpid(), 9)", 30).returncode == -9


def test_a_hang_ends_with_the_stacks_and_without_children() -> None:
    code = """
        import subprocess, sys, threading
        child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
        print("child", child.pid, flush=True)
        threading.Event().wait()
    """
    with pytest.raises(AssertionError, match=r"no end within 2\.0 s") as caught:
        run_python(code, 2.0)
    assert "in wait" in str(caught.value)
    child = re.search(r"child (\d+)", str(caught.value))
    assert child is not None
    stat = Path("/proc", child[1], "stat")

    def ended() -> bool:
        # Whoever adopted it may not have reaped it yet.
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(ended, "the end of the killed child")
