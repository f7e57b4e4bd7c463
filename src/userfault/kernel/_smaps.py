"""What /proc/PID/smaps says of mappings, above all how they are registered with a userfaultfd."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from userfault.kernel._page_range import pages_of
from userfault.kernel._proc import TargetFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["VmFlags", "vm_flags"]

_HEAD: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+ *(.*)")


@dataclass(frozen=True, slots=True)
class VmFlags:
    """One mapping of a process and its flags.

    Attributes:
        start: Address of its first byte.
        end: Address behind its last byte.
        permissions: As in /proc/PID/maps, for example "rw-p".
        offset: Where in its file it begins, bytes.
        pathname: Its file or name, "" if it has none.
        page_size: Size of its pages in bytes.
        flags: The two-letter flags of smaps; `proc_pid_smaps(5)` lists them.
    """

    start: int
    end: int
    permissions: str
    offset: int
    pathname: str
    page_size: int
    flags: frozenset[str]

    @property
    def missing(self) -> bool:
        """Whether missing pages are trapped (`um`)."""
        return "um" in self.flags

    @property
    def write_protect(self) -> bool:
        """Whether write protection is (`uw`), sync or async."""
        return "uw" in self.flags

    @property
    def minor(self) -> bool:
        """Whether minor faults are (`ui`)."""
        return "ui" in self.flags

    @property
    def read_write_protect(self) -> bool:
        """Whether read-write protection is (`ur`, Linux 7.3), sync or async."""
        return "ur" in self.flags

    @property
    def registered(self) -> bool:
        """Whether it is registered with any userfaultfd, in any mode."""
        return not self.flags.isdisjoint({"um", "uw", "ui", "ur"})


def vm_flags(where: Any, length: int | None = None, *, pid: int | None = None) -> list[VmFlags]:
    """Return the mappings that have a byte in a range, with how they are registered.

    The kernel counts the pages of every mapping up to there for it: this is not for a loop.

    Args:
        where: The range: any address, or an object.
        length: Bytes; None for all of the object, or the one byte at the address.
        pid: The process; None is this one.

    Raises:
        TargetExitedError: There is no such process, or it has exited.
        UffdPermissionError: This process may not look at it.

    Example:
        >>> from userfault.kernel import Mapping, Userfaultfd, pagemap
        >>> with Mapping.anonymous(1 << 20) as memory, Userfaultfd() as uffd:
        ...     _ = uffd.register(memory)
        ...     (found,) = pagemap.vm_flags(memory)
        ...     found.missing, found.write_protect, found.start == memory.address
        (True, False, True)
    """
    if isinstance(where, int):
        start, end = where, where + (1 if length is None else length)
    else:
        start, end = pages_of(where, length, exact=False)
    with TargetFile("smaps", pid) as file, open(file.fd, errors="surrogateescape", closefd=False) as text:
        found = list(_overlapping(text, start, end))
        if not found:
            file.check_alive()
    return found


def _overlapping(lines: Iterable[str], start: int, end: int) -> Iterator[VmFlags]:
    head: re.Match[str] | None = None
    page_size = 0
    for line in lines:
        # The kernel makes the text of a mapping when it is read, and counts its pages for it: stop early.
        if (new := _HEAD.match(line)) is not None:
            if int(new[1], 16) >= end:
                return
            head = new if int(new[2], 16) > start else None
        elif head is None:
            continue
        elif line.startswith("KernelPageSize:"):
            page_size = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:"):
            low, high, permissions, offset, name = head.groups()
            yield VmFlags(
                start=int(low, 16),
                end=int(high, 16),
                permissions=permissions,
                offset=int(offset, 16),
                pathname=name.rstrip("\n"),
                page_size=page_size,
                flags=frozenset(line.split()[1:]),
            )
