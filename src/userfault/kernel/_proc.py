"""Files of /proc that tell of the memory of this process, or of another one."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, Self

from userfault.errors import ClosedError
from userfault.kernel.errors import NotSupportedError, UffdError, error_from_errno

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["TargetFile"]

_EXITED: Final = "the process has exited, or never had memory of its own"
_FORBIDDEN: Final = (
    "another process's memory may be looked at by its own user (if it may be dumped: PR_SET_DUMPABLE), and with"
    " CAP_SYS_PTRACE"
)


class TargetFile:
    """`/proc/PID/pagemap` or `/proc/PID/smaps`, open.

    It is about the memory that the process had when it was opened, even where a fork, an exec or an exit follows.

    Attributes:
        fd: The descriptor.
        path: Its name, for messages.
    """

    __slots__ = ("_fd", "_opened_by", "_own", "path")

    def __init__(self, name: str, pid: int | None, fd: int | None = None) -> None:
        """Open the file, or use the open `fd`, which stays the caller's.

        Raises:
            TargetExitedError: There is no such process, or it has no memory.
            UffdPermissionError: This process may not look at its memory.
            NotSupportedError: /proc is not mounted, or the kernel built without it.
        """
        who = "self" if pid is None else str(pid)
        self.path = f"/proc/{who}/{name}" if fd is None else f"descriptor {fd}"
        self._own = fd is None
        self._opened_by = os.getpid() if fd is None and pid in (None, os.getpid()) else 0
        if fd is not None:
            self._fd = fd
        else:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise self._not_opened(error.errno or 0, pid) from None
        if self._opened_by:
            return
        try:
            # Up to Linux 6.15 at least, the file of a process without memory (a zombie, a kernel thread) can be opened,
            # and PAGEMAP_SCAN follows a null pointer then.
            self.check_alive()
        except BaseException:
            self.close()
            raise

    def _not_opened(self, number: int, pid: int | None) -> UffdError:
        if not os.path.exists("/proc/self/stat") or (number == errno.ENOENT and self._opened_by):
            remedy = "mount /proc; the kernel needs CONFIG_PROC_PAGE_MONITOR"
            return NotSupportedError(
                f"open {self.path}: {os.strerror(number)} ({remedy})",
                errno=number,
                call="open",
                remedy=remedy,
            )
        # A zombie is refused to its own user, because nothing tells any more whether it may be dumped.
        if number in (errno.ENOENT, errno.ESRCH) or _is_zombie(pid):
            return error_from_errno(errno.ESRCH, call="open", path=self.path, remedy=_EXITED)
        remedy = _FORBIDDEN if number in (errno.EACCES, errno.EPERM) else ""
        return error_from_errno(number, call="open", path=self.path, remedy=remedy)

    @property
    def fd(self) -> int:
        """The descriptor."""
        if self._fd < 0:
            raise ClosedError(f"{self.path} was closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._fd < 0

    def check_alive(self) -> None:
        """Raise TargetExitedError if the process has no memory any more.

        A read of such a file just ends, and on many kernels (6.12 and 7.3; 6.18 says ESRCH) a scan succeeds and finds
        nothing: all of the memory would look unmapped.
        """
        # A child has its parent's descriptor: what was this process's own memory is another's now.
        if self._opened_by == os.getpid():
            return
        try:
            alive = os.pread(self.fd, 8, 0)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise error_from_errno(error.errno or 0, call="read", path=self.path, remedy="") from None
            alive = b""
        if not alive:
            raise error_from_errno(errno.ESRCH, call="read", path=self.path, remedy=_EXITED)

    def close(self) -> None:
        """Close it, unless it is the caller's. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._own:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_zombie(pid: int | None) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] in (b"Z", b"X")
    except OSError:
        return False
