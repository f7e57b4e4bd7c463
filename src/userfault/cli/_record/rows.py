"""What the rows of a recording are called, so that its legend can be read."""

from __future__ import annotations

from dataclasses import dataclass, field

from userfault.sizes import format_size

__all__ = ["Row", "Rows"]

# Arrays without names come in crowds: temporaries, or parts of something deep. Those of one name may differ in size.
_MOST, _MOST_UNNAMED, _MOST_OF_A_NAME = 256, 16, 4


@dataclass(eq=False, slots=True)
class Row:
    """One object of the trace: an array, or arrays of one size that came after each other under one name.

    Attributes:
        name: What the trace calls it.
        base: What its variable is called; "" of arrays without.
        nbytes: Size of its arrays in bytes.
        lead: Bytes of their first page that lie before them.
        arrays: How many there were.
        live: Whether there is one now.
    """

    name: str
    base: str
    nbytes: int
    lead: int = 0
    arrays: int = 1
    live: bool = True

    @property
    def is_settled(self) -> bool:
        """Whether its name is final: its variable's, or one for several arrays."""
        return self.base != "" or self.arrays > 1


@dataclass(slots=True)
class Rows:
    """Hands out rows.

    Attributes:
        left_out: Bytes of the arrays that got none, because there were too many.
    """

    left_out: list[int] = field(default_factory=list)
    _rows: list[Row] = field(default_factory=list)

    def take(self, base: str, nbytes: int, lead: int = 0) -> Row | None:
        """Return a row for a new array; None if there are too many.

        Args:
            base: Name of its variable, "" if it has none.
            nbytes: Its size.
            lead: How many bytes of its first page lie before it.
        """
        for row in self._rows:
            if not row.live and (row.base, row.nbytes, row.lead) == (base, nbytes, lead):
                row.live = True
                row.arrays += 1
                return row
        same = sum(row.base == base for row in self._rows)
        if len(self._rows) >= _MOST or same >= (_MOST_OF_A_NAME if base else _MOST_UNNAMED):
            self.left_out.append(nbytes)
            return None
        row = Row(self._free(base or f"unnamed {format_size(nbytes)}"), base, nbytes, lead)
        self._rows.append(row)
        return row

    def drop(self, row: Row) -> None:
        """Take back a row that could not be recorded."""
        row.live = False
        row.arrays -= 1
        if not row.arrays:
            self._rows.remove(row)

    def rename(self, row: Row, base: str) -> None:
        """Call a row, which is one array's without a name so far, after its variable."""
        row.name, row.base = self._free(base), base

    def _free(self, wanted: str) -> str:
        taken = {row.name for row in self._rows}
        name, number = wanted, 1
        while name in taken:
            number += 1
            name = f"{wanted} ({number})"
        return name
