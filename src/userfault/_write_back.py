"""What becomes of changes that nobody flushed, and how a flush that failed is told.

Like `numpy.memmap`, an array of mode `"r+"` is written back when its memory goes, and when the interpreter exits.
Nobody can catch an exception there: what fails is logged, and written to stderr.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import weakref
from typing import TYPE_CHECKING

from userfault import _engine
from userfault._log import logger
from userfault.errors import ClosedError, FlushError, ForkedError, UserfaultError, WriteFailure
from userfault.sizes import format_size

if TYPE_CHECKING:
    from userfault.memory import PagedMemory

__all__ = ["flush_blocks", "flush_unasked", "flush_when_python_exits", "lost_text"]

_open: weakref.WeakSet[PagedMemory] = weakref.WeakSet()


def flush_blocks(memory: PagedMemory, first: int, count: int) -> None:
    """Write back what is dirty of `count` blocks from `first` on, and make it durable.

    Raises:
        FlushError: Some could not be written, or not made durable.
        ForkedError: This process inherited the memory.
        ClosedError: The memory was closed meanwhile.
    """
    try:
        failed = memory._flush(first, count)
    except _engine.EngineError as error:
        raise _engine_failure(memory, error) from None
    if not failed:
        return
    failures = _ranges(memory, failed)
    if not failures:  # what failed was to make durable what had been written
        raise _not_durable(memory, failed[0][2] or os.strerror(failed[0][1]), failed[0][1])
    raise FlushError(
        f"{memory.name}: {_sizes(failures)} could not be written back: {failures[0].detail}. They stay in memory, "
        "and the next flush tries again",
        source_name=memory.name,
        failures=failures,
    )


def _engine_failure(memory: PagedMemory, error: _engine.EngineError) -> UserfaultError:
    if error.errno == errno.EBADF:
        return ClosedError(f"{memory.name} was closed")
    if error.errno == errno.EPERM:
        return ForkedError(
            f"{memory.name} was opened by the process that forked this one, and only that one writes it back; open it "
            "again here to write to it"
        )
    return _not_durable(memory, error.message or os.strerror(error.errno), error.errno)


def _not_durable(memory: PagedMemory, detail: str, number: int) -> FlushError:
    return FlushError(
        f"{memory.name} could not be made durable: {detail}. The next flush tries again",
        source_name=memory.name,
        detail=detail,
        errno=number,
    )


def _ranges(memory: PagedMemory, failed: list[tuple[int, int, str]]) -> tuple[WriteFailure, ...]:
    """Return what failed as ranges of bytes: neighbours that failed for one reason together."""
    ranges: list[WriteFailure] = []
    for block, number, message in sorted(failed):
        if block >= memory.nblocks:  # said of no block
            continue
        start, detail = block * memory.block, message or os.strerror(number)
        stop = min(start + memory.block, memory.nbytes)
        last = ranges[-1] if ranges else None
        if last and last.offset + last.length == start and (last.detail, last.errno) == (detail, number):
            start = ranges.pop().offset
        ranges.append(WriteFailure(start, stop - start, detail, number))
    return tuple(ranges)


def _sizes(failures: tuple[WriteFailure, ...]) -> str:
    first, total = failures[0], sum(failure.length for failure in failures)
    text = f"bytes [{first.offset}, {first.offset + first.length})"
    more = len(failures) - 1
    return f"{text} and {more} more range(s), {format_size(total)} in all," if more else text


def lost_text(memory: PagedMemory, error: Exception) -> str:
    """Return what to say when `memory` goes although its flush raised `error`."""
    failures = error.failures if isinstance(error, FlushError) else ()
    what = f"changes of {_sizes(failures)}" if failures else "changes"
    why = error.detail if isinstance(error, FlushError) else repr(error)
    return f"{memory.name}: {what} are lost: {why}"


def flush_when_python_exits(memory: PagedMemory) -> None:
    """Have `memory` written back if it is still open then."""
    _open.add(memory)


@atexit.register
def _flush_at_exit() -> None:
    for memory in list(_open):
        flush_unasked(memory)


def flush_unasked(memory: PagedMemory) -> None:
    """Write `memory` back because it, or everything, is about to end. Nothing is raised: nobody could catch it."""
    try:
        _flush(memory)
    except Exception as error:
        text = lost_text(memory, error)
        if text == memory._last_words:  # Python exits, and now its memory goes
            return
        memory._last_words = text
        logger.error("%s", text)
        # A program that set up no logging must learn of it, too.
        if sys.stderr is not None:
            sys.stderr.write(f"userfault: {text}\n")


def _flush(memory: PagedMemory) -> None:
    # A forked child has nothing to write back: its parent does.
    if memory._writes_back and not memory.closed and not memory._forked:
        flush_blocks(memory, 0, memory.nblocks)
