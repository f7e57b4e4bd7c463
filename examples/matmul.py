"""A product of two matrices, tile by tile.

    python examples/matmul.py --size 5120 --tile 512
    userfault record --accesses examples/matmul.py

For each tile of the result a band of rows of `left` and a band of columns of `right` are read. A picture of it shows
`left` read from top to bottom once, all of `right` again for every band, and `result` written from top to bottom.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray


def multiply(left: NDArray[Any], right: NDArray[Any], result: NDArray[Any], tile: int) -> None:
    """Put the product into `result`, one square tile after the other."""
    size = len(left)
    scratch = np.empty((tile, tile), left.dtype)
    for row in range(0, size, tile):
        for column in range(0, size, tile):
            target = result[row : row + tile, column : column + tile]
            part = scratch[: target.shape[0], : target.shape[1]]
            for inner in range(0, size, tile):
                a = left[row : row + tile, inner : inner + tile]
                b = right[inner : inner + tile, column : column + tile]
                np.matmul(a, b, out=part)
                target += part


def main() -> None:
    """Multiply, then compare one row with the whole product's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=5120, help="rows and columns of the matrices")
    parser.add_argument("--tile", type=int, default=512, help="rows and columns of a tile")
    parser.add_argument("--seconds", type=float, default=5.0, help="begin again until so much time has gone")
    options = parser.parse_args()

    generator = np.random.default_rng(1)
    left = generator.standard_normal((options.size, options.size), np.float32)
    right = generator.standard_normal((options.size, options.size), np.float32)
    result = np.zeros((options.size, options.size), np.float32)
    end = time.monotonic() + options.seconds
    products = 0
    while products == 0 or time.monotonic() < end:
        result[:] = 0
        multiply(left, right, result, options.tile)
        products += 1
    row = options.size // 2
    error = float(np.abs(left[row] @ right - result[row]).max())
    print(f"{products} products of {options.size} × {options.size} matrices; greatest difference {error:.1e}")


if __name__ == "__main__":
    main()
