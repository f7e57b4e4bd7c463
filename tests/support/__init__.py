"""What the tests share: a Python in a subprocess, a look for leaks, and what this machine allows."""

from support.processes import Finished, run_python

__all__ = ["Finished", "run_python"]
