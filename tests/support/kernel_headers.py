"""What the kernel's own headers say: the machine's, which are often old, and the newest that can be had.

`evaluate` lets the C compiler tell numbers, sizes and offsets; `macro_names` and `member_paths` read the text, so that
what a newer header adds is seen too.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "tools/headers.py"
PATIENCE_S = 45.0
# Of linux/fs.h only what belongs to PAGEMAP_SCAN.
FS_MACROS = re.compile(r"PAGE_IS_|PAGEMAP|PM_|PROCFS_IOCTL_MAGIC")
FS_STRUCTS = ("page_region", "pm_scan_arg")


@dataclass(frozen=True, slots=True)
class Target:
    """What the compiler has to believe to see one architecture's part of the headers."""

    folder: str  # arch/FOLDER of the kernel
    defines: Mapping[str, str] = field(default_factory=dict)
    wide: bool = True


# As `userfault.kernel._architecture.architecture` names them: all that linux-libc-dev has.
TARGETS: Mapping[str, Target] = {
    "x86_64": Target("x86", {"__x86_64__": "1"}),
    "x32": Target("x86", {"__x86_64__": "1", "__ILP32__": "1"}, wide=False),
    "i386": Target("x86", {"__i386__": "1"}, wide=False),
    "arm": Target("arm", {"__ARM_EABI__": "1"}, wide=False),
    "aarch64": Target("arm64"),
    "riscv64": Target("riscv"),
    "riscv32": Target("riscv", wide=False),
    "loongarch64": Target("loongarch"),
    "loongarch32": Target("loongarch", wide=False),
    "ppc64le": Target("powerpc", {"__powerpc64__": "1", "__LITTLE_ENDIAN__": "1"}),
    "ppc64": Target("powerpc", {"__powerpc64__": "1"}),
    "ppc": Target("powerpc", wide=False),
    "ppcle": Target("powerpc", {"__LITTLE_ENDIAN__": "1"}, wide=False),
    "s390x": Target("s390", {"__s390x__": "1"}),
    "mips": Target("mips", {"_MIPS_SIM": "_MIPS_SIM_ABI32"}, wide=False),
    "mipsn32": Target("mips", {"_MIPS_SIM": "_MIPS_SIM_NABI32"}, wide=False),
    "mips64": Target("mips", {"_MIPS_SIM": "_MIPS_SIM_ABI64"}),
    "sparc": Target("sparc", wide=False),
    "sparc64": Target("sparc", {"__arch64__": "1"}),
    "alpha": Target("alpha"),
    "parisc": Target("parisc", wide=False),
    "parisc64": Target("parisc", {"__LP64__": "1"}),
    "m68k": Target("m68k", wide=False),
    "sh": Target("sh", wide=False),
    "arc": Target("arc", wide=False),
}


@dataclass(frozen=True, slots=True)
class Headers:
    """One set of headers.

    Attributes:
        name: For messages, with the version.
        include: The folder that has `linux/`.
        uapi: The folder that has `ARCH/asm/`, None for the machine's own, which have one architecture only.
    """

    name: str
    include: Path
    uapi: Path | None = None

    @property
    def release(self) -> tuple[int, int, int]:
        """The version of Linux, (7, 3, 0)."""
        text = (self.include / "linux/version.h").read_text()
        code = int(re.findall(r"LINUX_VERSION_CODE (\d+)", text)[0])
        return code >> 16, code >> 8 & 255, code & 255

    @property
    def userfaultfd(self) -> str:
        """The text of linux/userfaultfd.h."""
        return _without_comments((self.include / "linux/userfaultfd.h").read_text())

    @property
    def fs(self) -> str:
        """The text of linux/fs.h."""
        return _without_comments((self.include / "linux/fs.h").read_text())

    def macro_names(self) -> set[str]:
        """Return every macro and enumerator of linux/userfaultfd.h, and those of PAGEMAP_SCAN."""
        names = {name for name in _names(self.userfaultfd) if name != "_LINUX_USERFAULTFD_H"}
        return names | {name for name in _names(self.fs) if FS_MACROS.match(name)}

    def member_paths(self) -> set[str]:
        """Return every member of every structure, "uffdio_copy.dst" or "uffd_msg.arg.fork.ufd"."""
        structs = dict(_structs(self.userfaultfd))
        scan = dict(_structs(self.fs))
        structs |= {name: scan[name] for name in FS_STRUCTS if name in scan}
        return {f"{name}.{path}" for name, body in structs.items() for path in _members(body, structs)}


def compiler() -> str:
    """Return the C compiler, or skip the test: the reason is the same everywhere."""
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler")
    return found


def machine() -> Headers:
    """Return the headers that this machine's programs are compiled with, or skip the test."""
    compiler()
    include = Path("/usr/include")
    if not (include / "linux/userfaultfd.h").exists():
        pytest.skip("this machine has no linux/userfaultfd.h")
    found = Headers("this machine's headers", include)
    return replace(found, name=f"{found.name} of Linux {'.'.join(map(str, found.release))}")


def newest() -> Headers:
    """Return the newest headers that can be had, or skip the test."""
    compiler()
    found = find_newest()
    if isinstance(found, str):
        pytest.skip(f"no newer kernel headers than this machine's: {found}")
    return found


@functools.cache
def find_newest() -> Headers | str:
    """Return the newest headers that can be had, or why there are none."""
    if not SCRIPT.exists():
        return "tools/headers.py is not here"
    with subprocess.Popen(
        [sys.executable, SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # apt and its helpers too
            return f"the download took more than {PATIENCE_S:.0f} s"
    if process.returncode != 0:
        said = errors.splitlines() or ["it said nothing"]
        return next((line for line in said if line.startswith("E: ")), said[-1])
    found = json.loads(output)
    folder = Path(found["folder"])
    name = f"linux-libc-dev {found['version']}"
    if warning := found.get("warning"):
        name = f"{name} ({warning})"
    return Headers(name, folder / "include", folder / "uapi")


def evaluate(
    headers: Headers, target: Target | None, macros: set[str], expressions: Mapping[str, str], folder: Path
) -> dict[str, int]:
    """Return what C says of macros and expressions; a macro that the headers lack is absent.

    Nothing of the C library is included, so that the headers of another kernel, and of another architecture, can be
    used with this machine's compiler: the structures are the same on all, only the macros differ.

    Args:
        headers: Which headers.
        target: Which architecture; None for this one.
        macros: Names of macros.
        expressions: Integer expressions of C; each must be one that these headers know.
        folder: For the program.
    """
    lines = [
        "#include <linux/types.h>",
        "#include <linux/ioctl.h>",
        "#include <linux/fs.h>",
        "#include <linux/userfaultfd.h>",
        "#include <asm/unistd.h>",
        "int printf(const char *, ...);",
        "int main(void) {",
    ]
    for name in sorted(macros):
        lines += [f"#ifdef {name}", _print(name, name), "#endif"]
    lines += [_print(name, expression) for name, expression in expressions.items()]
    source, object_file, program = folder / "program.c", folder / "program.o", folder / "program"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    # Two steps: with -undef, which hides this machine's architecture, gcc would also link in another way.
    subprocess.run(
        [compiler(), *_flags(headers, target), "-c", "-o", object_file, source], check=True, timeout=100
    )
    subprocess.run([compiler(), "-o", program, object_file], check=True, timeout=100)
    output = subprocess.run([program], capture_output=True, text=True, check=True, timeout=100).stdout
    return {name: int(value) for name, _, value in (line.rpartition("=") for line in output.splitlines())}


def _print(name: str, expression: str) -> str:
    return f'printf("%s=%llu\\n", "{name}", (unsigned long long)({expression}));'


def _flags(headers: Headers, target: Target | None) -> list[str]:
    if headers.uapi is None or target is None:
        return []
    size = 8 if target.wide else 4
    defines = {"__SIZEOF_POINTER__": f"{size}", "__SIZEOF_LONG__": f"{size}", **target.defines}
    return [
        "-undef",
        *(f"-D{name}={value}" for name, value in defines.items()),
        "-nostdinc",
        *("-isystem", str(headers.uapi / target.folder)),
        *("-isystem", str(headers.include)),
    ]


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL).replace("\\\n", " ")


def _names(text: str) -> Iterator[str]:
    yield from re.findall(r"^\s*#\s*define\s+(\w+)", text, re.MULTILINE)
    for body in re.findall(r"\benum\b[^{;]*\{([^}]*)\}", text):
        yield from re.findall(r"(?:^|,)\s*(\w+)", body)


def _structs(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the body of each structure at the top level."""
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    for found in re.finditer(r"\bstruct\s+(\w+)\s*\{", text):
        yield found[1], _braced(text, found.end())


def _braced(text: str, start: int) -> str:
    """Return the text up to the brace that closes the one before `start`."""
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[start : start + found.start()]
    raise ValueError(f"no closing brace: {text[start : start + 60]!r}")


def _members(body: str, structs: Mapping[str, str]) -> Iterator[str]:
    """Yield the paths of the members in the body of a structure or union."""
    position = 0
    while found := re.compile(r"\s*(?:(struct|union)\s*\{|([^;{}]*?)(\w+)(\s*\[[^]]*\])?\s*;)").match(
        body, position
    ):
        position = found.end()
        if found[1]:
            inner = _braced(body, position)
            name = re.compile(r"\s*(\w*)\s*;").match(body, position + len(inner) + 1)
            if name is None:
                raise ValueError(f"not understood: {body[position:]!r}")
            position = name.end()
            yield from (f"{name[1]}.{path}".lstrip(".") for path in _members(inner, structs))
            continue
        kind = re.fullmatch(r"\s*struct\s+(\w+)\s*", found[2])
        if kind and kind[1] in structs:
            yield from (f"{found[3]}.{path}" for path in _members(structs[kind[1]], structs))
        else:
            yield found[3]
    if body[position:].strip():
        raise ValueError(f"not understood: {body[position:]!r}")
