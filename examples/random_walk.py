"""Walkers on a graph: where do they come by, if all of them start at one node?

    python examples/random_walk.py --nodes 2000000 --seconds 8
    userfault record --accesses examples/random_walk.py

The graph is in compressed sparse rows: the neighbours of node k are `neighbours[first[k] : first[k + 1]]`. Most edges
lead to nodes near by, a few to hubs, which have low numbers. A picture of it shows the crowd that spreads from the
middle, and the hubs.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 20


def graph(nodes: int, degree: int, reach: int, hubs: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a graph in compressed sparse rows: where each node's neighbours begin, and all neighbours."""
    generator = np.random.default_rng(1)
    first = np.zeros(nodes + 1, np.int64)
    for start in range(0, nodes, PIECE):
        stop = min(start + PIECE, nodes)
        first[start + 1 : stop + 1] = generator.integers(1, 2 * degree, stop - start)
    np.cumsum(first, out=first)
    neighbours = np.empty(first[-1], np.int32)
    for start in range(0, nodes, PIECE // 16):
        stop = min(start + PIECE // 16, nodes)
        edges = neighbours[first[start] : first[stop]]
        own = np.repeat(np.arange(start, stop, dtype=np.int32), np.diff(first[start : stop + 1]))
        near = own + generator.integers(-reach, reach + 1, len(own), dtype=np.int32)
        np.clip(near, 0, nodes - 1, out=edges)
        to_hub = generator.random(len(own)) < hubs
        edges[to_hub] = nodes / 20 * generator.random(int(to_hub.sum())) ** 4
    return first, neighbours


def main() -> None:
    """Walk for some seconds and print how far the crowd came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2_000_000, help="nodes of the graph")
    parser.add_argument("--degree", type=int, default=16, help="mean number of edges of a node")
    parser.add_argument("--walkers", type=int, default=20_000, help="how many walk at the same time")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long they walk")
    options = parser.parse_args()

    first, neighbours = graph(options.nodes, options.degree, options.nodes // 100, 0.001)
    visits = np.zeros(options.nodes, np.int64)
    generator = np.random.default_rng(2)
    at = np.full(options.walkers, options.nodes // 2)
    steps = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        begins, ends = first[at], first[at + 1]
        at = neighbours[begins + (generator.random(len(at)) * (ends - begins)).astype(np.int64)]
        np.add.at(visits, at, 1)
        steps += 1
    print(
        f"{steps} steps of {options.walkers} walkers: {np.count_nonzero(visits):,} of {options.nodes:,} nodes seen"
    )


if __name__ == "__main__":
    main()
