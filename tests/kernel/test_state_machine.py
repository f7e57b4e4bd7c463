"""Random sequences of everything that can be done to registered memory, on this kernel and on a model of it.

The model (`support.page_model`, `support.page_calls`) says what a step will be answered, which threads and
userfaultfds will see what of it, and how every page is afterwards; all of it is compared after each step.
`pytest tests/kernel/test_state_machine.py --hypothesis-profile=soak` tries for hours.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import operator
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from support.kernel import DEADLINE_S, Link, Subject
from support.page_calls import PageModel
from support.page_model import PAGE, Access, Context, File, Observation, Page, Space, State, Trap
from support.page_subject import serve_commands
from support.page_trials import this_release
from userfault.kernel import Feature, RegisterMode, Userfaultfd, events, pagemap
from userfault.kernel.abi import PageCategory, PagemapBit
from userfault.kernel.errors import UffdError
from userfault.kernel.events import FaultKind
from userfault.kernel.mapping import Advice, MemoryKind, Protection

# All memory of a test lies here, where no allocation comes by itself, and where one page table holds it.
ARENA = 0x20_0000_0000 // PAGE
ARENA_PAGES = 48
FILES, FILE_PAGES = 2, 8
KINDS = [MemoryKind.ANONYMOUS, MemoryKind.SHMEM, MemoryKind.PRIVATE_SHMEM]
COMPARED = (
    PagemapBit.PRESENT | PagemapBit.SWAPPED | PagemapBit.FILE | PagemapBit.UFFD_PROTECTED | PagemapBit.GUARD
)
CATEGORIES = (
    PageCategory.PRESENT
    | PageCategory.SWAPPED
    | PageCategory.FILE
    | PageCategory.PFNZERO
    | PageCategory.WPALLOWED
    | PageCategory.WRITTEN
)


WATCHED = PageCategory.WPALLOWED | PageCategory.WRITTEN
WAITERS = 2  # at most; what comes of more depends on the order in which they run
UNANSWERED = ("exit", "touch")


@dataclass(frozen=True)
class Span:
    """Pages of one of the mappings, by numbers that always mean something."""

    mapping: int
    first: int
    count: int
    spill: bool  # not cut at the mapping's end


spans = st.builds(
    Span,
    st.integers(0, 5),
    st.sampled_from([0, 0, 0, 1, 2, 3]),
    st.sampled_from([1, 1, 2, 3, 6]),
    st.sampled_from([False] * 7 + [True]),
)
numbers = st.integers(0, 7)
places = st.sampled_from([0, 48, PAGE - 16])
rarely = st.sampled_from([False, False, False, True])
wakes = st.sampled_from([True, True, True, False])
# More than one more often than not; WP and RWP exclude each other.
modes = st.sampled_from(
    [
        RegisterMode.MISSING,
        RegisterMode.WP,
        RegisterMode.MINOR,
        RegisterMode.RWP,
        RegisterMode.MISSING | RegisterMode.WP,
        RegisterMode.MISSING | RegisterMode.MINOR,
        RegisterMode.MISSING | RegisterMode.RWP,
        RegisterMode.MINOR | RegisterMode.WP,
        RegisterMode.MINOR | RegisterMode.RWP,
        RegisterMode.MISSING | RegisterMode.MINOR | RegisterMode.WP,
        RegisterMode.MISSING | RegisterMode.MINOR | RegisterMode.RWP,
    ]
)


features = st.lists(
    st.sampled_from(
        [
            Feature.WP_UNPOPULATED,
            Feature.WP_ASYNC,
            Feature.EVENT_FORK,
            Feature.EVENT_REMAP,
            Feature.EVENT_REMOVE,
            Feature.EVENT_UNMAP,
            Feature.THREAD_ID,
            Feature.EXACT_ADDRESS,
            Feature.RWP,
            Feature.RWP_ASYNC,
        ]
    ),
    max_size=5,
    unique=True,
)


@dataclass
class Handle:
    """A `Mapping` of a process: its place, and the pages of it that were not unmapped."""

    first: int
    count: int
    kind: MemoryKind
    owned: set[int]

    @property
    def whole(self) -> bool:
        return len(self.owned) == self.count


class Actor:
    """A process."""

    def __init__(self, number: int, link: Link, handles: dict[int, Handle], parent: Actor | None) -> None:
        self.number = number
        self.link = link
        self.pid, self.threads = link.receive()
        self.handles = handles
        self.parent = parent
        self.pagemap = pagemap.Scanner(self.pid)

    def close(self) -> None:
        self.pagemap.close()
        self.link.close()


Predict = Callable[[PageModel], Any]


class Pages(RuleBasedStateMachine):
    """The kernel and the model, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.release = this_release()
        self.model = PageModel(self.release)
        self.fds: list[int] = []
        self.actors: dict[int, Actor] = {}
        self.uffds: dict[int, Userfaultfd] = {}
        self.subjects: list[Subject] = []
        self.count = 0  # makes contents and numbers that come once
        self.given: list[int] = []  # descriptors that came with an answer
        self.broken = False

    # --- the two sides --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a process, with nothing mapped."""
        for uffd in self.uffds.values():
            uffd.close()  # the new process must not inherit it
        self.uffds.clear()
        for context in self.model.contexts.values():
            context.closed = True
        subject = Subject(serve_commands, self.fds)
        self.subjects.append(subject)
        number = len(self.model.spaces)
        self.model.spaces[number] = Space(number)
        self.actors[number] = Actor(number, subject, {}, None)

    def step(
        self,
        predict: Predict,
        perform: Callable[[], Any] | None = None,
        *,
        ask: tuple[Any, ...] = (),
        fds: tuple[int, ...] = (),
        vmas: bool = False,
        deadly: bool = False,
    ) -> bool:
        """Do one thing on both sides and compare; False if it was left out.

        `perform` does it here; `ask` is an actor, a command and its arguments for the actor to do. What would end a
        process is done only if it is meant to be `deadly`; what depends on the order in which threads run is not.
        """
        if not self.sensible(predict, deadly=deadly):
            return False
        try:
            answer = predict(self.model)
            expected = self.model.take()
            if ask:
                actor, name, *arguments = ask
                actor.link.send((name, tuple(arguments)), fds)
                if name not in UNANSWERED:
                    expected.append(("answer", actor.number, told(answer)))
            elif perform is not None:
                found = answered(perform)
                assert found == (answer or 0), f"answer {found}, and the model says {answer}"
            self.settle(expected)
            self.compare(vmas=vmas)
        except BaseException:
            self.broken = True
            raise
        return True

    def sensible(self, predict: Predict, *, deadly: bool) -> bool:
        if not self.model.waiters:
            return True
        ends = []
        for last_first, merges in itertools.product((False, True), repeat=2):
            trial = copy.deepcopy(self.model)
            trial.last_first, trial.merges = last_first, merges
            predict(trial)
            if not deadly and any(what == "died" for what, *_ in trial.observed):
                return False
            ends.append(trial.snapshot())
        return all(end == ends[0] for end in ends)

    def settle(self, expected: list[Observation]) -> None:
        """Wait until everything expected was seen, and nothing else."""
        left = list(expected)
        while left:
            found = self.look(DEADLINE_S)
            assert found, f"did not come: {left}"
            for what in found:
                assert what in left, f"unexpected: {what}; the model says {left}"
                left.remove(what)
        found = self.look(0)
        assert not found, f"unexpected: {found}; of {expected} everything was there"

    def look(self, seconds: float) -> list[Observation]:
        """What is to be seen now."""
        poller = select.poll()
        sources: dict[int, Any] = {}
        for actor in self.actors.values():
            sources[actor.link.fileno()] = actor
        for number, uffd in self.uffds.items():
            sources[uffd.fd] = number
        for fd in sources:
            poller.register(fd, select.POLLIN)
        found: list[Observation] = []
        for fd, _ in poller.poll(seconds * 1000):
            source = sources[fd]
            if isinstance(source, Actor):
                found.append(self.hear(source))
            else:
                found += [self.translate(source, event) for event in self.uffds[source].read_events()]
        return found

    def hear(self, actor: Actor) -> Observation:
        """One message of a process."""
        try:
            (what, *details), fds = actor.link.receive_with_fds()
            self.given += fds
        except EOFError:
            del self.actors[actor.number]
            actor.close()
            return ("died", actor.number, self.status(actor))
        return (what, actor.number, *details)

    def status(self, actor: Actor) -> int:
        for subject in self.subjects:
            if subject.pid == actor.pid:
                return -subject.wait()
        assert actor.parent is not None
        if actor.parent.number not in self.actors:
            return 0
        actor.parent.link.send(("wait", (actor.pid,)))
        what, status = actor.parent.link.receive()
        assert what == "answer"
        return -int(status)

    def translate(self, number: int, event: events.AnyEvent) -> Observation:
        match event:
            case events.PageFault():
                return ("fault", number, event.kind, event.write, event.address, event.thread_id)
            case events.Fork():
                self.uffds[self.model.born[number]] = event.child
                return ("fork", number)
            case events.Remap():
                return ("remap", number, event.source, event.target, event.length)
            case events.Remove():
                return ("remove", number, event.start, event.end)
            case events.Unmap():
                return ("unmap", number, event.start, event.end)
        raise AssertionError(event)

    def compare(self, *, vmas: bool) -> None:
        """Compare how everything is now."""
        model = self.model
        for actor in self.actors.values():
            space = model.spaces[actor.number]
            if vmas:
                flags = pagemap.vm_flags(ARENA * PAGE, ARENA_PAGES * PAGE, pid=actor.pid)
                space.learn([(vma.start // PAGE, vma.end // PAGE, vma.flags) for vma in flags])
            entries = actor.pagemap.entries(ARENA * PAGE, ARENA_PAGES * PAGE)
            for page, entry in enumerate(entries.tolist(), ARENA):
                found = PagemapBit(entry & COMPARED)
                right = space.pages[page].pagemap() if page in space.pages else PagemapBit(0)
                assert found == right, (
                    f"page {page:#x} is {found!r}, and the model has {space.pages.get(page)}"
                )
        for number, uffd in self.uffds.items():
            info = uffd.fdinfo()
            waiters = sum(waiter.waits_for is model.contexts[number] for waiter in model.waiters)
            assert (info.pending, info.total) == (0, waiters)
            assert info.features == model.contexts[number].features
        for file, fd in zip(model.files.values(), self.fds, strict=True):
            for index in range(file.length):
                written = index in file.cache and index not in file.unwritten
                at = index * PAGE
                with_hole = os.lseek(fd, at, os.SEEK_HOLE) == at
                assert with_hole is not written, f"page {index} of file {file.number}: hole {with_hole}"

    # --- choosing -------------------------------------------------------------------------------------------------

    def actor(self, number: int) -> Actor:
        return list(self.actors.values())[number % len(self.actors)]

    def context(self, number: int) -> Context | None:
        """An open userfaultfd."""
        known = [context for context in self.model.contexts.values() if not context.closed]
        return known[number % len(known)] if known else None

    def handle(self, actor: Actor, number: int) -> tuple[int, Handle]:
        key = list(actor.handles)[number % len(actor.handles)]
        return key, actor.handles[key]

    def pages(self, actor: Actor | None, span: Span) -> tuple[int, int]:
        """First page and number of pages."""
        if actor is None or not actor.handles:
            return ARENA + span.first, span.count
        _, handle = self.handle(actor, span.mapping)
        first = handle.first + span.first % handle.count
        last = ARENA + ARENA_PAGES if span.spill else handle.first + handle.count
        return first, min(span.count, last - first)

    def fresh(self) -> int:
        self.count += 1
        return self.count

    def page_of_data(self) -> bytes:
        return (b"%015d " % self.fresh()) * (PAGE // 16)

    @property
    def alive(self) -> bool:
        return bool(self.actors)

    # --- processes and userfaultfds -------------------------------------------------------------------------------

    @initialize(
        first=features,
        second=features,
        kinds=st.permutations(KINDS),
        chosen=st.lists(modes, min_size=3, max_size=3),
    )
    def start(
        self, first: list[Feature], second: list[Feature], kinds: list[MemoryKind], chosen: list[RegisterMode]
    ) -> None:
        for number in range(FILES):
            fd = os.memfd_create("userfault")
            os.ftruncate(fd, FILE_PAGES * PAGE)
            self.fds.append(fd)
            self.model.files[number] = File(number, FILE_PAGES)
        self.begin()
        self.open(0, first)
        self.open(0, second)
        for number, kind in enumerate(kinds):
            self.map(0, kind, 8 * number, 6, 0, number)
            mode = chosen[number]
            if kind is MemoryKind.ANONYMOUS:
                mode &= ~RegisterMode.MINOR
            self.register(6 + number % 2, Span(number, 0, 6, False), mode)

    @precondition(lambda self: not self.alive)
    @rule()
    def start_again(self) -> None:
        self.begin()

    @precondition(lambda self: self.alive and len(self.uffds) < 4)
    @rule(which=numbers, wanted=features, sigbus=rarely)
    def open(self, which: int, wanted: list[Feature], sigbus: bool = False) -> None:
        actor = self.actor(which)
        wanted = [*wanted, Feature.SIGBUS] if sigbus else wanted
        chosen = functools.reduce(operator.or_, wanted, Feature(0)) & self.release.features
        if not self.release.fork_events:
            chosen &= ~Feature.EVENT_FORK
        if not chosen & Feature.RWP:
            chosen &= ~Feature.RWP_ASYNC
        actor.link.send(("open", (int(chosen),)))
        (what, user_mode_only), (fd,) = actor.link.receive_with_fds()
        assert what == "answer"
        if chosen & Feature.WP_ASYNC:
            chosen |= Feature.WP_UNPOPULATED
        number = len(self.model.contexts)
        self.model.contexts[number] = Context(number, self.model.spaces[actor.number], chosen, user_mode_only)
        self.uffds[number] = Userfaultfd.from_fd(fd)
        self.step(lambda model: None)

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, sure=rarely)
    def close(self, which: int, sure: bool) -> None:
        context = self.context(which)
        if context is None or not sure:
            return
        number = context.number
        self.step(
            lambda model: model.close(model.contexts[number]),
            lambda: self.uffds.pop(number).close(),
            vmas=True,
        )

    @precondition(lambda self: self.alive and len(self.actors) < 2)
    @rule(which=numbers, sure=rarely)
    def fork(self, which: int, sure: bool) -> None:
        if not sure:
            return
        actor = self.actor(which)

        def predict(model: PageModel) -> None:
            model.fork(model.spaces[actor.number])

        if not self.step(predict, ask=(actor, "fork")):
            return
        link = Link(socket.socket(fileno=self.given.pop()))
        number = max(self.model.spaces)
        self.actors[number] = Actor(number, link, copy.deepcopy(actor.handles), actor)
        self.step(lambda model: None, vmas=True)

    @precondition(lambda self: len(self.actors) > 1)
    @rule(which=numbers, sure=rarely)
    def exit(self, which: int, sure: bool) -> None:
        if not sure:
            return
        actor = self.actor(which)
        self.step(lambda model: model.die(model.spaces[actor.number], 0), ask=(actor, "exit"), deadly=True)

    # --- requests -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans, mode=modes)
    def register(self, which: int, span: Span, mode: RegisterMode) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        context = self.model.contexts[number]
        if RegisterMode.RWP in mode:
            mode &= ~(RegisterMode.WP if Feature.RWP in context.features else RegisterMode.RWP)
        if not mode:
            mode = RegisterMode.MISSING
        if not self.release.keeps_protection and self.drops_protection(context, first, count, mode):
            return

        def perform() -> Any:
            return self.uffds[number].register(first * PAGE, count * PAGE, mode=mode).operations

        self.step(
            lambda model: model.register(model.contexts[number], first, count, mode), perform, vmas=True
        )

    def drops_protection(self, context: Context, first: int, count: int, mode: RegisterMode) -> bool:
        """Whether registering again would leave protected pages behind in a mapping without WP.

        Up to 7.2 it may: the bits stay, mean nothing, and come to life again with the next registration for WP,
        except of pages that were written meanwhile, which keep the bit and can be written.
        """
        space = context.space
        for vma in space.within(first, count):
            if vma.mode & RegisterMode.WP and vma.mode & mode != mode and not mode & RegisterMode.WP:
                pages = range(max(first, vma.start), min(first + count, vma.end))
                if any(self.protected(space.pages.get(page)) for page in pages):
                    return True
        return False

    @staticmethod
    def protected(page: Page | None) -> bool:
        return page is not None and (page.bit or page.state is State.MARK)

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans)
    def unregister(self, which: int, span: Span) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        self.step(
            lambda model: model.unregister(model.contexts[number], first, count),
            lambda: self.uffds[number].unregister(first * PAGE, count * PAGE),
            vmas=True,
        )

    def target(self, which: int, span: Span) -> tuple[int, int, int] | None:
        """A userfaultfd and a range: mostly that which the range is registered with, sometimes any."""
        if self.actors and which < 6:
            actor = self.actor(which)
            first, count = self.pages(actor, span)
            vma = self.model.spaces[actor.number].vma(first)
            if vma is not None and vma.context is not None:
                return vma.context.number, first, count
        context = self.context(which)
        if context is None:
            return None
        first, count = self.pages(self.actors.get(context.space.number), span)
        return context.number, first, count

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans, wake=wakes, protect=st.booleans(), deadly=numbers)
    def copy(self, which: int, span: Span, wake: bool, protect: bool, deadly: int) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        data = [self.page_of_data() for _ in range(count)]
        self.step(
            lambda model: model.copy(model.contexts[number], first, data, wake=wake, protect=protect),
            lambda: self.uffds[number].try_copy(
                first * PAGE, b"".join(data), wake=wake, write_protect=protect
            ),
            deadly=deadly == 7,
        )

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans, wake=wakes)
    def zeropage(self, which: int, span: Span, wake: bool) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        self.step(
            lambda model: model.zeropage(model.contexts[number], first, count, wake=wake),
            lambda: self.uffds[number].try_zeropage(first * PAGE, count * PAGE, wake=wake),
        )

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans, wake=wakes, protect=st.booleans())
    def continue_(self, which: int, span: Span, wake: bool, protect: bool) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        self.step(
            lambda model: model.continue_(model.contexts[number], first, count, wake=wake, protect=protect),
            lambda: self.uffds[number].try_continue(
                first * PAGE, count * PAGE, wake=wake, write_protect=protect
            ),
        )

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans, wake=wakes, deadly=numbers)
    def poison(self, which: int, span: Span, wake: bool, deadly: int) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        self.step(
            lambda model: model.poison(model.contexts[number], first, count, wake=wake),
            lambda: self.uffds[number].try_poison(first * PAGE, count * PAGE, wake=wake),
            deadly=deadly == 7,
        )

    @precondition(lambda self: self.alive and self.uffds)
    @rule(which=numbers, span=spans, source=spans, wake=wakes, holes=st.booleans())
    def move(self, which: int, span: Span, source: Span, wake: bool, holes: bool) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        actor = self.actors.get(self.model.contexts[number].space.number)
        if actor is None:
            return
        origin, _ = self.pages(actor, source)
        arguments = first * PAGE, origin * PAGE, count * PAGE, wake, holes

        def predict(model: PageModel) -> Any:
            return tuple(model.move(model.contexts[number], first, origin, count, wake=wake, holes=holes))

        self.step(predict, ask=(actor, "move", *arguments), fds=(self.uffds[number].fd,))

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans, protect=st.booleans(), wake=wakes)
    def writeprotect(self, which: int, span: Span, protect: bool, wake: bool) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        self.step(
            lambda model: model.writeprotect(
                model.contexts[number], first, count, protect=protect, wake=wake
            ),
            lambda: self.uffds[number].writeprotect(first * PAGE, count * PAGE, protect=protect, wake=wake),
        )

    @precondition(lambda self: self.uffds and Feature.RWP in self.release.features)
    @rule(which=numbers, span=spans, protect=st.sampled_from([True, True, False]), wake=wakes)
    def rwprotect(self, which: int, span: Span, protect: bool, wake: bool) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        self.step(
            lambda model: model.rwprotect(model.contexts[number], first, count, protect=protect, wake=wake),
            lambda: self.uffds[number].rwprotect(first * PAGE, count * PAGE, protect=protect, wake=wake),
        )

    @precondition(lambda self: any(Feature.RWP in uffd.features for uffd in self.uffds.values()))
    @rule(which=numbers, asynchronous=st.booleans())
    def set_mode(self, which: int, asynchronous: bool) -> None:
        known = [number for number, uffd in self.uffds.items() if Feature.RWP in uffd.features]
        number = known[which % len(known)]
        option = {"enable" if asynchronous else "disable": Feature.RWP_ASYNC}
        self.step(
            lambda model: model.set_mode(model.contexts[number], asynchronous=asynchronous),
            lambda: self.uffds[number].set_mode(**option),
        )

    @precondition(lambda self: self.uffds)
    @rule(which=numbers, span=spans, deadly=numbers)
    def wake(self, which: int, span: Span, deadly: int) -> None:
        chosen = self.target(which, span)
        if chosen is None:
            return
        number, first, count = chosen
        self.step(
            lambda model: model.wake(model.contexts[number], first, count),
            lambda: self.uffds[number].wake(first * PAGE, count * PAGE),
            deadly=deadly == 7,
        )

    @precondition(lambda self: self.model.waiters)
    @rule(which=numbers, protect=st.booleans())
    def serve(self, which: int, protect: bool) -> None:
        """Do for somebody who waits what a handler does."""
        waiter = self.model.waiters[which % len(self.model.waiters)]
        context, page = waiter.waits_for, waiter.page
        assert context is not None
        number = context.number
        uffd = self.uffds[number]
        trial = copy.deepcopy(self.model)
        found = trial.reach(trial.spaces[context.space.number], page, waiter.write)
        if not isinstance(found, Trap) or found.context.number != number:
            self.step(
                lambda model: model.wake(model.contexts[number], page, 1),
                lambda: uffd.wake(page * PAGE, PAGE),
            )
        elif found.kind is FaultKind.MISSING:
            data = self.page_of_data()
            vma = context.space.vma(page)
            protect &= vma is not None and bool(vma.mode & RegisterMode.WP)
            self.step(
                lambda model: model.copy(model.contexts[number], page, [data], wake=True, protect=protect),
                lambda: uffd.try_copy(page * PAGE, data, write_protect=protect),
            )
        elif found.kind is FaultKind.MINOR:
            self.step(
                lambda model: model.continue_(model.contexts[number], page, 1, wake=True, protect=False),
                lambda: uffd.try_continue(page * PAGE, PAGE),
            )
        elif found.kind is FaultKind.WRITE_PROTECT:
            self.step(
                lambda model: model.writeprotect(model.contexts[number], page, 1, protect=False, wake=True),
                lambda: uffd.writeprotect(page * PAGE, PAGE, protect=False),
            )
        else:
            self.step(
                lambda model: model.rwprotect(model.contexts[number], page, 1, protect=False, wake=True),
                lambda: uffd.rwprotect(page * PAGE, PAGE, protect=False),
            )

    # --- accesses -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans, place=places)
    def read(self, which: int, span: Span, place: int) -> None:
        self.touch(which, span, place, write=False, by_kernel=False)

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans, place=places)
    def write(self, which: int, span: Span, place: int) -> None:
        self.touch(which, span, place, write=True, by_kernel=False)

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans, place=places, write=st.booleans())
    def call_on(self, which: int, span: Span, place: int, write: bool) -> None:
        """Have a system call read or write."""
        self.touch(which, span, place, write=write, by_kernel=True)

    def touch(self, which: int, span: Span, place: int, *, write: bool, by_kernel: bool) -> None:
        actor = self.actor(which)
        page, _ = self.pages(actor, replace(span, spill=False))
        data = b"%015d." % self.fresh() if write else None
        number = self.fresh()
        busy = {waiter.slot for waiter in self.model.waiters if waiter.space.number == actor.number}
        slot = next(slot for slot in range(len(actor.threads)) if slot not in busy)

        def predict(model: PageModel) -> None:
            space = model.spaces[actor.number]
            thread_id = actor.threads[slot]
            model.run(Access(number, space, page, place, 16, data, by_kernel, thread_id, slot))

        if self.ends_badly(predict):
            by_kernel = True  # EFAULT instead
        if len(self.model.waiters) == WAITERS and self.would_wait(predict):
            return
        self.step(predict, ask=(actor, "touch", slot, number, page * PAGE + place, 16, data, by_kernel))

    def ends_badly(self, predict: Predict) -> bool:
        """Whether a process would die of it."""
        trial = copy.deepcopy(self.model)
        predict(trial)
        return any(what == "died" for what, *_ in trial.observed)

    def would_wait(self, predict: Predict) -> bool:
        trial = copy.deepcopy(self.model)
        predict(trial)
        return len(trial.waiters) > len(self.model.waiters)

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans, write=st.booleans())
    def populate(self, which: int, span: Span, write: bool) -> None:
        chosen = self.part(which, span)
        if chosen is None:
            return
        actor, first, count = chosen
        trial = copy.deepcopy(self.model)
        if trial.populate(trial.spaces[actor.number], first, count, write=write) is None:
            return
        advice = Advice.POPULATE_WRITE if write else Advice.POPULATE_READ
        self.step(
            lambda model: model.populate(model.spaces[actor.number], first, count, write=write),
            ask=(actor, "advise", int(advice), first * PAGE, count * PAGE),
        )

    # --- memory calls ---------------------------------------------------------------------------------------------

    def part(self, which: int, span: Span) -> tuple[Actor, int, int] | None:
        """A process and a range of its pages."""
        actor = self.actor(which)
        return (actor, *self.pages(actor, span)) if actor.handles else None

    @precondition(lambda self: self.alive)
    @rule(
        which=numbers,
        kind=st.sampled_from(KINDS),
        at=st.integers(0, ARENA_PAGES - 1),
        count=st.sampled_from([1, 2, 4, 6]),
        file=st.integers(0, FILES - 1),
        offset=st.sampled_from([0, 0, 1, 3, FILE_PAGES - 1]),
    )
    def map(self, which: int, kind: MemoryKind, at: int, count: int, file: int, offset: int) -> None:
        actor = self.actor(which)
        first = self.free(actor, at, count)
        if first is None or len(actor.handles) > 6:
            return
        number = self.fresh()

        def predict(model: PageModel) -> int:
            of_file = None if kind is MemoryKind.ANONYMOUS else model.files[file]
            return model.map(model.spaces[actor.number], first, count, kind, of_file, offset)

        handle = Handle(first, count, kind, set(range(first, first + count)))
        actor.handles[number] = handle
        command = (actor, "map", number, str(kind), first * PAGE, count * PAGE, file, offset * PAGE)
        self.step(predict, ask=command, vmas=True)

    def free(self, actor: Actor, at: int, count: int) -> int | None:
        """Pages where nothing is mapped, and where nobody waits."""
        space = self.model.spaces[actor.number]
        for first in (*range(at, ARENA_PAGES - count + 1), *range(min(at, ARENA_PAGES - count + 1))):
            if not space.within(ARENA + first, count):
                return ARENA + first
        return None

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans)
    def drop(self, which: int, span: Span) -> None:
        chosen = self.part(which, span)
        if chosen is None:
            return
        actor, first, count = chosen
        self.step(
            lambda model: model.drop(model.spaces[actor.number], first, count),
            ask=(actor, "advise", int(Advice.DONTNEED), first * PAGE, count * PAGE),
        )

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans)
    def remove(self, which: int, span: Span) -> None:
        chosen = self.part(which, span)
        if chosen is None:
            return
        actor, first, count = chosen
        self.step(
            lambda model: model.remove(model.spaces[actor.number], first, count),
            ask=(actor, "advise", int(Advice.REMOVE), first * PAGE, count * PAGE),
        )

    @precondition(lambda self: self.alive and self.release.guards)
    @rule(which=numbers, span=spans)
    def guard(self, which: int, span: Span) -> None:
        chosen = self.part(which, span)
        if chosen is None:
            return
        actor, first, count = chosen
        space = self.model.spaces[actor.number]
        for vma in space.within(first, count):
            # A kernel of 6.15 or later never returns from it: it tries again and again to zap the mark.
            if vma.file is not None and any(
                self.protected(space.pages.get(page)) for page in range(first, first + count)
            ):
                return
        self.step(
            lambda model: model.guard(model.spaces[actor.number], first, count),
            ask=(actor, "advise", int(Advice.GUARD_INSTALL), first * PAGE, count * PAGE),
        )

    @precondition(lambda self: self.alive and self.release.guards)
    @rule(which=numbers, span=spans)
    def unguard(self, which: int, span: Span) -> None:
        chosen = self.part(which, span)
        if chosen is None:
            return
        actor, first, count = chosen
        self.step(
            lambda model: model.unguard(model.spaces[actor.number], first, count),
            ask=(actor, "advise", int(Advice.GUARD_REMOVE), first * PAGE, count * PAGE),
        )

    @precondition(lambda self: self.alive)
    @rule(
        which=numbers,
        span=spans,
        protection=st.sampled_from([Protection.NONE, Protection.READ, Protection.READ | Protection.WRITE]),
    )
    def protect(self, which: int, span: Span, protection: Protection) -> None:
        chosen = self.part(which, span)
        if chosen is None:
            return
        actor, first, count = chosen
        self.step(
            lambda model: model.protect(model.spaces[actor.number], first, count, protection),
            ask=(actor, "protect", int(protection), first * PAGE, count * PAGE),
            vmas=True,
        )

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans)
    def unmap(self, which: int, span: Span) -> None:
        """Unmap a part of a mapping, the first that is still there."""
        actor = self.actor(which)
        if not actor.handles:
            return
        number, handle = self.handle(actor, span.mapping)
        runs = runs_of(
            handle.owned & set(range(handle.first + span.first, handle.first + span.first + span.count))
        )
        if not runs:
            return
        first, count = runs[0]
        command = (actor, "unmap", number, (first - handle.first) * PAGE, count * PAGE)
        if self.step(
            lambda model: model.unmap(model.spaces[actor.number], first, count), ask=command, vmas=True
        ):
            handle.owned -= set(range(first, first + count))

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans)
    def close_mapping(self, which: int, span: Span) -> None:
        actor = self.actor(which)
        if len(actor.handles) < 3:
            return
        number, handle = self.handle(actor, span.mapping)
        runs = runs_of(handle.owned)

        def predict(model: PageModel) -> int:
            for start, length in runs:
                model.unmap(model.spaces[actor.number], start, length)
            return 0

        if self.step(predict, ask=(actor, "close", number), vmas=True):
            del actor.handles[number]

    @precondition(lambda self: self.alive)
    @rule(which=numbers, mapping=numbers, count=st.integers(1, 8))
    def resize(self, which: int, mapping: int, count: int) -> None:
        """Call mremap without MREMAP_MAYMOVE."""
        actor = self.actor(which)
        if not actor.handles:
            return
        number, handle = self.handle(actor, mapping)
        if not handle.whole or handle.first + count > ARENA + ARENA_PAGES:
            return
        first, before = handle.first, handle.count

        def predict(model: PageModel) -> int:
            return model.remap(model.spaces[actor.number], first, before, count, None, keep=False)

        trial = copy.deepcopy(self.model)
        error = predict(trial)
        command = (actor, "remap", number, count * PAGE, None, None, None)
        if self.step(predict, ask=command, vmas=True) and not error:
            handle.count, handle.owned = count, set(range(first, first + count))

    @precondition(lambda self: self.alive)
    @rule(
        which=numbers,
        mapping=numbers,
        at=st.integers(0, ARENA_PAGES - 1),
        count=st.sampled_from([0, 0, 0, 1, 2, 6, 8]),
        over=st.sampled_from([None, None, 0, 1, 2]),
        keep=st.booleans(),
    )
    def relocate(self, which: int, mapping: int, at: int, count: int, over: int | None, keep: bool) -> None:
        """Call mremap with MREMAP_FIXED: to where nothing is, or over another mapping; or with MREMAP_DONTUNMAP."""
        actor = self.actor(which)
        if not actor.handles or len(actor.handles) > 6:
            return
        number, handle = self.handle(actor, mapping)
        first, before = handle.first, handle.count
        length = before if keep or not count else count
        replaced, to = None, self.free(actor, at, length)
        if over is not None:
            replaced, other = self.handle(actor, over)
            to = other.first
            if replaced == number or not other.whole or length > other.count:
                return
        space = self.model.spaces[actor.number]
        pieces = len(space.within(first, before))
        if to is None or not handle.whole or (pieces > 1 and self.release.remaps_several):
            return
        if not self.release.remap_clears and self.moves_protected(space, first, before):
            return
        if self.takes_along(space, first, to, length):
            return

        def predict(model: PageModel) -> int:
            return model.remap(model.spaces[actor.number], first, before, length, to, keep=keep)

        kept = self.fresh() if keep else None
        error = predict(copy.deepcopy(self.model))
        target = None if replaced is not None else to * PAGE
        command = (actor, "remap", number, length * PAGE, target, replaced, kept)
        if not self.step(predict, ask=command, vmas=True):
            return
        if error:
            return
        if replaced is not None:
            other.owned -= set(range(to, to + length))
            if not other.owned:
                del actor.handles[replaced]
        if kept is not None:
            actor.handles[kept] = replace(handle)
        actor.handles[number] = Handle(to, length, handle.kind, set(range(to, to + length)))

    def takes_along(self, space: Space, first: int, to: int, length: int) -> bool:
        """Whether mremap could unregister more than it moves.

        Without EVENT_REMAP the kernel unregisters the mapping at the new place, *after* it may have merged it with
        a neighbour that is registered alike: with a mapping that never had a page, or with the old place itself.
        """
        vma = space.vma(first)
        if vma is None or vma.context is None or vma.has(Feature.EVENT_REMAP):
            return False
        near = (space.vma(to - 1), space.vma(to + length))
        return any(other is not None and other.context is vma.context for other in near)

    def moves_protected(self, space: Space, first: int, count: int) -> bool:
        """Whether mremap would carry protection to where nothing is registered: it means nothing there."""
        vma = space.vma(first)
        return (
            vma is not None
            and not vma.has(Feature.EVENT_REMAP)
            and any(space.pages[page].bit for page in range(first, first + count) if page in space.pages)
        )

    # --- files ----------------------------------------------------------------------------------------------------

    @rule(file=st.integers(0, FILES - 1), index=st.integers(0, FILE_PAGES - 1))
    def write_file(self, file: int, index: int) -> None:
        data = self.page_of_data()
        self.step(
            lambda model: model.write_file(model.files[file], index, data),
            lambda: discard(os.pwrite(self.fds[file], data, index * PAGE)),
        )

    @rule(file=st.integers(0, FILES - 1), index=st.integers(0, FILE_PAGES - 1), count=st.integers(1, 3))
    def allocate(self, file: int, index: int, count: int) -> None:
        count = min(count, FILE_PAGES - index)
        self.step(
            lambda model: model.allocate(model.files[file], index, count),
            lambda: os.posix_fallocate(self.fds[file], index * PAGE, count * PAGE),
        )

    @precondition(lambda self: self.alive)
    @rule(which=numbers, span=spans)
    def punch(self, which: int, span: Span) -> None:
        actor = self.actor(which)
        if not actor.handles:
            return
        number, handle = self.handle(actor, span.mapping)
        start = span.first % handle.count
        first, count = handle.first + start, min(span.count, handle.count - start)
        vma = self.model.spaces[actor.number].vma(first)
        if not handle.owned.issuperset(range(first, first + count)) or vma is None or vma.file is None:
            return
        file, index = vma.file.number, vma.index(first)
        self.step(
            lambda model: model.punch(model.files[file], index, count),
            ask=(actor, "punch", number, start * PAGE, count * PAGE),
        )

    # --- PAGEMAP_SCAN ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.alive and self.release.scans)
    @rule(which=numbers)
    def scan(self, which: int) -> None:
        """Look at all categories."""
        actor = self.actor(which)
        space = self.model.spaces[actor.number]
        found = actor.pagemap.scan(ARENA * PAGE, ARENA_PAGES * PAGE, returns=CATEGORIES)
        told = {}
        for start, end, categories in found.regions.tolist():
            for page in range(start // PAGE, end // PAGE):
                told[page] = PageCategory(categories)
        for vma in space.vmas:
            for page in range(vma.start, vma.end):
                right = self.model.categories(space, page)
                seen = told.get(page, PageCategory(0))
                if PageCategory.WPALLOWED not in right:
                    seen &= ~PageCategory.WRITTEN  # releases differ
                if seen != right:
                    self.broken = True
                assert seen == right, f"page {page:#x} is {seen!r}, and the model has {right!r}"

    @precondition(lambda self: self.alive and self.release.scans)
    @rule(which=numbers, span=spans)
    def scan_and_protect(self, which: int, span: Span) -> None:
        actor = self.actor(which)
        first, count = self.pages(actor, span)

        def perform() -> set[int]:
            found = actor.pagemap.scan(
                first * PAGE, count * PAGE, mask=WATCHED, returns=PageCategory.WRITTEN, protect=True
            )
            return {page for start, end in found.ranges() for page in range(start // PAGE, end // PAGE)}

        self.step(lambda model: model.scan_and_protect(model.spaces[actor.number], first, count), perform)

    # --- the end --------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if not self.broken:
                self.everything_is_there()
        finally:
            for uffd in self.uffds.values():
                uffd.close()
            for actor in list(self.actors.values()):
                actor.close()
            for subject in self.subjects:
                subject.kill()
                subject.close()
            for fd in self.fds:
                os.close(fd)

    def everything_is_there(self) -> None:
        """Close all userfaultfds, let everybody go on, and read all that can be read."""
        for number in list(self.uffds):
            if not self.step(
                lambda model, number=number: model.close(model.contexts[number]),
                lambda number=number: self.uffds.pop(number).close(),
                vmas=True,
                deadly=True,
            ):
                return
        for actor in list(self.actors.values()):
            space = self.model.spaces[actor.number]
            if not space.alive:
                continue
            pages, right = [], []
            for vma in list(space.vmas):
                for page in range(vma.start, vma.end):
                    content = self.model.reach(space, page, False)
                    if isinstance(content, bytes):
                        pages.append(page * PAGE)
                        right.append(hashlib.blake2b(content).digest())
            self.step(lambda model, right=right: right, ask=(actor, "contents", pages, PAGE))


def told(answer: Any) -> Any:
    """How a process says it: an error number is an exception there."""
    if isinstance(answer, int):
        return ("error", answer) if answer else None
    return answer


def answered(call: Callable[[], Any]) -> Any:
    try:
        return call() or 0
    except UffdError as error:
        return error.errno


def runs_of(pages: set[int]) -> list[tuple[int, int]]:
    """Consecutive pages as (first, count)."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and sum(runs[-1]) == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


def discard(value: object) -> None:
    """Forget a result."""


# The model knows kernels from 6.4 on; before, protection of empty pages and of forked children was different.
pytestmark = pytest.mark.needs_feature("WP_UNPOPULATED")

TestPages = Pages.TestCase
_soaks = settings.default is not None and settings.default.max_examples > 1000
TestPages.settings = settings(
    # The same sequences every time, but in a soak; and no shrinking, which takes longer than the watchdog lets a test.
    derandomize=not _soaks,
    phases=(Phase.generate, Phase.shrink) if _soaks else (Phase.generate,),
    stateful_step_count=40,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
