"""Python code in a process of its own, with an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STACKS_WAIT_S = 5.0


@dataclass(frozen=True)
class Finished:
    """How a process ended. `returncode` is the negative signal number if a signal ended it."""

    returncode: int
    stdout: str
    stderr: str

    def check(self) -> str:
        """Return what it printed, or fail the test with everything it said."""
        assert self.returncode == 0, (
            f"exit {self.returncode}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
        )
        return self.stdout


def run_python(
    code: str,
    timeout_s: float = 60.0,
    *,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    executable: str | Sequence[str] = sys.executable,
) -> Finished:
    """Run Python code in a process group of its own and return how it ended.

    For everything that may hang in a fault or die by a signal. A process that has not ended after `timeout_s`
    seconds prints the stacks of its threads (faulthandler answers SIGABRT without the GIL), is killed with
    its children, and fails the test.

    Args:
        code: The program; it may be indented as the test that holds it.
        timeout_s: Seconds until it is killed.
        arguments: What it finds in `sys.argv[1:]`.
        env: Environment variables on top of this process's.
        cwd: Its working folder; by default this process's.
        executable: Another Python, or a command that runs one (`["setpriv", ..., python]`).
    """
    command = [executable] if isinstance(executable, str) else list(executable)
    with subprocess.Popen(
        [*command, "-X", "faulthandler", "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        start_new_session=True,
        text=True,
        errors="replace",
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STACKS_WAIT_S)
            # Its children may hold the pipes open.
            _kill_group(process.pid)
            stdout, stderr = process.communicate()
            raise AssertionError(
                f"no end within {timeout_s} s\n--- stdout\n{stdout}\n--- stderr\n{stderr}"
            ) from None
        finally:
            _kill_group(process.pid)
    return Finished(process.returncode, stdout, stderr)


def _kill_group(group: int) -> None:
    """End what a process left in its group; the group itself may be gone."""
    # Not ours to signal, if the program ran as another user: then its own end took its workers with it.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
