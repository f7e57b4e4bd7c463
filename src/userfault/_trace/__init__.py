"""Traces: what a recording holds, its file, and what follows from it. Pure functions of data; no engine, no kernel."""

from userfault._trace._faults import Activity, Latency, demand_and_ahead, fault_latency
from userfault._trace._file import TraceWriter, read_trace, write_trace
from userfault._trace._heat import Region, cold, heat_matrix, hot
from userfault._trace._model import LOADS, Cost, EventKind, Trace, TracedObject
from userfault._trace._plan import Plan, plan
from userfault._trace._totals import ObjectTotals, totals
from userfault._trace._working_set import WorkingSet, working_set

__all__ = [
    "LOADS",
    "Activity",
    "Cost",
    "EventKind",
    "Latency",
    "ObjectTotals",
    "Plan",
    "Region",
    "Trace",
    "TraceWriter",
    "TracedObject",
    "WorkingSet",
    "cold",
    "demand_and_ahead",
    "fault_latency",
    "heat_matrix",
    "hot",
    "plan",
    "read_trace",
    "totals",
    "working_set",
    "write_trace",
]
