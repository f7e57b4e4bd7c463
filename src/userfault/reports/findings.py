"""What a probe found, for the terminal: what works, what does not, and how to get it.

Each function takes plain findings and returns something that Rich prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from userfault.errors import MissingExtraError

try:
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise MissingExtraError.for_module("rich", "cli", "printing tables") from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from userfault.kernel import Finding

__all__ = ["Remedy", "findings_table", "memory_table", "remedies"]

_MARKS: Final = {"works": ("yes", "green"), "missing": ("NO", "bold red"), "untried": ("?", "bold yellow")}


def _mark(finding: Finding) -> Text:
    word, style = _MARKS[finding.status]
    return Text(word, style=style)


def _table(*columns: str, first_width: int = 0) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True)
    table.columns[0].min_width = first_width
    return table


def findings_table(
    title: str,
    findings: Iterable[Finding],
    *,
    headings: bool = True,
    negotiation: bool = False,
    first_width: int = 0,
) -> Table:
    """List findings: since when there is such a thing, whether it works here, what it is for.

    Args:
        title: Of the first column.
        findings: In the order to list them.
        headings: Whether the other columns have theirs.
        negotiation: Whether to tell what a program has to do for each.
        first_width: Least width of the first column, so that tables stand below each other.
    """
    names = ["since", "here", *(["negotiated"] if negotiation else []), "what it is for"]
    *narrow, last = names if headings else [""] * len(names)
    table = _table(title, *narrow, first_width=first_width)
    table.add_column(last)
    for column, widest in zip(table.columns[1:], ("2.6.38", "here"), strict=False):
        column.min_width = len(widest)
    for finding in findings:
        negotiated = [finding.negotiated] if negotiation else []
        table.add_row(f"  {finding.name}", finding.since, _mark(finding), *negotiated, Text(finding.enables))
    return table


def memory_table(title: str, findings: Iterable[Finding]) -> Table:
    """Show operations by types of memory. What is on no type of memory by design is a dash."""
    rows: dict[str, dict[str, Finding]] = {}
    memories: dict[str, None] = {}
    for finding in findings:
        rows.setdefault(finding.name, {})[finding.memory] = finding
        memories[finding.memory] = None
    table = _table(title)
    for memory in memories:
        table.add_column(memory.replace(" ", "\n"), justify="center", vertical="bottom")
    for name, row in rows.items():
        cells = (_mark(row[memory]) if memory in row else Text("–", style="dim") for memory in memories)
        table.add_row(f"  {name}", *cells)
    return table


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way to get something.

    Attributes:
        what: What is missing or could not be tried, and why.
        steps: What to do, one step a line. Print it with `soft_wrap`, so that commands can be copied.
    """

    what: Text
    steps: Text


def remedies(findings: Sequence[Finding]) -> list[Remedy]:
    """Say of everything that does not work why, and how to get it: each way once."""
    by_fix: dict[str, list[Finding]] = {}
    for finding in findings:
        if not finding.available:
            by_fix.setdefault(finding.fix, []).append(finding)
    found = []
    for fix, group in by_fix.items():
        what = Text(_subjects(group, findings), style="bold")
        reasons = dict.fromkeys(finding.evidence for finding in group)
        for reason in reasons:
            if not any(reason in other and reason != other for other in reasons):
                what.append(f"\n  {reason}", style="not bold dim")
        steps = "\n".join(f"  → {step}" for step in fix.splitlines())
        found.append(Remedy(what, Text(steps, style="yellow")))
    return found


def _subjects(group: Sequence[Finding], findings: Sequence[Finding]) -> str:
    """Name what has the same remedy; types of memory only where it is not all of them."""
    memories: dict[str, list[str]] = {}
    for finding in group:
        memories.setdefault(finding.name, []).append(finding.memory)
    names: dict[tuple[str, ...], list[str]] = {}
    for name, those in memories.items():
        every = len(those) == sum(finding.name == name for finding in findings)
        names.setdefault(() if every else tuple(those), []).append(name)
    return "; ".join(
        ", ".join(those) + (f" on {' and '.join(memory)}" if memory else "")
        for memory, those in names.items()
    )
