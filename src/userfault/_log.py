"""The one logger of userfault: `logging.getLogger("userfault")`.

It has a handler that drops everything, so that a program that sets up no logging is told nothing; nothing here sets a
level or a handler that prints. The engine's last words (a block was poisoned) go to stderr, not here: they
are said where no Python can run.

A module that logs imports it from here, and only such a module: workers start without `logging`.
"""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger = logging.getLogger("userfault")
logger.addHandler(logging.NullHandler())
