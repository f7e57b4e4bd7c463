"""Checks the layers of the design with import-linter: `python tools/layers.py`.

import-linter reads Python sources only, so to it the compiled modules do not exist, and a
forbidden import of one would go unseen. The contracts in pyproject.toml are therefore checked on a copy of the
package in which their stubs stand as Python modules.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Return import-linter's exit code: 0 when every contract is kept."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "userfault")
        shutil.copytree(ROOT / "src" / "userfault", package, ignore=shutil.ignore_patterns("__pycache__"))
        for stub in package.glob("_*.pyi"):
            shutil.copy(stub, stub.with_suffix(".py"))
        run = "from importlinter.cli import lint_imports_command; lint_imports_command()"
        # The copy must win over the installed package, which comes later in the path. Without `site` (-S) no .pth
        # file is read either: an editable installation would put its own finder before all paths.
        command = [sys.executable, "-S", "-c", run, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
        path = os.pathsep.join([folder, *sys.path[1:]])  # [0] is the folder of this file
        return subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
