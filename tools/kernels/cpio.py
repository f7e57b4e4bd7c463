"""Archives in the kernel's initramfs format (Documentation/driver-api/early-userspace/buffer-format.rst, "newc")."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_MAGIC = b"070701"
_END = "TRAILER!!!"


@dataclass(slots=True)
class Entry:
    """One file, folder or symbolic link. `content` is its bytes, where they are, or what the link says."""

    mode: int
    content: bytes | Path = b""
    mtime: int = 0


@dataclass(slots=True)
class Archive:
    """What will be in the archive, by absolute path. Folders above an entry come by themselves."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def file(self, path: str, content: bytes | Path, *, mode: int = 0o644, mtime: int = 0) -> None:
        """Put a file with these bytes, or with those of a file that is here."""
        self._put(path, Entry(stat.S_IFREG | mode, content, mtime))

    def link(self, path: str, target: str) -> None:
        """Put a symbolic link."""
        self._put(path, Entry(stat.S_IFLNK | 0o777, os.fsencode(target)))

    def folder(self, path: str, *, mode: int = 0o755) -> None:
        """Put an empty folder."""
        self._put(path, Entry(stat.S_IFDIR | mode))

    def copy(self, path: Path) -> None:
        """Put a file of this machine at the path that it has here, through the same symbolic links."""
        while True:
            link = _first_link(path)
            if link is None:
                break
            target = os.readlink(link)
            self.link(str(link), target)
            path = Path(os.path.normpath(link.parent / target)) / path.relative_to(link)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            self.folder(str(path), mode=stat.S_IMODE(status.st_mode))
        else:
            self.file(str(path), path, mode=stat.S_IMODE(status.st_mode), mtime=int(status.st_mtime))

    def _put(self, path: str, entry: Entry) -> None:
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            self.entries.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
        self.entries[path] = entry

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive's bytes."""
        for number, (path, entry) in enumerate(self.entries.items(), start=1):
            content = entry.content.read_bytes() if isinstance(entry.content, Path) else entry.content
            yield _header(number, path.lstrip("/"), entry.mode, entry.mtime, len(content))
            yield content + bytes(-len(content) % 4)
        yield _header(0, _END, 0, 0, 0)

    def write(self, target: Path) -> None:
        """Write the archive into a file."""
        with target.open("wb") as file:
            file.writelines(self.pieces())


def _first_link(path: Path) -> Path | None:
    """Find the first part of a path that is a symbolic link here."""
    for part in [*reversed(path.parents), path]:
        if part.is_symlink():
            return part
    return None


def _header(number: int, name: str, mode: int, mtime: int, size: int) -> bytes:
    raw = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), length of the name, checksum
    fields = (number, mode, 0, 0, links, mtime, size, 0, 0, 0, 0, len(raw), 0)
    head = _MAGIC + b"".join(b"%08x" % value for value in fields) + raw
    return head + bytes(-len(head) % 4)
