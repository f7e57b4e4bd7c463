"""What memory is under userfaultfds: a model in plain Python, which is also the description.

Memory is a list of mappings (`Vma`) for each process, and the state of each page (`Page`; no entry: there is no page).
A userfaultfd is a `Context`; being registered is a property of mappings. This file has the states, and what an access
makes of them; `page_calls` has the requests and the memory calls, each of which answers as the kernel does.

| state   | what the page is                                     | pagemap           | an access                       |
|---------|------------------------------------------------------|-------------------|---------------------------------|
| (none)  | nothing; a page of a file may wait in the page cache | 0                 | `World.bring`                   |
| `ZERO`  | the one page of zeros, for reading                   | present           | a write makes it `OWN`          |
| `OWN`   | anonymous memory; the private copy of a file's page  | present           |                                 |
| `FILE`  | the page cache's page itself                         | present, file     | private: a write makes it `OWN` |
| `MARK`  | no page, but whatever comes is to be write-protected | swapped, uffd     | as (none)                       |
| `POISON`| UFFDIO_POISON                                        | swapped           | SIGBUS                          |
| `GUARD` | MADV_GUARD_INSTALL                                   | swapped, guard    | SIGSEGV                         |

A present page has one more bit for userfaultfd (`Page.bit`, pagemap's bit 57): in a mapping registered for WP it
traps writes, in one registered for RWP every access.

What is left to the kernel, and learned from it: which neighbouring mappings it merges (`Space.learn`). What is not
in the model: swap, KSM, transparent and other huge pages, pinned pages, memory that runs out, and the order in which
several threads run that are woken at once.
"""

from __future__ import annotations

import bisect
import errno
import os
import signal
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from userfault.kernel import Feature, RegisterMode
from userfault.kernel.abi import PagemapBit
from userfault.kernel.events import FaultKind
from userfault.kernel.mapping import MemoryKind, Protection

__all__ = [
    "PAGE",
    "Access",
    "Context",
    "File",
    "Observation",
    "Page",
    "Release",
    "Space",
    "State",
    "Trap",
    "Vma",
    "World",
]

PAGE = os.sysconf("SC_PAGE_SIZE")
ZEROS = bytes(PAGE)
MISSING, WP, MINOR, RWP = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR, RegisterMode.RWP
NO_MODE = RegisterMode(0)
PROTECTIONS = WP | RWP
FAULT_AROUND = max(
    1, 65536 // PAGE
)  # pages that one read fault of a file maps, where they are in the page cache

# What is to be seen from outside: the kind of thing, who (a context's or process's number), and the details.
Observation = tuple[Any, ...]


@dataclass(frozen=True)
class Release:
    """What kernels do differently, found out by `page_trials`."""

    features: Feature
    kernel_faults: bool  # a userfaultfd traps system calls as well
    fork_events: bool  # this process may have EVENT_FORK
    keeps_protection: bool  # 7.3: registering again may not drop WP or RWP (EBUSY)
    unregisters_others: bool  # 6.12: UNREGISTER takes a range away from another userfaultfd
    continue_protects: bool  # 6.4: CONTINUE can write-protect
    remap_clears: bool  # mremap without EVENT_REMAP takes the protection away
    remaps_several: bool  # 6.17: mremap moves several mappings at once
    beyond_copy: int  # COPY beyond the end of the file: EFAULT, from 7.3 on ENOMEM
    beyond_continue: int  # CONTINUE there: EINVAL, from 7.3 on EFAULT
    guards: frozenset[MemoryKind]  # 6.13, 6.15: kinds of memory that can have guards
    copies_over_guards: bool  # up to 7.2
    scans: bool  # 6.7: PAGEMAP_SCAN


class State(Enum):
    """What is at an address."""

    ZERO = "zero"
    OWN = "own"
    FILE = "file"
    MARK = "mark"
    POISON = "poison"
    GUARD = "guard"


PRESENT = (State.ZERO, State.OWN, State.FILE)


@dataclass(frozen=True, slots=True)
class Page:
    """One entry of a page table.

    `data` is that of an `OWN` page. `exclusive`: no other process has the same `OWN` page, as after a fork.
    """

    state: State
    data: bytes = field(default=b"", repr=False)
    bit: bool = False
    exclusive: bool = True

    @property
    def present(self) -> bool:
        return self.state in PRESENT

    def pagemap(self) -> PagemapBit:
        """The entry of /proc/PID/pagemap, without what depends on the rest of the system."""
        found = PagemapBit.PRESENT if self.present else PagemapBit.SWAPPED
        if self.state is State.FILE:
            found |= PagemapBit.FILE
        if self.state is State.GUARD:
            found |= PagemapBit.GUARD
        if self.bit or self.state is State.MARK:
            found |= PagemapBit.UFFD_PROTECTED
        return found


@dataclass(eq=False)
class File:
    """A file in memory: its length in pages, and what is in the page cache."""

    number: int
    length: int
    cache: dict[int, bytes] = field(default_factory=dict, repr=False)
    # Allocated, and never read or written since: they count as cached, though reading the file shows a hole.
    unwritten: set[int] = field(default_factory=set)

    def drop(self, index: int) -> None:
        self.cache.pop(index, None)
        self.unwritten.discard(index)

    def use(self, index: int) -> None:
        """Find or make the page, for a fault."""
        self.cache.setdefault(index, ZEROS)
        self.unwritten.discard(index)


@dataclass(eq=False)
class Context:
    """A userfaultfd."""

    number: int
    space: Space
    features: Feature
    user_mode_only: bool
    closed: bool = False

    def has(self, feature: Feature) -> bool:
        return bool(self.features & feature)


@dataclass(eq=False)
class Vma:
    """A mapping: pages [start, end) with the same properties.

    `anonymous`: it has had pages of its own. Only then (or for the sake of WP) does a fork copy its page table.
    """

    start: int
    end: int
    kind: MemoryKind
    protection: Protection
    file: File | None = None
    offset: int = 0  # the file's page at `start`
    context: Context | None = field(default=None, repr=False)
    mode: RegisterMode = NO_MODE
    anonymous: bool = False

    @property
    def shared(self) -> bool:
        return self.kind is MemoryKind.SHMEM

    def index(self, page: int) -> int:
        """The page of the file."""
        return page - self.start + self.offset

    def beyond(self, page: int) -> bool:
        """Whether the file ends before."""
        return self.file is not None and self.index(page) >= self.file.length

    def allows(self, write: bool) -> bool:
        return (Protection.WRITE if write else Protection.READ) in self.protection

    def has(self, feature: Feature) -> bool:
        return self.context is not None and self.context.has(feature)

    @property
    def marks_empty(self) -> bool:
        """Whether write-protecting it marks empty pages: always, but in anonymous memory only with WP_UNPOPULATED."""
        return bool(self.mode & WP) and (self.file is not None or self.has(Feature.WP_UNPOPULATED))

    @property
    def flags(self) -> set[str]:
        """Those of smaps, so far as we know them."""
        names = {"um": MISSING, "uw": WP, "ui": MINOR, "ur": RWP}
        found = {name for name, mode in names.items() if self.mode & mode}
        found |= {"rd"} if Protection.READ in self.protection else set()
        found |= {"wr"} if Protection.WRITE in self.protection else set()
        return found | ({"sh"} if self.shared else set())

    def alike(self, other: Vma) -> bool:
        """Whether the kernel may merge the two, the second behind the first."""
        return (
            self.end == other.start
            and self.kind is other.kind
            and self.protection == other.protection
            and self.file is other.file
            and (self.file is None or self.index(self.end) == other.offset)
            and self.context is other.context
            and self.mode == other.mode
        )

    def absorb(self, following: Vma) -> None:
        """Become one with the mapping behind."""
        self.end = following.end
        self.anonymous |= following.anonymous


@dataclass(eq=False)
class Space:
    """A process's memory."""

    number: int
    vmas: list[Vma] = field(default_factory=list, repr=False)
    pages: dict[int, Page] = field(default_factory=dict, repr=False)
    alive: bool = True

    def vma(self, page: int) -> Vma | None:
        """The mapping at a page."""
        at = bisect.bisect_right(self.vmas, page, key=lambda vma: vma.start) - 1
        return self.vmas[at] if at >= 0 and page < self.vmas[at].end else None

    def within(self, first: int, count: int) -> list[Vma]:
        """The mappings that have a page in the range."""
        return [vma for vma in self.vmas if vma.start < first + count and first < vma.end]

    def whole(self, first: int, count: int) -> bool:
        """Whether all of the range is mapped."""
        return all(self.vma(page) for page in range(first, first + count))

    def split(self, first: int, count: int) -> list[Vma]:
        """Cut mappings at the ends of the range, and return those inside."""
        for page in (first, first + count):
            vma = self.vma(page)
            if vma is not None and vma.start < page:
                rest = replace(vma, start=page, offset=vma.index(page))
                vma.end = page
                self.insert(rest)
        return self.within(first, count)

    def insert(self, vma: Vma) -> None:
        bisect.insort(self.vmas, vma, key=lambda vma: vma.start)

    def merge(self) -> None:
        """Merge all mappings that the kernel may merge."""
        merged: list[Vma] = []
        for vma in self.vmas:
            if merged and merged[-1].alike(vma):
                merged[-1].absorb(vma)
            else:
                merged.append(vma)
        self.vmas = merged

    def learn(self, found: list[tuple[int, int, frozenset[str]]]) -> None:
        """Compare the mappings with the kernel's, and merge those which it has merged.

        Only those that are alike may be. Whether they were depends on what the kernel knows beyond the model (where
        in reverse maps they stand), and matters: a fill request must lie inside of one mapping.
        """
        merged: list[Vma] = []
        left = list(self.vmas)
        for start, end, flags in found:
            assert left, f"mapped, but not in the model: [{start:#x}, {end:#x})"
            vma = left.pop(0)
            assert vma.start == start, f"model {vma}, kernel [{start:#x}, {end:#x})"
            while vma.end < end:
                assert left, f"model {vma}, kernel [{start:#x}, {end:#x})"
                following = left.pop(0)
                assert vma.alike(following), f"the kernel merged {vma} and {following}"
                vma.absorb(following)
            assert vma.end == end, f"model {vma}, kernel [{start:#x}, {end:#x})"
            known = flags & {"um", "uw", "ui", "ur", "rd", "wr", "sh"}
            assert vma.flags == known, f"flags of {vma}: the model has {vma.flags}, the kernel {known}"
            merged.append(vma)
        assert not left, f"in the model, but not mapped: {left}"
        self.vmas = merged


@dataclass(frozen=True)
class Trap:
    """An access stops here, until somebody resolves it through the context."""

    context: Context
    kind: FaultKind


@dataclass(eq=False)
class Access:
    """A thread that reads (`data` None) or writes some bytes of one page, itself or by a system call."""

    number: int
    space: Space
    page: int
    offset: int
    length: int
    data: bytes | None
    by_kernel: bool
    thread_id: int = 0
    slot: int = 0  # which of the process's threads it is
    waits_for: Context | None = None

    @property
    def write(self) -> bool:
        return self.data is not None


class World:
    """All processes, files and userfaultfds."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.spaces: dict[int, Space] = {}
        self.contexts: dict[int, Context] = {}
        self.files: dict[int, File] = {}
        self.waiters: list[Access] = []
        self.observed: list[Observation] = []
        self.born: dict[int, int] = {}  # of the last fork: which context has which child
        # What the kernel is free to do: in which order threads run that are woken at once, and whether mappings are
        # merged before. A test does only what has the same result either way.
        self.last_first = False
        self.merges = False

    def see(self, what: str, who: int, *details: Any) -> None:
        self.observed.append((what, who, *details))

    def take(self) -> list[Observation]:
        """What was to be seen since the last time."""
        seen, self.observed = self.observed, []
        return seen

    # --- accesses -------------------------------------------------------------------------------------------------

    def run(self, access: Access) -> None:
        """Let a thread run until it is through, waits, or dies of it."""
        found = self.reach(access.space, access.page, access.write)
        if isinstance(found, Trap):
            if not found.context.has(Feature.SIGBUS) and not (
                access.by_kernel and found.context.user_mode_only
            ):
                self._wait(access, found)
                return
            # Nobody is asked: the feature wants it so, or this userfaultfd does not see the kernel's accesses.
            found = signal.SIGBUS
        if isinstance(found, signal.Signals):
            if access.by_kernel:
                self.see("finished", access.space.number, access.number, errno.EFAULT)
            else:
                self.die(access.space, int(found))
            return
        end = access.offset + access.length
        if access.data is None:
            self.see("finished", access.space.number, access.number, found[access.offset : end])
        else:
            self._store(access.space, access.page, found[: access.offset] + access.data + found[end:])
            self.see("finished", access.space.number, access.number, access.data)

    def _wait(self, access: Access, trap: Trap) -> None:
        access.waits_for = trap.context
        self.waiters.append(access)
        address = access.page * PAGE
        if trap.context.has(Feature.EXACT_ADDRESS):
            address += access.offset
        thread_id = access.thread_id if trap.context.has(Feature.THREAD_ID) else 0
        self.see("fault", trap.context.number, trap.kind, access.write, address, thread_id)

    def reach(self, space: Space, page: int, write: bool) -> bytes | Trap | signal.Signals:
        """Do what processor and kernel do until a page can be read or written; return what is in it."""
        while True:
            vma = space.vma(page)
            if vma is None or not vma.allows(write):
                return signal.SIGSEGV
            found = space.pages.get(page)
            if found is None or found.state is State.MARK:
                stop = self.bring(space, vma, page, write)
                if stop is not None:
                    return stop
            elif found.state is State.POISON:
                return signal.SIGBUS
            elif found.state is State.GUARD:
                return signal.SIGSEGV
            elif found.bit and vma.mode & RWP:
                if not vma.has(Feature.RWP_ASYNC):
                    assert vma.context is not None
                    return Trap(vma.context, FaultKind.READ_WRITE_PROTECT)
                space.pages[page] = replace(found, bit=False)
            elif found.bit and vma.mode & WP and write:
                if not vma.has(Feature.WP_ASYNC):
                    assert vma.context is not None
                    return Trap(vma.context, FaultKind.WRITE_PROTECT)
                space.pages[page] = replace(found, bit=False)
            else:
                if write:
                    self._own(space, vma, page, found)
                return self.content(space, page)

    def bring(self, space: Space, vma: Vma, page: int, write: bool) -> Trap | signal.Signals | None:
        """Have a page where there is none, as a fault does. A mark makes it write-protected."""
        marked = page in space.pages
        if write and not vma.shared:
            vma.anonymous = True  # even if it is trapped next
        if vma.file is None:
            if vma.mode & MISSING:
                assert vma.context is not None
                return Trap(vma.context, FaultKind.MISSING)
            space.pages[page] = Page(State.OWN, ZEROS, marked) if write else Page(State.ZERO, bit=marked)
            return None
        index = vma.index(page)
        if not write and not vma.mode & (WP | MINOR | RWP):
            self._map_around(space, vma, page)
            if page in space.pages:
                return None
        if vma.beyond(page):
            return signal.SIGBUS
        if index in vma.file.cache:
            # The file's page is there, whoever filled it, and only this mapping lacks it.
            if vma.mode & MINOR:
                assert vma.context is not None
                return Trap(vma.context, FaultKind.MINOR)
        elif vma.mode & MISSING:
            assert vma.context is not None
            return Trap(vma.context, FaultKind.MISSING)
        # A hole is filled with zeros in the file, even by a read, even for a private mapping.
        vma.file.use(index)
        if write and not vma.shared:
            space.pages[page] = Page(State.OWN, vma.file.cache[index], marked)
        else:
            space.pages[page] = Page(State.FILE, bit=marked)
        return None

    def _map_around(self, space: Space, vma: Vma, page: int) -> None:
        """Map what is in the page cache around a page that is read: nobody asked, nobody is told."""
        assert vma.file is not None
        first = max(page - page % FAULT_AROUND, vma.start)
        for near in range(first, min(first + FAULT_AROUND, vma.end)):
            index = vma.index(near)
            if near not in space.pages and index in vma.file.cache and index not in vma.file.unwritten:
                space.pages[near] = Page(State.FILE)

    def _own(self, space: Space, vma: Vma, page: int, found: Page) -> None:
        """Make a present page one that this mapping may write."""
        if not vma.shared:
            vma.anonymous = True
            space.pages[page] = Page(State.OWN, self.content(space, page), found.bit)

    def content(self, space: Space, page: int) -> bytes:
        """What is in a present page."""
        found = space.pages[page]
        if found.state is State.FILE:
            vma = space.vma(page)
            assert vma is not None
            assert vma.file is not None
            return vma.file.cache[vma.index(page)]
        return found.data if found.state is State.OWN else ZEROS

    def _store(self, space: Space, page: int, data: bytes) -> None:
        found = space.pages[page]
        if found.state is State.FILE:
            vma = space.vma(page)
            assert vma is not None
            assert vma.file is not None
            vma.file.cache[vma.index(page)] = data
        else:
            space.pages[page] = replace(found, data=data)

    # --- waking and dying -----------------------------------------------------------------------------------------

    def wake(self, context: Context, first: int, count: int) -> None:
        """Have those who wait in the range try again, whatever they wait for.

        Only those of this context, wherever the memory is by now. Who finds nothing resolved makes a new message.
        """
        woken = [w for w in self.waiters if w.waits_for is context and first <= w.page < first + count]
        self.waiters = [w for w in self.waiters if w not in woken]
        for access in reversed(woken) if self.last_first else woken:
            if access.space.alive:
                self.run(access)

    def die(self, space: Space, number: int) -> None:
        """End a process by a signal, or (0) because it wants to."""
        space.alive = False
        self.waiters = [w for w in self.waiters if w.space is not space]
        space.vmas.clear()
        space.pages.clear()
        self.see("died", space.number, number)

    # --- looking at it --------------------------------------------------------------------------------------------

    def snapshot(self) -> Any:
        """All of the state in plain values that can be compared."""
        return (
            [(space.alive, sorted(space.pages.items())) for space in self.spaces.values()],
            [(file.cache, file.unwritten) for file in self.files.values()],
            sorted((w.number, w.page) for w in self.waiters),
            sorted(map(repr, self.observed)),
        )
