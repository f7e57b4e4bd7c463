"""The recorders that run in this process: what becomes of them when it ends or forks."""

from __future__ import annotations

import atexit
import os
import platform
import sys
import weakref
from typing import TYPE_CHECKING, Any

from userfault._log import logger
from userfault.kernel._address import PAGE_SIZE

if TYPE_CHECKING:
    from userfault.track._recorder import Recorder

__all__ = ["facts", "running"]

running: weakref.WeakSet[Recorder] = weakref.WeakSet()


def facts() -> dict[str, Any]:
    """Return what a trace says of the program."""
    from userfault import __version__

    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "page_size": PAGE_SIZE,
        "version": __version__,
    }


@atexit.register
def _stop_all() -> None:
    for recorder in list(running):
        try:
            recorder.stop()
        except Exception as error:  # nobody could catch it
            logger.error("%r: %s", recorder, error)


def _in_child() -> None:
    for recorder in list(running):
        recorder._forked()
    running.clear()


os.register_at_fork(after_in_child=_in_child)
