"""The kernel's side of userfaultfd in plain Python, complete through Linux 7.3, for writers of their own handlers.

Needs no compiled code and nothing outside the standard library (`pagemap` gives its results as NumPy arrays).
**Read the GIL trap at the top of `userfault.kernel.userfaultfd` first.**
"""

from userfault.kernel import abi, errors, events, handoff, mapping, pagemap, serving
from userfault.kernel.abi import Feature, RegisterMode
from userfault.kernel.events import FaultKind, Fork, PageFault, Remap, Remove, Unmap
from userfault.kernel.mapping import Mapping
from userfault.kernel.probe import Access, Finding, Group, KernelReport, Level, Negotiation, Status, probe
from userfault.kernel.userfaultfd import OpenWay, Outcome, Registration, Userfaultfd

__all__ = [
    "Access",
    "FaultKind",
    "Feature",
    "Finding",
    "Fork",
    "Group",
    "KernelReport",
    "Level",
    "Mapping",
    "Negotiation",
    "OpenWay",
    "Outcome",
    "PageFault",
    "RegisterMode",
    "Registration",
    "Remap",
    "Remove",
    "Status",
    "Unmap",
    "Userfaultfd",
    "abi",
    "errors",
    "events",
    "handoff",
    "mapping",
    "pagemap",
    "probe",
    "serving",
]
