"""Where data is: a local path or a URL, and which library is to reach it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from userfault.errors import FormatError, MissingExtraError

__all__ = ["Client", "Location"]

Client = Literal["fsspec", "obstore"]

# Schemes that obstore knows. It is preferred: its reads do not go through a Python event loop.
_OBSTORE_SCHEMES = frozenset({"s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https"})


@dataclass(frozen=True)
class Location:
    """A local path or a URL.

    Attributes:
        url: An absolute local path, or a URL.
        storage_options: For the client: credentials, endpoints.
        client: Which library to use for URLs, None to choose.
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    client: Client | None = None

    @classmethod
    def parse(
        cls,
        url: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        client: Client | None = None,
    ) -> Location:
        """Return the location that `url` means; relative paths and `file://` URLs become absolute paths.

        Raises:
            FormatError: It is a URL without a path, or a file of another host.
        """
        text = os.fspath(url)
        if not isinstance(text, str):
            raise FormatError(f"{text!r} is not a path or URL: give text")
        if not text:
            raise FormatError("'' is not a path or URL")
        if client not in (None, "fsspec", "obstore"):
            raise FormatError(f"client={client!r} is not known; give 'fsspec' or 'obstore'")
        if "://" in text and "::" not in text and urlsplit(text).scheme in ("file", "local"):
            parts = urlsplit(text)
            if parts.netloc not in ("", "localhost"):
                raise FormatError(f"{text} is a file of the host {parts.netloc!r}, not of this one")
            text = unquote(parts.path)
        # "simplecache::s3://..." chains filesystems; but "::" may also be in the name of a file.
        if "://" not in text and ("::" not in text or os.path.exists(text)):
            text = os.path.abspath(os.path.expanduser(text))
        return cls(text, dict(storage_options or {}), client)

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return self.url.startswith("/")

    @property
    def scheme(self) -> str:
        """`"s3"` of `s3://...`, `"file"` of a path, the first one of a chain such as `zip::s3://...`."""
        return "file" if self.is_local else self.url.partition("::")[0].partition("://")[0].lower()

    @property
    def is_process_memory(self) -> bool:
        """Whether it is fsspec's `memory://`, which no other process can see."""
        return "memory://" in self.url

    @property
    def name(self) -> str:
        """The last part of the path, without a query."""
        path = self.url if self.is_local else self.url.partition("?")[0].partition("#")[0]
        return path.rstrip("/").rpartition("/")[2] or self.url

    def __truediv__(self, key: str) -> Location:
        """Return the location of `key` below this one."""
        return Location(f"{self.url.rstrip('/')}/{key}", self.storage_options, self.client)

    def choose_client(self) -> Client:
        """Return the library to use for this URL.

        Raises:
            MissingExtraError: None that could be used is installed.
        """
        if self.client is not None:
            if importlib.util.find_spec(self.client) is None:
                raise MissingExtraError.for_module(self.client, self.client, f"reading {self.url}")
            return self.client
        has_fsspec = importlib.util.find_spec("fsspec") is not None
        # A query is part of an HTTP address (it may sign it), and object stores have none.
        suits = self.scheme in _OBSTORE_SCHEMES and "::" not in self.url and "?" not in self.url
        # Options without a word on whose they are: those of fsspec, as in pandas, xarray and Dask.
        foreign = bool(self.storage_options) and has_fsspec
        if suits and not foreign and importlib.util.find_spec("obstore") is not None:
            return "obstore"
        if has_fsspec:
            return "fsspec"
        extra = "obstore" if suits else "fsspec"
        raise MissingExtraError.for_module(extra, extra, f"reading {self.url}")
