"""What a store is: bytes by key, read by several threads at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

__all__ = ["KeyStore"]


class KeyStore(ABC):
    """Bytes by key, such as `"zarr.json"` and `"c/0/1"`. Any thread may call its methods.

    Attributes:
        location: Where it is, for messages.
        concurrency: How many reads at once are of use, None for as many as CPUs.
        zarr_path: Path of this place in `zarr_store()`.
    """

    location: str = ""
    concurrency: int | None = None
    zarr_path: str = ""

    @abstractmethod
    def get(self, key: str) -> Any | None:
        """Return the bytes at `key`, as anything with a buffer; None if there are none.

        Raises:
            Exception: It is not known whether there are any: no access, no connection.
        """

    @abstractmethod
    def zarr_store(self) -> Any:
        """Return a store of zarr with the same content at `zarr_path`, for what zarr itself must read."""

    def close(self) -> None:  # noqa: B027 - most stores hold nothing
        """Release what the store holds."""
