"""What goes to a worker process: by name where that is enough, by value where it is not."""

from __future__ import annotations

import pickle
import sys
import threading
from pathlib import Path

import pytest

from support.processes import run_python
from userfault.errors import SourcePickleError
from userfault.sources._abc import PageSource
from userfault.sources._pickle import dumps


class Zeros(PageSource):
    @property
    def nbytes(self) -> int:
        return 10

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))


def test_what_can_be_imported_goes_by_name() -> None:
    assert b"Zeros" in dumps(Zeros())
    assert len(dumps(Zeros())) < 200
    assert isinstance(pickle.loads(dumps(Zeros())), Zeros)


def test_what_is_not_in_a_module_goes_by_value() -> None:
    class Local(Zeros):
        pass

    assert pickle.loads(dumps(Local())).nbytes == 10


def test_what_cannot_be_pickled_is_told_with_the_remedy() -> None:
    class Locked(Zeros):
        def __init__(self) -> None:
            self.lock = threading.Lock()

    with pytest.raises(SourcePickleError, match=r"cannot be sent to a worker.*lock.*not open files, locks"):
        dumps(Locked())


SCRIPT = """
import sys
from pathlib import Path
from userfault.sources import PageSource
from userfault.sources._pickle import dumps

class Half(PageSource):
    nbytes = 10
    def read_into(self, offset, buffer):
        buffer[:] = bytes(range(offset, offset + len(buffer)))

if "hide" in sys.argv:
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name == "cloudpickle" else find_spec(name)
try:
    Path(sys.argv[1]).write_bytes(dumps(Half()))
except Exception as error:
    print(f"{type(error).__name__}: {error}", end="")
"""


def test_classes_of_a_script_go_by_value(tmp_path: Path) -> None:
    """Pickle alone would say "__main__.Half", and the worker's __main__ has none."""
    pickled = tmp_path / "pickle"
    run_python(f"import sys; sys.path[:] = {sys.path!r}\n{SCRIPT}", arguments=[str(pickled)]).check()
    source = pickle.loads(pickled.read_bytes())
    buffer = bytearray(source.nbytes)
    source.read_into(0, memoryview(buffer))
    assert buffer == bytes(range(10))


def test_without_cloudpickle_the_remedy_is_told(tmp_path: Path) -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}\n{SCRIPT}"
    message = run_python(code, arguments=[str(tmp_path / "pickle"), "hide"]).check()
    assert message.startswith(
        "SourcePickleError: the source cannot be sent to a worker process: Half is defined in __main__"
    )
    assert message.endswith("install cloudpickle: pip install 'userfault[cloudpickle]'")
