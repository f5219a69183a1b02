"""A web server on 127.0.0.1 for tests of URLs."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        requests: (method, path) of each.
        weak: paths whose next requests, as many as it says, are answered with status 503.
        short: paths whose answers end after half of what they announce.
        without_head: whether HEAD is answered with status 501.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.requests: list[tuple[str, str]] = []
        self.weak: dict[str, int] = {}
        self.short: set[str] = set()
        self.without_head = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path))
        if self.server.weak.get(self.path, 0):
            self.server.weak[self.path] -= 1
            self.send_error(503)
        elif self.path in self.server.short:
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path))
        if self.server.without_head:
            self.send_error(501)
        else:
            super().do_HEAD()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server that runs during the block."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
