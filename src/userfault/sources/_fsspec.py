"""fsspec: filesystems for URLs, and its errors in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from userfault.errors import MissingExtraError, SourceError, SourceNotFoundError, UserfaultError
from userfault.sources._location import Location

__all__ = ["filesystem", "fsspec_errors"]

# What fsspec needs beside itself, and the extra of userfault that brings it.
_NEEDS = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "http": ("aiohttp", "fsspec"),
    "https": ("aiohttp", "fsspec"),
}


def filesystem(location: Location) -> tuple[Any, str]:
    """Return fsspec's filesystem for `location`, and the path in it.

    Raises:
        MissingExtraError: The package for this kind of URL is not installed.
        SourceError: The URL or an option is not understood.
    """
    import fsspec

    options = dict(location.storage_options)
    if location.scheme in ("http", "https"):
        # A compressed answer has no ranges that mean anything.
        client = dict(options.get("client_kwargs") or {})
        client["headers"] = {"Accept-Encoding": "identity", **(client.get("headers") or {})}
        options["client_kwargs"] = client
    try:
        fs, path = fsspec.url_to_fs(location.url, **options)
    except ImportError as error:
        module, extra = _NEEDS.get(location.scheme, (str(error.name or location.scheme), "fsspec"))
        raise MissingExtraError.for_module(module, extra, f"reading {location.url}") from error
    except (ValueError, TypeError, OSError) as error:
        raise SourceError(f"{location.url} cannot be opened: {error}", detail=str(error)) from error
    return fs, str(path).rstrip("/")


@contextlib.contextmanager
def fsspec_errors(url: str) -> Iterator[None]:
    """Raise the errors of any filesystem of fsspec as ours."""
    try:
        yield
    except UserfaultError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SourceNotFoundError(f"{url} does not exist", detail=str(error)) from error
    except Exception as error:  # each filesystem has errors of its own
        detail = str(error) or type(error).__name__
        raise SourceError(f"{url} cannot be read: {detail}", detail=detail) from error
