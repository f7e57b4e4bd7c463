"""What a probe found, as the text that people see."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType

from userfault.kernel.probe import Finding, Group, Level, Negotiation, Status
from userfault.reports.findings import findings_table, memory_table, remedies


def text(what: RenderableType, width: int = 80, **options: Any) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(what, **options)
    return output.getvalue()


def finding(name: str, status: Status = Status.WORKS, *, memory: str = "", fix: str = "do this") -> Finding:
    evidence, remedy = ("seen", "") if status is Status.WORKS else ("EPERM: no", fix)
    return Finding(
        name, Group.ABILITY, memory, "6.8", Level.USED, Negotiation.OFFERED, f"what {name} is for",
        status, evidence, remedy,
    )  # fmt: skip


def test_a_table_says_since_when_and_whether_and_what_for() -> None:
    rows = [finding("move"), finding("poison", Status.MISSING), finding("hugetlb", Status.UNTRIED)]
    lines = text(findings_table("Arrays need", rows)).splitlines()
    assert lines[0].split("  ")[0] == "Arrays need"
    assert lines[0].split()[2:] == ["since", "here", "what", "it", "is", "for"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["move", "6.8", "yes"], ["poison", "6.8", "NO"], ["hugetlb", "6.8", "?"],
    ]  # fmt: skip
    assert lines[2].rstrip().endswith("what poison is for")
    assert "do this" not in "".join(lines)


def test_tables_below_each_other_line_up() -> None:
    first = text(findings_table("Arrays need", [finding("move")], first_width=20)).splitlines()
    second = text(findings_table("Others", [finding("poison")], headings=False, first_width=20)).splitlines()
    assert first[1].index("6.8") == second[1].index("6.8") == first[0].index("since")
    assert first[1].index("what") == second[1].index("what")
    assert second[0].split() == ["Others"]


def test_what_has_to_be_done_is_told_if_asked_for() -> None:
    assert "negotiated" not in text(findings_table("Bits", [finding("MOVE")]))
    told = text(findings_table("Bits", [finding("MOVE")], negotiation=True)).splitlines()
    assert "negotiated" in told[0]
    assert "offered" in told[1]


def test_types_of_memory_are_columns_and_the_impossible_is_a_dash() -> None:
    rows = [
        finding("COPY", memory="anonymous"),
        finding("COPY", Status.UNTRIED, memory="private hugetlb"),
        finding("MOVE", Status.MISSING, memory="anonymous"),
    ]
    lines = text(memory_table("Operation", rows)).splitlines()
    assert lines[0].split() == ["private"]
    assert lines[1].split() == ["Operation", "anonymous", "hugetlb"]
    assert [line.split() for line in lines[2:]] == [["COPY", "yes", "?"], ["MOVE", "NO", "–"]]


def test_each_remedy_is_told_once_for_everything_that_it_gives() -> None:
    newer = "Linux 7.3 or newer"
    rows = [
        finding("move"),
        finding("access", Status.MISSING, fix=newer),
        finding("device", Status.MISSING, fix="first step\nsecond step"),
        finding("RWP", Status.MISSING, fix=newer),
    ]
    found = remedies(rows)
    assert [remedy.what.plain for remedy in found] == ["access, RWP\n  EPERM: no", "device\n  EPERM: no"]
    assert found[1].steps.plain == "  → first step\n  → second step"
    assert remedies([finding("move")]) == []


def test_types_of_memory_are_named_only_where_it_is_not_all_of_them() -> None:
    rows = [
        finding("COPY", memory="anonymous"),
        *(
            finding(name, Status.UNTRIED, memory=memory)
            for name in ("COPY", "POISON")
            for memory in ("hugetlb", "x")
        ),
        finding("POISON", memory="anonymous"),
        finding("MOVE", Status.UNTRIED, memory="anonymous"),
    ]
    (remedy,) = remedies(rows)
    assert remedy.what.plain.splitlines()[0] == "COPY, POISON on hugetlb and x; MOVE"


def test_evidence_that_another_contains_is_not_repeated() -> None:
    device = finding("device", Status.MISSING)
    both = Finding(
        "faults", Group.ABILITY, "", "4.3", Level.USED, Negotiation.CALLED, "x", Status.MISSING,
        "EPERM: no; EACCES: no", "do this",
    )  # fmt: skip
    (remedy,) = remedies([both, device])
    assert remedy.what.plain == "faults, device\n  EPERM: no; EACCES: no"


def test_a_long_command_stays_one_line() -> None:
    command = "sudo tee " + "x" * 150
    (remedy,) = remedies([finding("move", Status.MISSING, fix=command)])
    assert text(remedy.steps, soft_wrap=True).splitlines() == [f"  → {command}"]
