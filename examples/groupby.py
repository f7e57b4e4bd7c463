"""Sums and means by key, over a table of some hundred megabytes.

    pip install pandas
    python examples/groupby.py --rows 10000000 --seconds 8
    userfault record examples/groupby.py

Each round groups the table by shop, joins what it found to the table again, and makes a new column of it. A picture
of it shows the columns written one after the other, and the temporaries of a group-by.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time

import numpy as np


def main() -> None:
    """Group for some seconds and print the largest group."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table")
    parser.add_argument("--groups", type=int, default=50_000, help="how many keys there are")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to group")
    options = parser.parse_args()
    if importlib.util.find_spec("pandas") is None:
        print("groupby.py: skipped, pandas is not installed: pip install pandas", file=sys.stderr)
        return
    import pandas as pd

    generator = np.random.default_rng(1)
    shop = generator.integers(0, options.groups, options.rows)
    price = generator.gamma(2.0, 10.0, options.rows)
    amount = generator.integers(1, 20, options.rows)
    table = pd.DataFrame({"shop": shop, "price": price, "amount": amount}, copy=False)
    rounds = 0
    end = time.monotonic() + options.seconds
    while rounds == 0 or time.monotonic() < end:
        table["paid"] = table["price"] * table["amount"]
        totals = table.groupby("shop")["paid"].agg(["sum", "mean"])
        table["share"] = table["paid"] / totals["sum"].to_numpy()[table["shop"].to_numpy()]
        rounds += 1
    best = totals["sum"].idxmax()
    print(f"{rounds} rounds over {options.rows:,} rows: shop {best} took {totals['sum'].max():,.2f}")


if __name__ == "__main__":
    main()
