"""Runs a Python program in this process as `python` would."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import runpy
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from userfault.cli._output import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Program"]

_FAILED, _INTERRUPTED = 1, 130
# Where a traceback of the program does not begin yet.
_OWN = str(Path(__file__).resolve().parents[2])
_STARTERS = ("<frozen runpy>", "<frozen importlib", runpy.__file__)


@dataclass(frozen=True, slots=True)
class Program:
    """A script, or a module, with its arguments.

    Attributes:
        name: Path of a script (also of a folder or zip file with a `__main__.py`), or name of a module.
        arguments: What it finds behind its name in `sys.argv`.
        is_module: Whether `name` is a module's, as with `python -m`.
    """

    name: str
    arguments: tuple[str, ...]
    is_module: bool = False

    @property
    def stem(self) -> str:
        """A short name for files that belong to it."""
        if self.is_module:
            return self.name.removesuffix(".__main__").rpartition(".")[2]
        return Path(self.name).resolve().stem or "program"

    @property
    def command(self) -> str:
        """How it was called, for people."""
        return " ".join([*(["-m"] if self.is_module else []), self.name, *self.arguments])

    def check(self) -> None:
        """See whether there is such a program, before anything is set up for it.

        Raises:
            UsageError: There is not.
        """
        if not self.is_module:
            if not os.path.exists(self.name):
                raise UsageError(f"{self.name}: there is no such file; to run a module use -m")
            return
        try:
            found = importlib.util.find_spec(self.name)
        except (ImportError, ValueError) as error:
            raise UsageError(f"-m {self.name}: {error}") from None
        if found is None:
            raise UsageError(f"-m {self.name}: there is no such module")

    def enter(self) -> None:
        """Set up `sys.argv` and `sys.path` as the program is to find them."""
        sys.argv = [self.name, *self.arguments]
        if sys.flags.safe_path:
            return
        sys.path[0] = os.getcwd() if self.is_module else os.path.dirname(os.path.realpath(self.name))

    def run(self) -> int:
        """Run it to the end of its main thread and return its exit code.

        An exception that it does not catch is shown by `sys.excepthook`, beginning with the program's own frames.

        Raises:
            SystemExit: The program's own.
        """
        start = self._module() if self.is_module else self._script()
        try:
            start()
        except SystemExit:
            raise
        except BaseException as error:
            sys.excepthook(
                type(error), error.with_traceback(_own_part(error.__traceback__)), error.__traceback__
            )
            return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _FAILED
        return 0

    def _module(self) -> Callable[[], object]:
        return lambda: runpy.run_module(self.name, run_name="__main__", alter_sys=True)

    def _script(self) -> Callable[[], object]:
        if not os.path.isfile(self.name) or self.name.endswith((".zip", ".pyz", ".pyc")):
            return lambda: runpy.run_path(self.name, run_name="__main__")
        return self._execute

    def _execute(self) -> None:
        # As runpy.run_path, but the module stays: threads, exit functions and multiprocessing look for it after its
        # last line.
        # Its path is absolute, as since Python 3.9: the program may change its folder and look for what lies beside it.
        path = os.path.abspath(self.name)
        module = ModuleType("__main__")
        module.__dict__.update(
            __file__=path,
            __builtins__=builtins,
            __cached__=None,
            __loader__=SourceFileLoader("__main__", path),
        )
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        sys.modules["__main__"] = module
        exec(code, module.__dict__)


def _own_part(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith((_OWN, *_STARTERS)):
            return traceback
        traceback = traceback.tb_next
    return None
