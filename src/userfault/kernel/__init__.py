"""The kernel's side of userfaultfd in plain Python: numbers, structures, and what this machine can do.

Needs no compiled code and nothing outside the standard library.
"""

from userfault.kernel.probe import Access, Finding, KernelReport, Level, probe

__all__ = ["Access", "Finding", "KernelReport", "Level", "probe"]
