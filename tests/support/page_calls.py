"""The requests of userfaultfd and the calls that change memory, on the model of `page_model`.

Each method changes the model as the kernel changes memory, tells `World.see` what threads and userfaultfds get to see
of it, and returns the answer: an error number (0: none), for the fill requests an `Outcome`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import replace

from support.page_model import (
    MINOR,
    NO_MODE,
    PAGE,
    PROTECTIONS,
    RWP,
    WP,
    ZEROS,
    Context,
    File,
    Page,
    Space,
    State,
    Trap,
    Vma,
    World,
)
from userfault.kernel import Feature, Outcome, RegisterMode
from userfault.kernel.abi import Operation, PageCategory
from userfault.kernel.mapping import MemoryKind, Protection

__all__ = ["PageModel"]

# Puts something at a page of a mapping and returns 0, or says why not.
Put = Callable[[Vma, int, int], int]


class PageModel(World):
    """A world in which one can do everything that the tests do."""

    # --- userfaultfd: registering -------------------------------------------------------------------------------

    def register(self, context: Context, first: int, count: int, mode: RegisterMode) -> int | Operation:
        """UFFDIO_REGISTER: nothing is registered if it fails; holes in the range are passed over.

        Pages that are there are not touched.
        """
        space = context.space
        if not space.alive:
            return errno.ENOMEM
        if not space.within(first, count):
            return errno.EINVAL
        for vma in space.within(first, count):
            if mode & MINOR and vma.file is None:
                return errno.EINVAL
            if mode & RWP and vma.protection is Protection.NONE:
                return errno.EINVAL
            if vma.context not in (None, context):
                return errno.EBUSY
            if self.release.keeps_protection and vma.mode & PROTECTIONS & ~mode:
                return errno.EBUSY
        for vma in space.split(first, count):
            # The new mode replaces the old one, unless that has all of it.
            if vma.mode & mode != mode:
                vma.mode = mode
            vma.context = context
        offered = Operation.WAKE | Operation.COPY | Operation.ZEROPAGE
        offered |= Operation.POISON if Feature.POISON in self.release.features else 0
        offered |= Operation.MOVE if Feature.MOVE in self.release.features else 0
        offered |= Operation.WRITEPROTECT if mode & WP else 0
        offered |= Operation.CONTINUE if mode & MINOR else 0
        offered |= Operation.RWPROTECT if mode & RWP else 0
        return offered

    def unregister(self, context: Context, first: int, count: int) -> int:
        """UFFDIO_UNREGISTER and UFFDIO_WAKE: protection ends, poison stays, all waiters of the context are woken."""
        space = context.space
        if not space.alive:
            return errno.ENOMEM
        if not space.within(first, count):
            return errno.EINVAL
        if not self.release.unregisters_others:
            for vma in space.within(first, count):
                if vma.context not in (None, context):
                    return errno.EINVAL
        for vma in space.split(first, count):
            self._forget(space, vma)
        if self.merges:
            space.merge()
        self.wake(context, first, count)
        return 0

    def _forget(self, space: Space, vma: Vma) -> None:
        """Make a mapping one that is not registered."""
        if vma.mode & PROTECTIONS:
            for page in range(vma.start, vma.end):
                self._unprotect(space, page)
        vma.context, vma.mode = None, NO_MODE

    def close(self, context: Context) -> None:
        """Close the last descriptor: everything is unregistered, and who waits finds ordinary memory."""
        context.closed = True
        for vma in context.space.vmas:
            if vma.context is context:
                self._forget(context.space, vma)
        if self.merges:
            context.space.merge()
        self.wake(context, 0, 1 << 64)

    # --- userfaultfd: filling -----------------------------------------------------------------------------------

    def copy(self, context: Context, first: int, data: list[bytes], *, wake: bool, protect: bool) -> Outcome:
        """UFFDIO_COPY."""

        def put(vma: Vma, page: int, at: int) -> int:
            return self._place(context.space, vma, page, data[at], protect=protect)

        return self._fill(context, first, len(data), put, wake=wake, protect=protect)

    def zeropage(self, context: Context, first: int, count: int, *, wake: bool) -> Outcome:
        """UFFDIO_ZEROPAGE: the page of zeros; in a shared mapping, which has none, a page of the file."""

        def put(vma: Vma, page: int, at: int) -> int:
            del at
            if vma.shared:
                return self._place(context.space, vma, page, ZEROS, protect=False)
            if vma.beyond(page):
                return errno.EFAULT
            if page in context.space.pages:  # a marker, too
                return errno.EEXIST
            context.space.pages[page] = Page(State.ZERO)
            return 0

        return self._fill(context, first, count, put, wake=wake)

    def continue_(self, context: Context, first: int, count: int, *, wake: bool, protect: bool) -> Outcome:
        """UFFDIO_CONTINUE: map what is in the page cache."""

        def put(vma: Vma, page: int, at: int) -> int:
            del at
            assert vma.file is not None
            if vma.beyond(page):
                return self.release.beyond_continue
            if vma.index(page) not in vma.file.cache:
                return errno.EFAULT
            if self._occupied(context.space, page):
                vma.file.use(vma.index(page))
                return errno.EEXIST
            vma.file.use(vma.index(page))
            context.space.pages[page] = Page(State.FILE, bit=protect)
            return 0

        if protect and not self.release.continue_protects:
            return Outcome(0, errno.EINVAL)
        return self._fill(context, first, count, put, wake=wake, protect=protect, of_cache=True)

    def poison(self, context: Context, first: int, count: int, *, wake: bool) -> Outcome:
        """UFFDIO_POISON: what is not there will not come. A file's page may be in the page cache."""

        def put(vma: Vma, page: int, at: int) -> int:
            del at
            if vma.beyond(page):
                return errno.EFAULT
            if page in context.space.pages:
                return errno.EEXIST
            context.space.pages[page] = Page(State.POISON)
            return 0

        if Feature.POISON not in self.release.features:
            return Outcome(0, errno.EINVAL)
        return self._fill(context, first, count, put, wake=wake)

    def _fill(
        self,
        context: Context,
        first: int,
        count: int,
        put: Put,
        *,
        wake: bool,
        protect: bool = False,
        of_cache: bool = False,
    ) -> Outcome:
        """Fill page by page up to the first that cannot be filled.

        The range must lie in one mapping that is registered, in any mode, with any context of the process.
        """
        space = context.space
        if not space.alive:
            return Outcome(0, errno.ESRCH)
        vma = space.vma(first)
        if vma is not None and not vma.shared:
            vma.anonymous = True  # before anything else is looked at
        if vma is None or vma.context is None or vma.end < first + count:
            return Outcome(0, errno.ENOENT)
        if (protect and not vma.mode & WP) or (of_cache and vma.file is None):
            return Outcome(0, errno.EINVAL)
        done, error = 0, 0
        while done < count and not error:
            error = put(vma, first + done, done)
            done += not error
        return self._filled(context, first, done, error, wake=wake)

    def _filled(self, context: Context, first: int, done: int, error: int, *, wake: bool) -> Outcome:
        """Wake those whose page was filled. After partial progress the error itself comes with the next call."""
        if done and wake:
            self.wake(context, first, done)
        return Outcome(done * PAGE, errno.EAGAIN if done and error else error)

    def _place(self, space: Space, vma: Vma, page: int, data: bytes, *, protect: bool) -> int:
        """Put a new page in: for a shared mapping into the file, for a private one hiding what the file has."""
        if vma.beyond(page):
            return self.release.beyond_copy
        if vma.shared:
            assert vma.file is not None
            index = vma.index(page)
            if index in vma.file.cache or self._occupied(space, page):
                return errno.EEXIST
            vma.file.cache[index] = data
            space.pages[page] = Page(State.FILE, bit=protect)
            return 0
        if self._occupied(space, page):
            return errno.EEXIST
        space.pages[page] = Page(State.OWN, data, protect)
        return 0

    def _occupied(self, space: Space, page: int) -> bool:
        """Whether a new page may not go there. Markers are overwritten: write-protection, poison and (once) guards."""
        found = space.pages.get(page)
        if found is None or found.state in (State.MARK, State.POISON):
            return False
        return found.state is not State.GUARD or not self.release.copies_over_guards

    def move(
        self, context: Context, first: int, source: int, count: int, *, wake: bool, holes: bool
    ) -> Outcome:
        """UFFDIO_MOVE: private anonymous memory only, and no page that a forked process shares."""
        space = context.space
        if Feature.MOVE not in self.release.features:
            return Outcome(0, errno.EINVAL)
        into, out_of = space.vma(first), space.vma(source)
        if into is not None and not into.shared:
            into.anonymous = True
        if into is None or out_of is None:
            return Outcome(0, errno.ENOENT)
        if (
            MemoryKind.SHMEM in (into.kind, out_of.kind)
            or into.end < first + count
            or out_of.end < source + count
            or into.protection != out_of.protection
            or not into.allows(write=True)
            or into.context is not context
            or not into.kind is out_of.kind is MemoryKind.ANONYMOUS
        ):
            return Outcome(0, errno.EINVAL)
        done, error = 0, 0
        while done < count and not error:
            error = self._move_page(space, into, first + done, source + done, holes=holes)
            done += not error
        return self._filled(context, first, done, error, wake=wake)

    def _move_page(self, space: Space, into: Vma, target: int, source: int, *, holes: bool) -> int:
        page = space.pages.get(source)
        if target in space.pages:
            return errno.EEXIST
        if page is None:
            return 0 if holes else errno.ENOENT
        if not page.present:
            return errno.EFAULT
        if page.state is State.OWN and not page.exclusive:
            return errno.EBUSY
        del space.pages[source]
        space.pages[target] = replace(page, bit=bool(into.mode & RWP))
        return 0

    # --- userfaultfd: protection --------------------------------------------------------------------------------

    def writeprotect(self, context: Context, first: int, count: int, *, protect: bool, wake: bool) -> int:
        """UFFDIO_WRITEPROTECT: mapping by mapping, up to the first that is not registered for WP."""
        space = context.space
        if not space.alive:
            return errno.ESRCH
        if not space.within(first, count):
            return errno.ENOENT
        for vma in space.within(first, count):
            if not vma.mode & WP:
                return errno.ENOENT
            for page in self._cut(vma, first, count):
                if protect:
                    self._write_protect(space, vma, page)
                else:
                    self._unprotect(space, page)
        if not protect and wake:
            self.wake(context, first, count)
        return 0

    def rwprotect(self, context: Context, first: int, count: int, *, protect: bool, wake: bool) -> int:
        """UFFDIO_RWPROTECT: all mappings or none, and only pages that are there."""
        space = context.space
        if not space.alive:
            return errno.ESRCH
        vmas = space.within(first, count)
        if not vmas or not all(vma.mode & RWP for vma in vmas):
            return errno.ENOENT
        for vma in vmas:
            for page in self._cut(vma, first, count):
                found = space.pages.get(page)
                if found is not None and found.present:
                    space.pages[page] = replace(found, bit=protect)
        if not protect and wake:
            self.wake(context, first, count)
        return 0

    def set_mode(self, context: Context, *, asynchronous: bool) -> int:
        """UFFDIO_SET_MODE with RWP_ASYNC: switching it on wakes everybody."""
        if not context.space.alive:
            return errno.ESRCH
        if asynchronous:
            context.features |= Feature.RWP_ASYNC
            self.wake(context, 0, 1 << 64)
        else:
            context.features &= ~Feature.RWP_ASYNC
        return 0

    def _write_protect(self, space: Space, vma: Vma, page: int) -> None:
        found = space.pages.get(page)
        if found is None:
            if vma.marks_empty:
                space.pages[page] = Page(State.MARK)
        elif found.present:
            space.pages[page] = replace(found, bit=True)

    def _unprotect(self, space: Space, page: int) -> None:
        found = space.pages.get(page)
        if found is not None and found.state is State.MARK:
            del space.pages[page]
        elif found is not None and found.present:
            space.pages[page] = replace(found, bit=False)

    @staticmethod
    def _cut(vma: Vma, first: int, count: int) -> Iterable[int]:
        return range(max(vma.start, first), min(vma.end, first + count))

    # --- PAGEMAP_SCAN ---------------------------------------------------------------------------------------------

    def categories(self, space: Space, page: int) -> PageCategory:
        """What PAGEMAP_SCAN says of a page, but for WRITTEN where WP_ASYNC does not watch."""
        vma, found = space.vma(page), space.pages.get(page)
        category = PageCategory(0)
        if vma is None:
            return category
        if vma.mode & WP and vma.has(Feature.WP_ASYNC):
            category |= PageCategory.WPALLOWED
            # What nobody protected counts as written, empty pages too: the content may have gone.
            if found is None or not (found.bit or found.state is State.MARK):
                category |= PageCategory.WRITTEN
        if found is not None:
            category |= PageCategory.PRESENT if found.present else PageCategory.SWAPPED
            if found.state is State.FILE:
                category |= PageCategory.FILE
            if found.state is State.ZERO:
                category |= PageCategory.PFNZERO
        return category

    def scan_and_protect(self, space: Space, first: int, count: int) -> set[int]:
        """PAGEMAP_SCAN with PM_SCAN_WP_MATCHING for WRITTEN: return those written, and protect them.

        Poison and guards get the bit as well, where UFFDIO_WRITEPROTECT passes them over. It means nothing but that
        they are not reported again, and nothing takes it away.
        """
        written = {
            page
            for page in range(first, first + count)
            if PageCategory.WRITTEN in self.categories(space, page)
        }
        for page in written:
            found = space.pages.get(page)
            space.pages[page] = Page(State.MARK) if found is None else replace(found, bit=True)
        return written

    # --- memory calls ---------------------------------------------------------------------------------------------

    def map(
        self, space: Space, first: int, count: int, kind: MemoryKind, file: File | None, offset: int
    ) -> int:
        """Map memory where nothing is mapped."""
        protection = Protection.READ | Protection.WRITE
        space.insert(Vma(first, first + count, kind, protection, file, offset))
        return 0

    def unmap(self, space: Space, first: int, count: int) -> int:
        """Call munmap: who waits there keeps waiting, until somebody wakes him to his death.

        UNMAP events have the whole range, one for each context that has a part of it.
        """
        vmas = space.split(first, count)
        for context in self._contexts(vmas, Feature.EVENT_UNMAP):
            self.see("unmap", context.number, first * PAGE, (first + count) * PAGE)
        for vma in vmas:
            space.vmas.remove(vma)
            for page in range(vma.start, vma.end):
                space.pages.pop(page, None)
        return 0

    @staticmethod
    def _contexts(vmas: list[Vma], feature: Feature) -> list[Context]:
        found: dict[Context, None] = {}
        for vma in vmas:
            if vma.context is not None and vma.has(feature):
                found[vma.context] = None
        return list(found)

    def protect(self, space: Space, first: int, count: int, protection: Protection) -> int:
        """Call mprotect: up to the first hole. It has nothing to do with userfaultfd's protection."""
        for vma in space.split(first, count):
            if not space.whole(first, vma.start - first):
                break
            vma.protection = protection
        return 0 if space.whole(first, count) else errno.ENOMEM

    def drop(self, space: Space, first: int, count: int) -> int:
        """MADV_DONTNEED: private pages are gone, those of files only unmapped; holes are told at the end.

        Who waits there is not woken. REMOVE events come first, one for each registered mapping.
        """
        for vma in space.within(first, count):
            pages = self._cut(vma, first, count)
            self._tell_remove(vma, pages)
            for page in pages:
                self._zap(space, vma, page)
        return 0 if space.whole(first, count) else errno.ENOMEM

    def _tell_remove(self, vma: Vma, pages: Iterable[int]) -> None:
        if vma.context is not None and vma.has(Feature.EVENT_REMOVE):
            self.see("remove", vma.context.number, min(pages) * PAGE, (max(pages) + 1) * PAGE)

    def _zap(self, space: Space, vma: Vma, page: int, *, of_file: bool = False) -> None:
        """Take a page out of a page table; with `of_file` because the file gives it up.

        In files write-protection outlives the page, as a mark. Guards stay.
        """
        found = space.pages.get(page)
        if found is None or found.state is State.GUARD:
            return
        if of_file and found.state in (State.OWN, State.POISON):
            return  # not the file's
        if found.state is State.MARK and vma.file is not None:
            return
        del space.pages[page]
        if found.bit and vma.mode & WP and vma.file is not None:
            space.pages[page] = Page(State.MARK)

    def remove(self, space: Space, first: int, count: int) -> int:
        """MADV_REMOVE: a hole in the file, through a shared mapping."""
        for vma in space.within(first, count):
            if vma.file is None:
                return errno.EINVAL
            if not vma.shared:
                return errno.EACCES
            pages = self._cut(vma, first, count)
            self._tell_remove(vma, pages)
            self.punch(vma.file, vma.index(min(pages)), len(range(min(pages), max(pages) + 1)))
        return 0 if space.whole(first, count) else errno.ENOMEM

    def punch(self, file: File, index: int, count: int) -> None:
        """Make a hole in a file: all mappings of it, in all processes, lose the pages, and nobody is told."""
        for space in self.spaces.values():
            for vma in space.vmas:
                for page in range(vma.start, vma.end):
                    if vma.file is file and index <= vma.index(page) < index + count:
                        self._zap(space, vma, page, of_file=True)
        for at in range(index, index + count):
            file.drop(at)

    def guard(self, space: Space, first: int, count: int) -> int:
        """MADV_GUARD_INSTALL: whatever was there is gone, userfaultfd's poison and marks too, and nobody is told."""
        for vma in space.within(first, count):
            if vma.kind not in self.release.guards:
                return errno.EINVAL
            vma.anonymous = True
            for page in self._cut(vma, first, count):
                space.pages[page] = Page(State.GUARD)
        return 0 if space.whole(first, count) else errno.ENOMEM

    def unguard(self, space: Space, first: int, count: int) -> int:
        """MADV_GUARD_REMOVE."""
        for vma in space.within(first, count):
            if vma.kind not in self.release.guards:
                return errno.EINVAL
            for page in self._cut(vma, first, count):
                found = space.pages.get(page)
                if found is not None and found.state is State.GUARD:
                    del space.pages[page]
        return 0 if space.whole(first, count) else errno.ENOMEM

    def remap(self, space: Space, first: int, count: int, length: int, to: int | None, *, keep: bool) -> int:
        """Call mremap: to resize in place, or (`to`) to move; `keep` is MREMAP_DONTUNMAP.

        Moved memory stays registered if its context has EVENT_REMAP; without, it is ordinary memory at the new
        place. What was waited for at the old place is waited for there.
        """
        if to is not None:
            self.unmap(space, to, length)
        if length < count:
            self.unmap(space, first + length, count - length)
            count = length
        vma = space.vma(first)
        if vma is None:
            return errno.EFAULT
        if to is None and length == count:
            return 0
        if vma.end < first + count:
            return errno.EFAULT
        if to is not None:
            self._move_mapping(space, vma, first, count, length, to, keep=keep)
            return 0
        if vma.end != first + count or space.within(vma.end, length - count):
            return errno.ENOMEM
        vma.end = first + length
        return 0

    def _move_mapping(
        self, space: Space, vma: Vma, first: int, count: int, length: int, to: int, *, keep: bool
    ) -> None:
        whole = (vma.start, vma.end) == (first, first + count)
        (vma,) = space.split(first, count)
        moved = replace(vma, start=to, end=to + length)
        space.insert(moved)
        for page in range(first, first + count):
            if page in space.pages:
                space.pages[page - first + to] = space.pages.pop(page)
        if vma.has(Feature.EVENT_REMAP):
            assert vma.context is not None
            self.see("remap", vma.context.number, first * PAGE, to * PAGE, count * PAGE)
        elif vma.context is not None:
            self._forget(space, moved)
            for page in range(to, to + count):
                if page in space.pages:
                    space.pages[page] = replace(space.pages[page], bit=False)
        if keep:
            vma.anonymous &= not whole
        else:
            self.unmap(space, first, count)

    # --- files ----------------------------------------------------------------------------------------------------

    def write_file(self, file: File, index: int, data: bytes) -> None:
        """Call write(2): no page fault, so no userfaultfd is told, and every mapping shows it."""
        file.use(index)
        file.cache[index] = data

    def allocate(self, file: File, index: int, count: int) -> None:
        """Call fallocate: zeros in the page cache. The second time they count as written."""
        for at in range(index, index + count):
            if at in file.cache:
                file.use(at)
            else:
                file.cache[at] = ZEROS
                file.unwritten.add(at)

    # --- processes ------------------------------------------------------------------------------------------------

    def populate(self, space: Space, first: int, count: int, *, write: bool) -> int | None:
        """MADV_POPULATE_READ or _WRITE: an access to each page by the kernel. None: it would wait in a fault."""
        for page in range(first, first + count):
            vma = space.vma(page)
            if vma is None:
                return errno.ENOMEM
            if not vma.allows(write):
                return errno.EINVAL
            found = self.reach(space, page, write)
            if isinstance(found, Trap):
                context = found.context
                if not (context.has(Feature.SIGBUS) or context.user_mode_only):
                    return None
                return errno.EFAULT
            if not isinstance(found, bytes):
                page_found = space.pages.get(page)
                poisoned = page_found is not None and page_found.state is State.POISON
                return 133 if poisoned else errno.EFAULT  # EHWPOISON
        return 0

    def fork(self, space: Space) -> Space:
        """Fork a process. With EVENT_FORK the child's memory is registered, with contexts of its own.

        Without, it is ordinary memory, and no longer protected. Page tables are copied only where that is needed:
        what is merely mapped from a file is left to the child's own faults, poison included.
        """
        child = Space(max(self.spaces) + 1)
        self.born.clear()
        self.spaces[child.number] = child
        contexts: dict[Context, Context] = {}
        for context in self._contexts(space.vmas, Feature.EVENT_FORK):
            number = max(self.contexts) + 1
            contexts[context] = Context(number, child, context.features, context.user_mode_only)
            self.contexts[number] = contexts[context]
            self.born[context.number] = number
            self.see("fork", context.number)
        for vma in space.vmas:
            context = contexts.get(vma.context) if vma.context is not None else None
            copied = replace(vma, context=context, mode=vma.mode if context is not None else NO_MODE)
            child.vmas.append(copied)
            if vma.anonymous or copied.mode & PROTECTIONS:
                for page in range(vma.start, vma.end):
                    self._fork_page(space, child, copied, page)
        return child

    def _fork_page(self, space: Space, child: Space, vma: Vma, page: int) -> None:
        found = space.pages.get(page)
        if found is None or (found.state is State.MARK and not vma.mode & WP):
            return
        if found.state is State.OWN:
            found = space.pages[page] = replace(found, exclusive=False)
        child.pages[page] = replace(found, bit=found.bit and found.present and bool(vma.mode & PROTECTIONS))
