"""How often a recorder looks, so that looking stays within a share of one CPU."""

from __future__ import annotations

__all__ = ["Pace"]

# An interval becomes longer at once, and shorter slowly.
_EASING = 0.3


class Pace:
    """The interval between two looks.

    Page faults that looking adds to the program have no part in it: a program that goes through its memory has one for
    each page, however seldom one looks.

    Args:
        every: The interval that is wanted, in seconds; it is never shorter.
        budget: Share of one CPU that looking may take.

    Attributes:
        interval: Seconds from the beginning of one look to that of the next.
        held_back: Whether the budget has made it much longer at any time.
    """

    def __init__(self, every: float, budget: float) -> None:
        self.every = every
        self.budget = budget
        self.interval = every
        self.held_back = False

    def looked(self, cpu_ns: int) -> None:
        """Learn how much CPU time a look has taken."""
        needed = max(self.every, cpu_ns * 1e-9 / self.budget)
        if needed < self.interval:
            needed = self.interval + (needed - self.interval) * _EASING
        self.interval = needed
        self.held_back = self.held_back or needed > 1.5 * self.every
