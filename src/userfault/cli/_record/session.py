"""A recording of a program from its beginning to its end."""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from userfault.cli._output import error_console
from userfault.cli._record.allocated import Allocated, HandlerError
from userfault.cli._record.finder import Finder
from userfault.cli._record.recorder import ProgramRecorder
from userfault.cli._record.summary import Summary
from userfault.errors import UserfaultError
from userfault.track import read_trace, track_accesses, track_writes

if TYPE_CHECKING:
    from userfault.cli._record.program import Program
    from userfault.cli._record.settings import Settings

__all__ = ["Session"]


class Session:
    """Records until the interpreter exits: after the program's threads, and after its own exit functions."""

    def __init__(self, program: Program, settings: Settings) -> None:
        """Say what to record; nothing is done yet."""
        self._program, self._settings = program, settings
        self._notes: list[str] = []
        self._pid = os.getpid()

    def start(self) -> None:
        """Begin, or fail before the program has done anything.

        Raises:
            TrackError: This machine cannot track what is asked for.
            OSError: The trace cannot be written.
        """
        settings = self._settings
        self._try()
        self._allocated: Allocated | None = None
        self._finder = Finder(settings)
        self._recorder = ProgramRecorder(
            self._finder.tick,
            every=settings.every,
            to=settings.path,
            what="accesses" if settings.accesses else "writes",
            budget=settings.budget,
            about={"command": self._program.command},
        )
        self._recorder.start()
        try:
            self._allocated = self._finder.allocated = Allocated(settings.larger_than, settings.huge)
        except HandlerError as error:
            self._notes.append(f"only arrays that variables hold were found: {error}")
        atexit.register(self._finish)

    def _try(self) -> None:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tracker = track_accesses if self._settings.accesses else track_writes
        with tracker(array=page):
            pass

    def _finish(self) -> None:
        if os.getpid() != self._pid:
            return  # a child of the program, which ends as an interpreter does
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trace is to be closed
        failed = ""
        try:
            self._recorder.stop()
        except (UserfaultError, OSError) as error:
            failed = str(error)
        notes = self._finder.notes()  # what is counted there ends with the next line
        if self._allocated is not None:
            self._allocated.close()
        try:
            trace = read_trace(self._settings.path)
        except (UserfaultError, OSError) as error:  # the program has removed it, or its folder
            with suppress(OSError, ValueError):
                error_console().print(f"userfault: there is no trace: {failed or error}", soft_wrap=True)
            return
        notes = [*([failed] if failed else []), *self._notes, *trace.about.get("notes", []), *notes]
        with suppress(OSError, ValueError):  # the program may have closed what it would be written to
            Summary(self._settings.path, trace, tuple(notes)).print(as_json=self._settings.as_json)
