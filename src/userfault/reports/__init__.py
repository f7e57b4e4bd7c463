"""Reports: pure functions from recorded facts to text and pictures.

What they draw comes in as plain data (`Recording`); nothing here knows the engine.
`userfault.reports.picture` needs Matplotlib, `userfault.reports.tables` and `userfault.reports.heatmap` need
Rich.
"""

from userfault.reports._recording import TRACE_DTYPE, Kind, Phase, Recording
from userfault.reports._replay import touched_blocks
from userfault.reports._run import PhaseReport, RunReport
from userfault.reports._text import format_duration

__all__ = [
    "TRACE_DTYPE",
    "Kind",
    "Phase",
    "PhaseReport",
    "Recording",
    "RunReport",
    "format_duration",
    "touched_blocks",
]
