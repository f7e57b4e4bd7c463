"""The kinds of memory that userfaultfd tells apart."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Final

from userfault.kernel._address import PAGE_SIZE
from userfault.kernel._mman import file_system_magic

__all__ = ["MemoryKind", "kind_of_file"]

_TMPFS: Final = 0x01021994  # linux/magic.h
_HUGETLBFS: Final = 0x958458F6


class MemoryKind(StrEnum):
    """The kinds of memory that userfaultfd treats differently."""

    ANONYMOUS = "anonymous"  # private
    SHMEM = "shmem"  # shared: memfd, tmpfs, MAP_SHARED|MAP_ANONYMOUS
    PRIVATE_SHMEM = "private shmem"  # a private mapping of a memfd, or of a file on tmpfs
    HUGETLB = "hugetlb"
    PRIVATE_HUGETLB = "private hugetlb"
    FILE = "file"  # of any other file system


def kind_of_file(fd: int, *, shared: bool) -> tuple[MemoryKind, int]:
    """Return what kind of memory a mapping of this file is, and the size of its pages in bytes."""
    magic = file_system_magic(fd)
    if magic == _TMPFS:
        return MemoryKind.SHMEM if shared else MemoryKind.PRIVATE_SHMEM, PAGE_SIZE
    if magic == _HUGETLBFS:
        kind = MemoryKind.HUGETLB if shared else MemoryKind.PRIVATE_HUGETLB
        return kind, os.fstatvfs(fd).f_bsize  # of hugetlbfs, the size of its pages
    return MemoryKind.FILE, PAGE_SIZE
