"""Pickling what goes to a worker process, with an answer for classes that only this program knows.

Pickle stores a class as "module, name" and the worker imports the module. A class of the running script or
notebook lives in `__main__`, which is another module in the worker: pickle would store it without complaint,
and loading it would fail there, or worse, find another class of that name. Such classes are sent by value, by
cloudpickle.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
from types import FunctionType
from typing import Any

from userfault.errors import SourcePickleError

__all__ = ["dumps"]

_MAIN_MODULES = ("__main__", "__mp_main__")
_PROTOCOL = 5


class _ByValueNeededError(Exception):
    """A class or function of the running script is in the object graph."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ in _MAIN_MODULES:
            raise _ByValueNeededError(f"{obj.__qualname__} is defined in {obj.__module__}")
        return NotImplemented


def dumps(obj: object) -> bytes:
    """Pickle `obj` for a worker process.

    Raises:
        SourcePickleError: It cannot be pickled, or only by cloudpickle, which is not installed.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=_PROTOCOL).dump(obj)
    except Exception as cause:  # pickling runs code of any class: whatever it raises means "not like this"
        return _dumps_by_value(obj, cause)
    return buffer.getvalue()


def _dumps_by_value(obj: object, cause: Exception) -> bytes:
    if importlib.util.find_spec("cloudpickle") is None:
        raise SourcePickleError(
            f"the source cannot be sent to a worker process: {cause}. Move its class into a module that can "
            "be imported, or install cloudpickle: pip install 'userfault[cloudpickle]'"
        ) from cause
    cloudpickle = importlib.import_module("cloudpickle")
    try:
        pickled: bytes = cloudpickle.dumps(obj, protocol=_PROTOCOL)
    except Exception as error:
        raise SourcePickleError(
            f"the source cannot be sent to a worker process: {error}. Let it hold what is needed to open its "
            "data (a path, a URL), not open files, locks or connections"
        ) from error
    return pickled
