"""Bytes that a worker process reads, by a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from userfault.sources._abc import Recipe

__all__ = ["WorkerData"]


@dataclass(frozen=True)
class WorkerData:
    """Bytes of the source that `recipe` makes in a worker process.

    Attributes:
        recipe: Pickled to the worker (see `userfault.sources._pickle.dumps`); its `load()` makes the source
            there.
    """

    recipe: Recipe
