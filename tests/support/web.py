"""A web server for files: with ranges, without, compressing, changing, or failing.

In this process (`serve`) for sources; in a process of its own (`serve_folder`) for arrays, because the thread
that waits for a page holds the GIL, and a server in the same interpreter could never answer.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

__all__ = ["WebServer", "serve", "serve_folder"]

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class WebServer:
    """A server, and what it is to do.

    Attributes:
        url: Where it is.
        files: Content by path, such as `"/a.npy"`.
        ranges: Whether it heeds `Range`.
        compresses: Whether it sends everything as gzip, with `Content-Encoding`.
        fails: Whether it answers reads with 500.
        requests: What it was asked: method, path, value of `Range`.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    compresses: bool = False
    fails: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add_folder(self, folder: Path) -> None:
        """Serve the files below `folder`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[f"/{path.relative_to(folder)}"] = path.read_bytes()


@contextlib.contextmanager
def serve() -> Iterator[WebServer]:
    """Run a server until the end of the block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    web = WebServer(f"http://127.0.0.1:{server.server_address[1]}")
    server.web = web  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serve_folder(folder: Path, *, ranges: bool = True) -> Iterator[str]:
    """Run a server for the files that are in `folder` now, in a process of its own; gives its URL."""
    command = [sys.executable, __file__, str(folder), "ranges" if ranges else "whole"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            # That is what it waits for.
            process.stdin.close()


class _Server(http.server.ThreadingHTTPServer):
    # Its threads are waited for at the end.
    daemon_threads = False
    # With the default of 5, a burst of connections is dropped, and tried again a second later.
    request_queue_size = 128


class _Handler(http.server.BaseHTTPRequestHandler):
    # A connection for each request: none is left open.
    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        web: WebServer = self.server.web  # type: ignore[attr-defined]
        asked = self.headers.get("Range")
        web.requests.append((self.command, self.path, asked))
        content = web.files.get(self.path)
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        if web.fails and with_body:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        match = _RANGE.fullmatch(asked or "") if web.ranges and not web.compresses else None
        if match is not None:
            start, stop = _bounds(match[1], match[2], len(content))
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        else:
            self.send_response(HTTPStatus.OK)
            if web.compresses:
                content = gzip.compress(content, 1)
                self.send_header("Content-Encoding", "gzip")
        if web.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1 if last else size, size)


if __name__ == "__main__":
    with serve() as the_server:
        the_server.add_folder(Path(sys.argv[1]))
        the_server.ranges = sys.argv[2] == "ranges"
        print(the_server.url, flush=True)
        sys.stdin.read()
