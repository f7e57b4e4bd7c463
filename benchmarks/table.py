"""The table and the JSON: rows in, text out."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Row

_NAME = 44
_DISTURBED_CPUS = 0.2


def head(facts: dict[str, str]) -> str:
    lines = [f"{name:>12}  {value}" for name, value in facts.items()]
    columns = (
        f"{'row':<{_NAME}} {'userfault':>11} {'reference':>11} {'unit':<10} {'ratio':>8} {'(from – to)':>17}"
    )
    return "\n".join([*lines, "", f"{columns}  {'target':<8} {'':<7} threads"])


def line(row: Row) -> str:
    """One row, with a second line for percentiles where the sides gave them."""
    ratios = row.ratios
    spread = f"({_short(min(ratios))} – {_short(max(ratios))})" if ratios else ""
    text = (
        f"{row.name:<{_NAME}} {_median(row.ours):>11} {_median(row.reference):>11} {row.unit:<10} "
        f"{_short(row.ratio):>8} {spread:>17}  {row.target or '-'!s:<8} {row.verdict:<7} {row.pinning}"
    )
    if row.failure is not None:
        text += f"\n{'':4}{row.failure}"
    remarks = [
        f"{name} {_short(row.ours_extra[name])} | {_short(row.reference_extra[name])}"
        for name in row.ours_extra
        if name in row.reference_extra
    ]
    if row.foreign_cpus >= _DISTURBED_CPUS:
        remarks.append(f"disturbed: other programs used {row.foreign_cpus:.1f} CPUs")
    if remarks:
        text += f"\n{'':4}{', '.join(remarks)}"
    return text


def source(row: Row) -> str:
    return f"\n# {row.source}"


def summary(rows: Sequence[Row]) -> str:
    verdicts = [row.verdict for row in rows]
    words = {"ok": "ok", "MISSED": "MISSED", "FAILED": "FAILED", "-": "without a target"}
    counts = [f"{verdicts.count(verdict)} {word}" for verdict, word in words.items() if verdict in verdicts]
    return f"\n{len(rows)} rows: {', '.join(counts)}"


def as_json(facts: dict[str, str], rows: Sequence[Row], command: str) -> str:
    return json.dumps({"machine": facts, "command": command, "rows": [_row(row) for row in rows]}, indent=2)


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "unit": row.unit,
        "source": row.source,
        "pinning": row.pinning,
        "userfault": row.ours,
        "reference": row.reference,
        "userfault_extra": row.ours_extra,
        "reference_extra": row.reference_extra,
        "ratio": row.ratio,
        "target": str(row.target) if row.target else None,
        "foreign_cpus": row.foreign_cpus,
        "verdict": row.verdict,
        "failure": row.failure,
    }


def _median(values: Sequence[float]) -> str:
    return _short(statistics.median(values)) if values else "-"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
