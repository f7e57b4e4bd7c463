"""The first process of a virtual machine: prepares the system, runs the tests, says how it went, and ends the machine.

The kernel's messages and what the tests print go to the first serial line; the second carries the events
(`kernels.results` reads them). The standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import struct
import time
import traceback
import tty
from pathlib import Path

TYPE_CHECKING = False  # typing itself takes a while to import
if TYPE_CHECKING:
    from typing import Any

EVENTS = "/dev/ttyS1"
# What to run, as `kernels.initramfs` wrote it.
PLAN = Path("/plan.json")

# (file system, where, options)
MOUNTS = (
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("devpts", "/dev/pts", ""),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", ""),
    ("hugetlbfs", "/dev/hugepages", ""),
)
SWAP_DEVICE = "/dev/ram0"
SWAP_MIB = 256
PAGE = 4096
LAST_WORDS_S = 15
RB_AUTOBOOT = 0x01234567
FINIT_MODULE = 313  # x86-64

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    """Raise the OSError of a C call that failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount_all() -> None:
    for kind, where, options in MOUNTS:
        Path(where).mkdir(parents=True, exist_ok=True)
        checked(libc.mount(b"none", where.encode(), kind.encode(), 0, options.encode()), f"mount {where}")
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        Path("/dev", name).symlink_to(f"/proc/self/fd{target}")


def add_swap(modules: list[str]) -> None:
    """Make a swap device of a disk in memory."""
    for module in modules:
        with open(module, "rb") as file:
            options = f"rd_nr=1 rd_size={SWAP_MIB * 1024}".encode()
            checked(libc.syscall(FINIT_MODULE, file.fileno(), options, 0), module)
    # What mkswap writes (include/linux/swap.h, union swap_header): version, last page, number of bad pages.
    header = bytearray(PAGE)
    struct.pack_into("=III", header, 1024, 1, SWAP_MIB * 2**20 // PAGE - 1, 0)
    header[-10:] = b"SWAPSPACE2"
    with open(SWAP_DEVICE, "r+b") as device:
        device.write(header)
    checked(libc.swapon(SWAP_DEVICE.encode(), 0), "swapon")


class Events:
    """The second serial line."""

    def __init__(self) -> None:
        # As nobody's controlling terminal: it would be hung up at the end of a session.
        self.fd = os.open(EVENTS, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        tty.setraw(self.fd)

    def say(self, *event: object) -> None:
        """Send one event."""
        left = (json.dumps(event) + "\n").encode()
        while left:
            left = left[os.write(self.fd, left) :]


class Children:
    """Starts programs and waits for them, and for all the orphans that process 1 is given."""

    def __init__(self) -> None:
        self.ended, ours = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ours, warn_on_full_buffer=False)

    def run(self, command: list[str], seconds: float, output: str | None = None) -> int | None:
        """Run a program to its end and return its exit code, or None if it had not ended in time.

        Before it is killed it gets SIGABRT, to which Python answers with the stacks of all threads.
        """
        actions = []
        if output is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            actions = [(os.POSIX_SPAWN_OPEN, 1, output, flags, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2)]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
        code = self._wait(pid, seconds)
        if code is None:
            os.kill(pid, signal.SIGABRT)
            if self._wait(pid, LAST_WORDS_S) is None:
                os.kill(pid, signal.SIGKILL)
                self._wait(pid, LAST_WORDS_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return code

    def _wait(self, pid: int, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    if ended[0] == pid:
                        return os.waitstatus_to_exitcode(ended[1])
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.ended], [], [], left)[0]:
                return None
            os.read(self.ended, 4096)


def boot_seconds() -> float:
    """Return how long the machine has been up."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def run_pytest(plan: dict[str, Any], children: Children, events: Events) -> None:
    events.say("step", "pytest")
    os.chdir(plan["root"])
    command = [plan["python"], "-m", "pytest", *plan["pytest"]]
    began = time.monotonic()
    code = children.run(command, plan["seconds"] - boot_seconds())
    events.say("step-end", "pytest", code, time.monotonic() - began)


def run_programs(plan: dict[str, Any], children: Children, events: Events) -> None:
    events.say("step", "engine")
    os.chdir("/tmp")
    step_began = time.monotonic()
    for program in plan["programs"]:
        name = os.path.basename(program)
        log = Path(f"/tmp/{name}.log")
        events.say("program", name)
        began = time.monotonic()
        left = plan["seconds"] - boot_seconds()
        code = children.run([program], min(left, plan["program_seconds"]), str(log))
        seconds = time.monotonic() - began
        said = log.read_text(errors="replace")[-20_000:] if code != 0 else ""
        events.say("program-end", name, code, seconds, said)
    events.say("step-end", "engine", 0, time.monotonic() - step_began)


def main() -> None:
    mount_all()
    events = Events()
    events.say("boot", os.uname().release, boot_seconds())
    plan = json.loads(PLAN.read_text())
    os.environ.clear()
    os.environ.update(plan["environment"])
    if plan["modules"]:
        add_swap(plan["modules"])
    children = Children()
    if plan["pytest"]:
        run_pytest(plan, children, events)
    if plan["programs"]:
        run_programs(plan, children, events)
    events.say("off")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        # The console's end is shown where the last event is missing.
        traceback.print_exc()
    finally:
        # With QEMU's -no-reboot this ends the machine, without the need for a power button.
        libc.reboot(RB_AUTOBOOT)
