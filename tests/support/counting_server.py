"""The files of a folder behind HTTP or the S3 API, from a process of its own that counts what it sends.

A process of its own, because the thread that waits for a page holds the GIL, and a server in the same interpreter
could never answer.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.web import WebServer, serve

__all__ = ["BUCKET", "CountingServer", "serve_counted"]

BUCKET = "bucket"
# moto keeps larger objects on disk, and reads all of one for every range that it is asked for.
_IN_MEMORY_NBYTES = 1 << 30
_PUT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class CountingServer:
    """A server in another process.

    Attributes:
        url: Where it is.
    """

    url: str
    _process: subprocess.Popen[str]

    def sent(self) -> int:
        """Return how many bytes the answers to all GET requests so far had, without their headers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("sent\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextlib.contextmanager
def serve_counted(protocol: str, folder: Path) -> Iterator[CountingServer]:
    """Serve the files that are in `folder` now over `"http"`, or in the bucket `BUCKET` of an `"s3"` API."""
    command = [sys.executable, "-m", "support.counting_server", protocol, str(folder)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(_IN_MEMORY_NBYTES)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert url, "the server did not start: its message is in stderr"
            yield CountingServer(url, process)
        finally:
            # That is what it waits for.
            process.stdin.close()


# ---- in that process


@contextlib.contextmanager
def _serve_http(folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    with serve() as web:
        web.add_folder(folder)
        yield web.url, lambda: _asked(web)


def _asked(web: WebServer) -> int:
    """Sum what was asked for, which is what was sent."""
    total = 0
    for method, path, asked in list(web.requests):
        if method == "GET" and path in web.files:
            size = len(web.files[path])
            first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
            # "-5": the last five.
            start = int(first) if first else size - int(last)
            total += (min(int(last) + 1, size) if first and last else size) - start
    return total


@contextlib.contextmanager
def _serve_s3(folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        # A connection for each request: none is left open.
        protocol_version = "HTTP/1.0"

        def log(self, type: str, message: str, *args: Any) -> None:
            """Say nothing."""

    application = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()
    total = 0

    def counted(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        nonlocal total
        for piece in application(environ, start_response):
            if environ["REQUEST_METHOD"] == "GET":
                with lock:
                    total += len(piece)
            yield piece

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        _put(f"{url}/{BUCKET}", b"")
        for path in folder.rglob("*"):
            if path.is_file():
                _put(f"{url}/{BUCKET}/{path.relative_to(folder)}", path.read_bytes())
        yield url, lambda: total
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _put(url: str, content: bytes) -> None:
    # Without a type, urllib says that it is a form, and moto parses it.
    request = urllib.request.Request(url, content, {"Content-Type": "binary/octet-stream"}, method="PUT")
    with urllib.request.urlopen(request, timeout=_PUT_TIMEOUT_S) as answer:
        answer.read()


if __name__ == "__main__":
    with {"http": _serve_http, "s3": _serve_s3}[sys.argv[1]](Path(sys.argv[2])) as (the_url, the_count):
        print(the_url, flush=True)
        for _ in sys.stdin:
            print(the_count(), flush=True)
