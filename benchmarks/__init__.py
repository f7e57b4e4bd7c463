"""Benchmarks: `python -m benchmarks` from the project's root prints one table, every ratio taken in one run.

One file per group of rows (`faults`, `scans`, `lookups`, `replacement`, `startup`, `peers`); `harness` says
how a ratio is taken.
"""
