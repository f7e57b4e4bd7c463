"""What importing costs: no package more than the layer needs, no thread, no descriptor."""

from __future__ import annotations

import sys

import pytest

from support import run_python

# A worker starts in a fraction of NumPy's import time, and the kernel's API is for programs that have no
# NumPy at all.
LEAN = [
    "userfault",
    "userfault.kernel",
    "userfault.workers",
    "userfault.workers._main",
    "userfault.errors",
    "userfault.sizes",
]


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(run_python(code, 60).check().split())


@pytest.mark.parametrize("module", LEAN)
def test_lean_modules_do_not_import_numpy(module: str) -> None:
    assert "numpy" not in loaded_by(f"import {module}")


def test_the_kernel_needs_no_compiled_code_and_only_the_standard_library() -> None:
    loaded = loaded_by("import userfault.kernel")
    assert "userfault._engine" not in loaded
    foreign = (
        {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"userfault", "__main__"}
    )
    # What site-packages' .pth files load at start-up is not of our doing.
    foreign -= {name.partition(".")[0] for name in loaded_by("pass")}
    assert foreign == set()


def test_open_imports_nothing_but_numpy() -> None:
    loaded = {name for name in loaded_by("import userfault\nuserfault.open") if "cython" not in name}
    foreign = (
        {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"userfault", "__main__"}
    )
    foreign -= {name.partition(".")[0] for name in loaded_by("import numpy")}
    assert foreign == set()


def test_importing_starts_nothing() -> None:
    code = """
        import os
        before = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        import userfault, userfault._engine
        after = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        assert before == after, (before, after)
    """
    run_python(code, 60).check()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="needs a free-threaded Python")
def test_the_gil_stays_off_on_free_threaded_builds() -> None:
    code = "import sys, userfault._engine; print(sys._is_gil_enabled())"
    was = run_python("import sys; print(sys._is_gil_enabled())", 60).check()
    assert run_python(code, 60).check() == was


def test_every_name_of_the_package_is_there() -> None:
    code = """
        import userfault
        for name in userfault.__all__:
            assert getattr(userfault, name) is not None, name
        assert set(userfault.__all__) <= set(dir(userfault))
        try:
            userfault.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise AssertionError
    """
    run_python(code, 60).check()
