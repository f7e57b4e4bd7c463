"""What a store is: bytes by key, read by several threads at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from userfault.errors import ModeError
from userfault.sources._location import Location

__all__ = ["KeyStore", "refuse_web"]


class KeyStore(ABC):
    """Bytes by key, such as `"zarr.json"` and `"c/0/1"`. Any thread may call its methods.

    Attributes:
        location: Where it is, for messages.
        concurrency: How many reads at once are of use, None for as many as CPUs.
        zarr_path: Path of this place in `zarr_store()`.
        transactional: Whether what is written becomes visible and durable only by `sync`, all at once.
    """

    location: str = ""
    concurrency: int | None = None
    zarr_path: str = ""
    transactional: bool = False

    @abstractmethod
    def get(self, key: str) -> Any | None:
        """Return the bytes at `key`, as anything with a buffer; None if there are none.

        Raises:
            Exception: It is not known whether there are any: no access, no connection.
        """

    @abstractmethod
    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return a store of zarr with the same content at `zarr_path`, for what zarr itself must read or write.

        Raises:
            ModeError: It is to be writable, and cannot be.
        """

    def sync(self, nbytes: int) -> bool:
        """Make durable what was written to `zarr_store(writable=True)`: `nbytes` of the array since the last time.

        Returns:
            Whether another store has taken the place of this one, so that what is open in it must be opened again. So
            it may be after an error.

        Raises:
            Exception: It is not durable.
        """
        return False  # what object stores took is durable

    def close(self) -> None:  # noqa: B027 - most stores hold nothing
        """Release what the store holds."""


def refuse_web(location: Location) -> None:
    """Check that a URL is of a kind that can be written.

    Raises:
        ModeError: It is a web server, or a chain of file systems, of which the outer ones only read.
    """
    if location.scheme in ("http", "https") or "::" in location.url:
        what = "a chain of file systems" if "::" in location.url else "on a web server"
        raise ModeError(
            f"{location.url} is {what} and cannot be written: open it with mode='c' for changes that stay private, "
            "or give the URL of the object store itself"
        )
