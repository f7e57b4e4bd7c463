"""Compiles the C parts when they are needed, with whatever `cc` the machine has."""

import hashlib
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent / "bare"


class CompilerError(Exception):
    """There is no C compiler, or it refused."""


def build(name: str, into: Path, *, shared: bool = False) -> Path:
    """Compiles `bare/NAME.c` with `-O2` into a program, or a shared library, and returns its path.

    The result is kept under the hash of all the sources, so that a changed source is compiled again.
    """
    digest = hashlib.sha256()
    for source in sorted(FOLDER.iterdir()):
        digest.update(source.read_bytes())
    result = into / "bare" / f"{name}-{digest.hexdigest()[:16]}{'.so' if shared else ''}"
    if result.exists():
        return result
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CompilerError("no C compiler found: install gcc")
    result.parent.mkdir(parents=True, exist_ok=True)
    partial = result.with_suffix(".partial")
    options = ["-O2", "-std=gnu11", "-Wall", "-Wextra", *(["-shared", "-fPIC"] if shared else ["-pthread"])]
    done = subprocess.run(
        [compiler, *options, "-o", partial, FOLDER / f"{name}.c"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CompilerError(f"cc could not compile {name}.c: {done.stderr.strip()}")
    partial.replace(result)
    return result
