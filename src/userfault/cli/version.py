"""`userfault version`."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from userfault.cli._output import DebugOption, JsonOption, command, print_json

__all__ = ["version"]

# What a report of a problem should name.
_PACKAGES = ("userfault", "numpy", "zarr", "numcodecs", "fsspec", "obstore", "h5py", "tensorstore")


@command
def version(*, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the versions of userfault and of what it works with."""
    found = {"python": platform.python_version(), "kernel": os.uname().release}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if as_json:
        print_json(found)
        return
    print(f"userfault {found.get('userfault', '(not installed)')}")
    others = (f"{name} {number}" for name, number in found.items() if name != "userfault")
    print(", ".join(others))
