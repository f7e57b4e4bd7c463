"""How a ratio is taken: both sides in processes of their own, repetitions in turn (A B A B), medians.

A *side* is a factory, named "module:function", that a child process calls with keyword arguments: a context
manager that gives a function, repetition number in, `Sample` out. Repetition 0 is the warm-up and is thrown
away. A *comparison* sets the userfault side against one or more references and gives one row for each of
them.
"""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.child import Child, ChildError
from benchmarks.machine import ForeignLoad


@dataclass(frozen=True)
class Scale:
    """How much work the rows do."""

    quick: bool
    """Tiny sizes: to see that everything runs, not to measure."""
    repeats: int
    """Repetitions of each side that count."""
    data: Path
    """Where test data and compiled programs are kept between runs."""


@dataclass(frozen=True)
class Target:
    """What the ratio userfault / reference should be, or the figure of userfault itself."""

    relation: Literal["≤", "≥"]
    bound: float
    unit: str = ""
    """Of the figure itself, empty for the ratio."""

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g} {self.unit}".rstrip()

    def met_by(self, ratio: float, figure: float) -> bool:
        judged = figure if self.unit else ratio
        return judged <= self.bound if self.relation == "≤" else judged >= self.bound


def at_most(ratio: float) -> Target:
    return Target("≤", ratio)


def at_least(ratio: float) -> Target:
    return Target("≥", ratio)


def figure_at_most(bound: float, unit: str) -> Target:
    """For what is no matter of comparison: the reference is only there to say what the machine can do."""
    return Target("≤", bound, unit)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: what the child process runs."""

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    label: str
    side: Side
    target: Target | None = None
    pinning: str | None = None
    """Where it runs, if that is not where userfault's side runs."""


@dataclass(frozen=True)
class Comparison:
    name: str
    unit: str
    ours: Side
    references: tuple[Reference, ...]
    source: str
    """What the bytes come from and how much of them: printed, because a speed without it says nothing."""
    one_cpu: bool = False
    """Every thread and process of either side is pinned to one CPU; otherwise nothing is pinned."""
    rounds: int = 1
    """How many times the usual number of repetitions: more for what is short and noisy."""
    placement: str = ""
    """What the sides pin themselves, in words."""
    not_run: str = ""
    """Why it is not run here: what this machine lacks."""

    @property
    def pinning(self) -> str:
        return self.placement or ("all on one CPU" if self.one_cpu else "unpinned")


@dataclass(frozen=True)
class Row:
    """One line of the table. `value` lists are in `unit`, one entry for each repetition."""

    name: str
    unit: str
    source: str
    pinning: str
    target: Target | None
    ours: list[float]
    reference: list[float]
    ours_extra: dict[str, float] = field(default_factory=dict)
    reference_extra: dict[str, float] = field(default_factory=dict)
    foreign_cpus: float = 0.0
    """How many CPUs other programs kept busy meanwhile. The more, the less the figures say."""
    failure: str | None = None

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.reference, strict=False)]

    @property
    def ratio(self) -> float | None:
        """Median of the ratios of neighbouring repetitions: slow drifts of the machine cancel out."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def verdict(self) -> str:
        if self.failure is not None or self.ratio is None:
            return "FAILED"
        if self.target is None:
            return "-"
        return "ok" if self.target.met_by(self.ratio, statistics.median(self.ours)) else "MISSED"


@dataclass
class _Runner:
    """A child and what it has measured; after its first failure it is left alone."""

    side: Side
    one_cpu: bool
    realtime: bool
    values: list[float] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)
    checks: list[float] = field(default_factory=list)
    failure: str | None = None
    child: Child | None = None

    def start(self, stack: ExitStack) -> None:
        try:
            self.child = stack.enter_context(
                Child(self.side.factory, self.side.arguments, one_cpu=self.one_cpu, realtime=self.realtime)
            )
            self.child.measure(0)
        except ChildError as error:
            self.failure = str(error)

    def measure(self, repetition: int) -> None:
        if self.child is None or self.failure is not None:
            return
        try:
            sample = self.child.measure(repetition)
        except ChildError as error:
            self.failure = str(error)
            return
        self.values.append(sample["value"])
        self.extra = sample["extra"]
        if sample["check"] is not None:
            self.checks.append(sample["check"])


def run(group: str, comparison: Comparison, repeats: int, *, realtime: bool = False) -> Iterator[Row]:
    """Measures one comparison and yields a row for each of its references."""
    ours = _Runner(comparison.ours, comparison.one_cpu, realtime)
    others = [_Runner(reference.side, comparison.one_cpu, realtime) for reference in comparison.references]
    foreign = ForeignLoad()
    with ExitStack() as stack:
        for runner in (ours, *others):
            runner.start(stack)
        for repetition in range(1, repeats * comparison.rounds + 1):
            for runner in (ours, *others):
                runner.measure(repetition)
    foreign_cpus = foreign.cpus()
    for reference, other in zip(comparison.references, others, strict=True):
        yield Row(
            name=f"{group}/{comparison.name}/{reference.label}",
            unit=comparison.unit,
            source=comparison.source,
            pinning=comparison.pinning
            + ("" if reference.pinning is None else f"; reference: {reference.pinning}")
            + (", real-time" if realtime else ""),
            target=reference.target,
            ours=ours.values,
            reference=other.values,
            ours_extra=ours.extra,
            reference_extra=other.extra,
            foreign_cpus=foreign_cpus,
            failure=_failure(ours, other),
        )


def _failure(ours: _Runner, other: _Runner) -> str | None:
    if ours.failure is not None:
        return f"userfault: {ours.failure}"
    if other.failure is not None:
        return f"reference: {other.failure}"
    # Both sides add up what they read, in the same order: a fast wrong answer is no answer.
    for mine, theirs in zip(ours.checks, other.checks, strict=False):
        if abs(mine - theirs) > 1e-9 * max(abs(mine), abs(theirs)):
            return f"the two sides read different bytes: sums {mine!r} and {theirs!r}"
    return None
