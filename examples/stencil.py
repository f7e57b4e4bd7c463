"""Heat that spreads over a plate: Jacobi sweeps over a grid, one band of rows after the other.

    python examples/stencil.py --size 6144 --seconds 6
    userfault record examples/stencil.py

Two grids take turns: a sweep reads one and writes the other, from the first row to the last. A picture of it shows a
diagonal line for each sweep, once in `grid` and once in `new`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray


def sweep(grid: NDArray[Any], new: NDArray[Any], rows: int) -> None:
    """Set every inner point of `new` to the mean of its four neighbours in `grid`, `rows` rows at a time."""
    size = len(grid)
    for first in range(1, size - 1, rows):
        last = min(first + rows, size - 1)
        band = new[first:last, 1:-1]
        np.add(grid[first - 1 : last - 1, 1:-1], grid[first + 1 : last + 1, 1:-1], out=band)
        band += grid[first:last, :-2]
        band += grid[first:last, 2:]
        band *= 0.25


def main() -> None:
    """Sweep for some seconds and print how much heat has entered."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=6144, help="rows and columns of the grid")
    parser.add_argument("--rows", type=int, default=32, help="rows of a band")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to sweep")
    options = parser.parse_args()

    grid = np.zeros((options.size, options.size))
    grid[0] = 100.0  # the hot edge
    new = grid.copy()
    sweeps = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        sweep(grid, new, options.rows)
        sweep(new, grid, options.rows)
        sweeps += 2
    print(f"{sweeps} sweeps over {options.size} × {options.size}: mean {grid.mean():.6f}")


if __name__ == "__main__":
    main()
