"""obstore: stores for URLs, and its errors in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

from userfault.errors import SourceError, SourceNotFoundError
from userfault.sources._location import Location

__all__ = ["make_store", "obstore_errors", "split_object"]


def make_store(location: Location, *, timeout: str | None = None) -> Any:
    """Return an obstore store whose root is `location`.

    Raises:
        SourceError: The URL or an option is not understood.
    """
    from obstore.store import HTTPStore, from_url

    options: dict[str, Any] = dict(location.storage_options)
    client_options: Any = dict(options.pop("client_options", None) or {})
    if timeout is not None:
        client_options.setdefault("timeout", timeout)
    # The default is to try for three minutes. The engine asks again by itself, and a read has a deadline.
    options.setdefault("retry_config", {"max_retries": 3, "retry_timeout": timedelta(seconds=20)})
    with obstore_errors(location.url):
        if location.scheme in ("http", "https"):
            # from_url would take an address of a cloud's own domain for a bucket that needs credentials.
            client_options.setdefault("allow_http", location.scheme == "http")
            return HTTPStore.from_url(location.url, client_options=client_options, **options)
        return from_url(location.url, client_options=client_options or None, **options)


def split_object(location: Location) -> tuple[Location, str]:
    """Split the URL of one object into a store's root and a key."""
    parent, _, key = location.url.rstrip("/").rpartition("/")
    if not urlsplit(parent).netloc:
        raise SourceError(f"{location.url} names no object: give the URL of a file")
    return Location(parent, location.storage_options, location.client), key


@contextlib.contextmanager
def obstore_errors(url: str, done: Literal["read", "written"] = "read") -> Iterator[None]:
    """Raise obstore's errors as ours, met when `url` was to be read or written."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{url} does not exist", detail=str(error)) from error
    except BaseError as error:
        hint = " (client='fsspec' reads it through fsspec, which also knows credentials in files)"
        raise SourceError(
            f"{url} cannot be {done} through obstore: {_first_line(error)}{hint if done == 'read' else ''}",
            detail=str(error),
        ) from error
    except PermissionError as error:
        raise SourceError(f"{url} may not be {done}: {_first_line(error)}", detail=str(error)) from error
    except OSError as error:
        raise SourceError(
            f"{url} cannot be {done}: {_first_line(error)}", detail=str(error), errno=error.errno
        ) from error


def _first_line(error: BaseException) -> str:
    # obstore appends the whole structure of the error in Rust's debug form.
    return str(error).partition("\n")[0].strip()
