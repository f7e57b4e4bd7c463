"""One virtual machine under software emulation: two serial lines into files, an end by the clock."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

QEMU = "qemu-system-x86_64"
INSTALL = "apt-get install --no-install-recommends qemu-system-x86"
MEMORY_MIB = 2048
# Emulated `rep movsb` goes byte by byte, so the kernel is not to believe that it is the fast way to copy (erms, fsrm);
# and a fifth level of page tables makes every miss dearer. Without them fault-heavy tests take half the time.
CPU = "max,erms=off,fsrm=off,la57=off"
# A panic ends the machine. The clock stays even where a busy host makes it look bad. Files are in ramfs, which to
# mappings is a file system like those on disks; tmpfs would be shared memory.
COMMAND_LINE = "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable rootfstype=ramfs"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(slots=True)
class Machine:
    """A kernel that boots; its console and its events are files in a folder."""

    vmlinuz: Path
    initramfs: Path
    folder: Path
    processors: int
    deadline_s: float
    began: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    ended_after_s: float | None = None
    cpu_s: float = 0.0
    _read: int = 0

    @property
    def console(self) -> Path:
        """What the kernel and the tests print."""
        return self.folder / "console.log"

    @property
    def events(self) -> Path:
        """One JSON object a line."""
        return self.folder / "events.jsonl"

    @property
    def log(self) -> Path:
        """What the emulator itself says, mostly nothing."""
        return self.folder / "qemu.log"

    def start(self) -> None:
        """Switch it on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.console, self.events, self.log):
            path.write_bytes(b"")
        command = [
            QEMU, "-machine", "pc", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(self.processors), "-m", str(MEMORY_MIB),
            "-kernel", str(self.vmlinuz), "-initrd", str(self.initramfs), "-append", COMMAND_LINE,
            "-serial", f"file:{self.console}", "-serial", f"file:{self.events}",
        ]  # fmt: skip
        self.began = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )

    def new_lines(self) -> list[str]:
        """Return the events that have come since the last call."""
        with self.events.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        return whole.decode(errors="replace").splitlines()

    def is_running(self) -> bool:
        """Tell whether it still runs; when its time is over it is switched off."""
        assert self.process is not None
        if self.ended_after_s is None and not self._has_ended(os.WNOHANG):
            if time.monotonic() - self.began < self.deadline_s:
                return True
            self.stop()
        if self.ended_after_s is None:
            self.ended_after_s = time.monotonic() - self.began
        return False

    def stop(self) -> None:
        """Switch it off."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            self._has_ended(0)

    def _has_ended(self, options: int) -> bool:
        assert self.process is not None
        pid, status, used = os.wait4(self.process.pid, options)
        if pid == 0:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = used.ru_utime + used.ru_stime
        return True


def missing() -> str | None:
    """Say what must be installed for machines to run, or None."""
    return None if shutil.which(QEMU) else f"{QEMU} is not here: {INSTALL}"


def _die_with_parent() -> None:
    # Also where this program is killed in a way that it cannot answer.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
