"""Tells a recorder of the program's large arrays as they come and go."""

from __future__ import annotations

import mmap
import os
import time
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from userfault import _registry
from userfault._log import logger
from userfault.cli._record.allocated import Block
from userfault.cli._record.frames import holders
from userfault.cli._record.rows import Row, Rows
from userfault.cli._record.summary import counted
from userfault.errors import UserfaultError
from userfault.sizes import format_size

if TYPE_CHECKING:
    from userfault.cli._record.allocated import Allocated
    from userfault.cli._record.frames import Holder, Variable
    from userfault.cli._record.recorder import ProgramRecorder
    from userfault.cli._record.settings import Settings
    from userfault.memory import PagedMemory

__all__ = ["Finder"]

# An array that no variable holds after so many looks is recorded without a name: it may be one that is being filled.
_LOOKS_UNNAMED = 2
# Until then its name is looked for before every sample, and after that only when there is another reason to look.
_LOOKS_NAMED = 20
# How often a look is taken without a new array of NumPy's, for those that others have made. In seconds.
_LOOK_S = 1.0


@dataclass(eq=False, slots=True)
class _Found:
    """An array: one of NumPy's, or one that was found in a variable only.

    Attributes:
        block: Its memory.
        row: Where it is recorded, None if it is not.
        looks: How often its name was looked for.
        decided: Whether it was decided to record it.
        gone: Whether the object is gone that it was found as.
        watch: The weak reference that says so.
        paged: Whether it is a paged memory, whose end the recorder notices itself.
        provisional: Whether it is called after its file until a variable is found that holds it.
    """

    block: Block
    row: Row | None = None
    looks: int = 0
    decided: bool = False
    gone: bool = False
    watch: object = None
    paged: bool = False
    provisional: bool = False

    @property
    def needs_name(self) -> bool:
        """Whether to look for its variable."""
        return self.looks < _LOOKS_NAMED and (self.row is None or not self.row.is_settled)


@dataclass(slots=True)
class Finder:
    """Finds what is to be recorded, before each sample, in the recorder's thread.

    Attributes:
        settings: What is wanted.
        allocated: NumPy's large arrays, None if they cannot be had.
        refused: Why arrays could not be recorded: messages by name.
        failed: What went wrong first in looking for them, "" if nothing did.
    """

    settings: Settings
    allocated: Allocated | None = None
    refused: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    _rows: Rows = field(default_factory=Rows)
    _own: dict[int, _Found] = field(default_factory=dict)
    _foreign: dict[tuple[int, int], _Found] = field(default_factory=dict)
    _look_at: float = 0.0

    def tick(self, recorder: ProgramRecorder) -> None:
        """Bring the recorder up to date. An error is noted and does not end the recording."""
        try:
            self._bury(recorder)
            if self.allocated is not None:
                self._follow(recorder, self.allocated)
            paged = self._unknown_paged()
            self._look(recorder, now=bool(paged))
            for memory in paged:
                self._meet_paged(recorder, memory)
        except Exception as error:
            logger.debug("looking for arrays failed", exc_info=True)
            self.failed = self.failed or f"{type(error).__name__}: {error}"

    def notes(self) -> list[str]:
        """Return what is not in the trace, and why, in sentences. For the end: nothing is looked for after it."""
        notes = [f"looking for arrays failed: {self.failed}"] if self.failed else []
        notes += [f"{name} was not recorded: {why}" for name, why in self.refused.items()]
        if self._rows.left_out:
            notes.append(
                f"not in the trace, because there were too many: {counted(len(self._rows.left_out), 'array')},"
                f" the largest of {format_size(max(self._rows.left_out))}"
            )
        if self.allocated is not None and (late := self._late(self.allocated)):
            notes.append(
                "not in the trace, because the program ended before they were looked at:"
                f" {counted(len(late), 'array')}, the largest of {format_size(max(late))}"
            )
        if self.allocated is not None and self.allocated.brief.count:
            brief = self.allocated.brief
            notes.append(
                f"not in the trace, because they lived for less than a sample: {counted(brief.count, 'array')},"
                f" the largest of {format_size(brief.largest)}"
            )
        return notes

    def _late(self, allocated: Allocated) -> list[int]:
        """Return the bytes of each array that lives at the end and was not decided on."""
        born, _ = allocated.drain(0)
        unnamed = [] if self.settings.only else [found for found in self._own.values() if not found.decided]
        return [block.nbytes for block in [*born, *(found.block for found in unnamed)]]

    # --- what NumPy has made

    def _follow(self, recorder: ProgramRecorder, allocated: Allocated) -> None:
        born, died = allocated.drain(self.settings.every_ns)
        # What a drain has told it does not tell again: whatever goes wrong with one, the others are dealt with.
        failed: Exception | None = None
        for death in died:
            found = self._own.pop(death.block.address)
            try:
                self._end(recorder, found, died_ns=death.died_ns, discard=death.dropped)
            except Exception as error:
                failed = failed or error
            finally:
                allocated.release(death.block)
        for block in born:
            self._own[block.address] = _Found(block)
        if failed is not None:
            raise failed

    # --- what variables hold

    def _look(self, recorder: ProgramRecorder, *, now: bool) -> None:
        nameless = [found for found in self._own.values() if found.needs_name]
        clock = time.monotonic()
        if not (now or nameless) and clock < self._look_at:
            return
        self._look_at = clock + _LOOK_S
        # First only looked at, as references are not to be held while system calls are made: see `Holder`.
        met = [self._meet(holder) for holder in holders(self.settings.larger_than)]
        for found, variable in met:
            if isinstance(found, _Found):
                if found.gone:  # meanwhile, and it is nobody's memory now
                    continue
                self._christen(recorder, found, variable)
            elif found is not None and (memory := found()) is not None:
                # A tensor of a model is not the model, either.
                whole = 2 * (variable.high - variable.low) >= memory.nbytes
                self._meet_paged(recorder, memory, variable if whole else None)
        for found in nameless:
            found.looks += 1
            if not found.decided and found.looks >= _LOOKS_UNNAMED and not self.settings.only:
                self._add(recorder, found, "")

    def _meet(self, holder: Holder) -> tuple[_Found | weakref.ref[PagedMemory] | None, Variable]:
        """Return what is to be called after a variable. Nothing here lets other threads run for long."""
        variable = holder.variable()
        low, high = variable.low, variable.high
        if self.allocated is not None:
            if self.allocated.is_young(low):
                return None, variable
            block = self.allocated.find(low)
            if block is not None:
                # A view of a small part is not what the whole is to be called after.
                return (self._own[block.address] if 2 * (high - low) >= block.nbytes else None), variable
        memory = _registry.find(low)
        if memory is not None:
            return weakref.ref(memory), variable
        if any(start <= low and high <= stop for start, stop in self._foreign):
            return None, variable
        found = self._foreign[low, high] = _Found(Block(low, high - low, time.monotonic_ns()))
        try:
            found.watch = weakref.ref(holder.owner, lambda _: setattr(found, "gone", True))
        except TypeError:
            return None, variable  # nobody would tell when it goes
        return found, variable

    # --- paged memories, of which a program may hold no array: a file of tensors makes them when asked

    def _unknown_paged(self) -> list[PagedMemory]:
        memories = [reference() for _, _, reference in list(_registry.entries)]
        return [
            memory
            for memory in memories
            if memory is not None
            and not memory.closed
            and memory.nbytes >= self.settings.larger_than
            and self._known_paged(memory) is None
        ]

    def _known_paged(self, memory: PagedMemory) -> _Found | None:
        found = self._foreign.get((memory.address, memory.address + memory.nbytes))
        # Another one may have lain there, which was closed but is still referred to.
        watch = None if found is None else found.watch
        return found if isinstance(watch, weakref.ref) and watch() is memory else None

    def _meet_paged(
        self, recorder: ProgramRecorder, memory: PagedMemory, variable: Variable | None = None
    ) -> None:
        found = self._known_paged(memory)
        name = os.path.basename(memory.name.rstrip("/")) if variable is None else variable.name
        if found is None:
            block = Block(memory.address, memory.nbytes, time.monotonic_ns())
            found = _Found(block, paged=True, provisional=variable is None)
            made = found
            found.watch = weakref.ref(memory, lambda _: setattr(made, "gone", True))
            self._foreign[memory.address, memory.address + memory.nbytes] = found
            if self.settings.wants(name):
                self._add(recorder, found, name, variable, memory)
        elif variable is not None and found.provisional:
            found.provisional = False
            if found.row is None:
                if not found.decided and self.settings.wants(name):
                    self._add(recorder, found, name, variable, memory)
            elif found.row.name in recorder.names:
                old = found.row.name
                self._rows.rename(found.row, name)
                recorder.rename(old, found.row.name, site=variable.site, array=variable)

    def _christen(self, recorder: ProgramRecorder, found: _Found, variable: Variable) -> None:
        row = found.row
        if row is None:
            if self.settings.wants(variable.name):
                if not found.decided:
                    self._add(recorder, found, variable.name, variable)
            else:
                found.looks = _LOOKS_NAMED
        elif not row.is_settled:
            old = row.name
            self._rows.rename(row, variable.name)
            recorder.rename(old, row.name, site=variable.site, array=found.block.view(variable))

    # --- the recorder's objects

    def _add(
        self,
        recorder: ProgramRecorder,
        found: _Found,
        name: str,
        variable: Variable | None = None,
        memory: Any = None,
    ) -> None:
        found.decided = True
        row = self._rows.take(name, found.block.nbytes, found.block.address % mmap.PAGESIZE)
        if row is None:
            return
        obj = found.block.view(variable) if memory is None else memory
        try:
            if row.arrays > 1:
                recorder.resume(obj, row.name)
            else:
                site = "" if variable is None else variable.site
                row.name = recorder.begin(obj, row.name, site=site, born_ns=found.block.born_ns)
        except UserfaultError as error:
            self._rows.drop(row)
            self.refused.setdefault(name or row.name, str(error))
            return
        found.row = row

    def _end(self, recorder: ProgramRecorder, found: _Found, *, died_ns: int, discard: bool) -> None:
        if found.row is not None:
            found.row.live = False
            recorder.end(found.row.name, died_ns=died_ns, discard=discard)

    def _bury(self, recorder: ProgramRecorder) -> None:
        for key, found in list(self._foreign.items()):
            if found.gone:
                del self._foreign[key]
                if not found.paged:
                    self._end(recorder, found, died_ns=time.monotonic_ns(), discard=True)
