"""What is in the virtual machine: a part of this one, at the same paths, with everything compiled beforehand.

The same paths, because then Python's folders, the virtual environment, the links between them and pytest's compiled
tests are right as they are. Compiled beforehand, because software emulation is some twenty times slower.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import marshal
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kernels.cpio import Archive

ROOT = Path(__file__).resolve().parent.parent.parent
GUEST = Path(__file__).resolve().parent / "guest"

DISTRIBUTIONS = ("pytest", "numpy", "hypothesis")
COMPILED = ("_engine", "_allocations", "_mirror")
TESTS = ("pyproject.toml", "tests/conftest.py", "tests/support", "tests/kernel", "tests/track")
# What tests may want to start, where this machine has it.
PROGRAMS = ("sh", "true", "sleep", "setpriv", "unshare")

_FOLDERS = ("/root", "/proc", "/sys", "/dev", "/run")
_ACCOUNTS = {
    "/etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "/etc/group": b"root:x:0:\nnogroup:x:65534:\n",
}
_STDLIB_WITHOUT = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "site-packages",
    "dist-packages", "__pycache__",
}  # fmt: skip
_PACKAGES_WITHOUT = {"tests", "include", "f2py", "distutils", "__pycache__"}
_NEVER = re.compile(r"_tkinter|_test|xxlimited|config-\d|.*\.(pyi|pxd|pyx|a|h|c|exe|pth)$")


def build(programs: list[Path], compiled: Path) -> Archive:
    """Return everything but the plan and the kernel's modules: what is the same for all kernels.

    Args:
        programs: The engine's compiled tests.
        compiled: The folder (PYTHONPYCACHEPREFIX) with what pytest compiled of the tests when it collected them here.
    """
    archive = Archive()
    for path in _FOLDERS:
        archive.folder(path)
    for path in ("/tmp", "/var/tmp"):
        archive.folder(path, mode=0o1777)
    for name, content in _ACCOUNTS.items():
        archive.file(name, content)
    _add_python(archive)
    for file in _packages():
        archive.copy(file)
    _add_userfault(archive)
    _add_tests(archive, compiled)
    _add_guest(archive)
    compile_all(archive)
    for program in [*programs, *(Path(found) for name in PROGRAMS if (found := shutil.which(name)))]:
        archive.copy(program)
    _add_libraries(archive)
    return archive


def _add_python(archive: Archive) -> None:
    archive.copy(Path(sys.executable))
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if configuration.exists():
        archive.copy(configuration)
    for name in ("stdlib", "platstdlib"):
        for path in _tree(Path(sysconfig.get_path(name)), _STDLIB_WITHOUT):
            archive.copy(path)


def _packages() -> Iterator[Path]:
    """Yield the installed files of the distributions and of what they need."""
    todo, seen = list(DISTRIBUTIONS), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        # A requirement under a condition is for an extra, another system or an older Python.
        todo += [re.match(r"[\w.-]+", need)[0] for need in found.requires or () if ";" not in need]  # type: ignore[index]
        for file in found.files or ():
            if ".." not in file.parts and _is_wanted(file, _PACKAGES_WITHOUT):
                yield Path(file.locate())


def _add_userfault(archive: Archive) -> None:
    """Put the package where it would be installed: an editable installation has it in the tree and a build folder."""
    found = importlib.metadata.distribution("userfault")
    for file in found.files or ():
        if file.parts[0].endswith(".dist-info"):
            archive.copy(Path(file.locate()))
    spec = importlib.util.find_spec("userfault")
    if not (spec and spec.origin):
        raise ModuleNotFoundError("userfault is not installed here")
    source = Path(spec.origin).parent
    target = Path(str(found.locate_file("userfault"))).resolve()
    for path in _tree(source, _PACKAGES_WITHOUT):
        _put(archive, target / path.relative_to(source), path)
    for name in COMPILED:
        module = importlib.util.find_spec(f"userfault.{name}")
        if not (module and module.origin):
            raise ModuleNotFoundError(f"userfault.{name} is not installed here")
        _put(archive, target / Path(module.origin).name, Path(module.origin))


def _add_tests(archive: Archive, compiled: Path) -> None:
    """Put the tests with what pytest, which rewrites their assertions, has compiled of them."""
    tag = f"{sys.implementation.cache_tag}-pytest-{importlib.metadata.version('pytest')}"
    for name in TESTS:
        for path in _tree(ROOT / name, {"__pycache__"}):
            archive.copy(path)
            rewritten = compiled.joinpath(*path.parts[1:-1], f"{path.stem}.{tag}.pyc")
            if rewritten.exists():
                _put(archive, path.parent / "__pycache__" / rewritten.name, rewritten)


def _add_guest(archive: Archive) -> None:
    init = f"#!{sys.executable} -IS\n" + (GUEST / "init.py").read_text()
    archive.file("/init", init.encode(), mode=0o755)
    archive.copy(GUEST / "matrix_plugin.py")


def compile_all(archive: Archive) -> None:
    """Put a compiled file beside each Python file, of the kind that is never compared with its source."""
    for path, entry in list(archive.entries.items()):
        if path.endswith(".py") and stat.S_ISREG(entry.mode):
            assert isinstance(entry.content, Path)
            archive.file(importlib.util.cache_from_source(path), _compiled(entry.content, path))


def _compiled(source: Path, path: str) -> bytes:
    status = source.stat()
    stamp = struct.pack("<III", 0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
    try:
        kept = Path(importlib.util.cache_from_source(str(source))).read_bytes()
    except FileNotFoundError:
        kept = b""
    if kept[:16] == importlib.util.MAGIC_NUMBER + stamp:
        code = kept[16:]
    else:
        code = marshal.dumps(compile(source.read_bytes(), path, "exec", dont_inherit=True))
    # PEP 552: flag 1 is "hash-based", without flag 2 the hash is not looked at.
    return importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + code


def _add_libraries(archive: Archive) -> None:
    """Put the shared libraries that the programs and modules need."""
    binaries = [
        str(entry.content)
        for entry in archive.entries.values()
        if isinstance(entry.content, Path) and _is_elf(entry.content)
    ]
    said = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    missing = sorted(set(re.findall(r"^\s+(\S+) => not found", said, re.MULTILINE)))
    if missing:
        raise FileNotFoundError(f"shared libraries that the tests need are not here: {', '.join(missing)}")
    for library in sorted(set(re.findall(r"^\s+(?:\S+ => )?(/.+) \(0x", said, re.MULTILINE))):
        archive.copy(Path(os.path.normpath(library)))
    # Libraries outside the default folders (/usr/local/lib) are found through it.
    if Path("/etc/ld.so.cache").exists():
        archive.copy(Path("/etc/ld.so.cache"))


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _tree(top: Path, without: set[str]) -> Iterator[Path]:
    """Yield the files below a folder, or the file itself."""
    if top.is_file():
        yield top
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(set(folders) - without)
        for name in sorted(files):
            path = Path(folder, name)
            if _is_wanted(path.relative_to(top), without):
                yield path


def _is_wanted(path: os.PathLike[str], without: set[str]) -> bool:
    parts = Path(path).parts
    return not without.intersection(parts) and not any(_NEVER.match(part) for part in parts)


def _put(archive: Archive, path: Path, source: Path) -> None:
    status = source.stat()
    archive.file(str(path), source, mode=stat.S_IMODE(status.st_mode), mtime=int(status.st_mtime))
