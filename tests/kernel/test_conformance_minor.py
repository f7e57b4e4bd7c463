"""The kernel's unit scenarios of minor faults: pages that are in the file, and not mapped here.

The scenarios and their numbers are those of the kernel's own `uffd-unit-tests`, listed in docs/kernel-api.md.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from support.kernel import PAGE, Area, make_area, protected
from support.kernel_facts import ask
from support.kernel_scenarios import NO_THP, Handler, for_kinds, page_of, pmd_size, whole_page
from userfault.kernel import FaultKind, PageFault, RegisterMode, Userfaultfd
from userfault.kernel.abi import FaultFlag, Request
from userfault.kernel.errors import UffdError
from userfault.kernel.events import AnyEvent
from userfault.kernel.mapping import Advice, Mapping, MemoryKind

MINOR, WP = RegisterMode.MINOR, RegisterMode.WP

_INVERTED = bytes(255 - byte for byte in range(256))


@dataclass(frozen=True)
class _Double:
    """A file that is mapped twice: `area` to fill it, and `alias`, which is registered, to read it."""

    area: Area
    alias: Area
    uffd: Userfaultfd
    write_protect: bool

    def serve(self, uffd: Userfaultfd, event: AnyEvent) -> None:
        """Invert the page through the other mapping, and map it."""
        assert isinstance(event, PageFault)
        page = page_of(self.alias, event.address)
        if event.kind is FaultKind.WRITE_PROTECT:
            uffd.writeprotect(self.alias.page(page), self.alias.page_size, protect=False)
            return
        assert event.flags == FaultFlag.MINOR
        content = whole_page(self.area, page)
        self.area.memory.write(page * self.area.page_size, content.translate(_INVERTED))
        place = (self.alias.page(page), self.alias.page_size)
        assert uffd.continue_(*place, write_protect=self.write_protect) == self.alias.page_size
        # It is mapped now.
        assert uffd.try_continue(*place) == (0, errno.EEXIST)
        assert ask(uffd, Request.CONTINUE, *place, 0, 1) == (errno.EEXIST, -errno.EEXIST)

    def check_content(self) -> None:
        """Every byte that the alias shows was inverted once."""
        expected = b"".join(self.area.pattern(page) for page in range(self.alias.pages))
        assert self.alias.memory.read(0, self.alias.length) == expected.translate(_INVERTED)


@contextlib.contextmanager
def _doubled(area: Area, *, write_protect: bool = False, align: int | None = None) -> Iterator[_Double]:
    with area.memory.alias(align=align) as memory, Userfaultfd() as uffd:
        alias = Area(area.kind, memory, area.pages)
        uffd.register(memory, mode=MINOR | WP if write_protect else MINOR)
        # Filling it through the mapping that is not registered traps nothing.
        area.populate()
        assert uffd.fdinfo().total == 0
        assert uffd.read_events() == []
        yield _Double(area, alias, uffd, write_protect)


@pytest.mark.scenario(13)
@pytest.mark.needs_feature("MINOR_HUGETLBFS", "MINOR_SHMEM")
@for_kinds(MemoryKind.SHMEM, MemoryKind.HUGETLB)
def test_minor_faults(kind: MemoryKind) -> None:
    """Scenario 13, minor."""
    with make_area(kind, 4) as area, _doubled(area) as double:
        with Handler(double.uffd, double.serve) as handler:
            double.check_content()
        assert handler.count(FaultKind.MINOR) == area.pages
        assert handler.count(FaultKind.MISSING) == 0
        assert len(handler.events) == area.pages


@pytest.mark.scenario(14)
# The kernel has no feature for CONTINUE with write protection; this one is of the same release.
@pytest.mark.needs_feature("MINOR_HUGETLBFS", "MINOR_SHMEM", "PAGEFAULT_FLAG_WP", "WP_UNPOPULATED")
@for_kinds(MemoryKind.SHMEM, MemoryKind.HUGETLB)
def test_minor_faults_with_write_protection(kind: MemoryKind) -> None:
    """Scenario 14, minor-wp."""
    with make_area(kind, 4) as area, _doubled(area, write_protect=True) as double:
        with Handler(double.uffd, double.serve) as handler:
            double.check_content()
            assert handler.count(FaultKind.MINOR) == area.pages
            assert len(handler.events) == area.pages
            # What CONTINUE has mapped is protected, in this mapping alone.
            assert all(protected(double.alias.page(page)) for page in range(area.pages))
            assert not any(protected(area.page(page)) for page in range(area.pages))
            for page in range(area.pages):
                double.alias.memory.write(page * area.page_size, b"written")
                assert not protected(double.alias.page(page))
                assert area.head(page, 7) == b"written"
        written = handler.events[area.pages :]
        both = FaultFlag.WP | FaultFlag.WRITE
        assert written == [PageFault(double.alias.page(page), both, 0) for page in range(area.pages)]
        assert handler.count(FaultKind.MISSING) == 0


def _mapped_huge(address: int) -> int:
    """How many bytes of the mapping at an address are mapped as huge pages of a file in memory."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            head = line.split()[0]
            if "-" in head:
                start, end = (int(part, 16) for part in head.split("-"))
                inside = start <= address < end
            elif inside and head == "ShmemPmdMapped:":
                return int(line.split()[1]) << 10
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.scenario(15)
@pytest.mark.needs_feature("MINOR_SHMEM")
@for_kinds(MemoryKind.SHMEM)
def test_collapse_after_minor_faults(kind: MemoryKind) -> None:
    """Scenario 15, minor-collapse: what was continued page by page becomes one huge page, with nobody's fault."""
    size = pmd_size()
    with Mapping.memfd(size, align=size) as memory:
        area = Area(kind, memory, size // PAGE)
        with _doubled(area, align=size) as double:
            with Handler(double.uffd, double.serve) as handler:
                double.check_content()
                assert handler.count(FaultKind.MINOR) == area.pages
                try:
                    double.alias.memory.madvise(Advice.COLLAPSE)
                except UffdError:
                    pytest.skip(NO_THP)
                assert _mapped_huge(double.alias.start) == size
                double.check_content()
            assert handler.count(FaultKind.MINOR) == area.pages
            assert handler.count(FaultKind.MISSING) == 0
            assert len(handler.events) == area.pages
