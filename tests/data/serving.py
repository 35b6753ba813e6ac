"""A web server with configurable failures."""

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves a folder, with configurable failures."""

    daemon_threads = True
    failures = 0  # number of next requests to answer with 503
    break_after: int | None = None  # close the connection after this many bytes
    sends_length = True  # whether a response that breaks off has a Content-Length
    trickle = 0.0  # seconds between two bytes
    requested: list[str]  # paths

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        elif self.server.break_after is not None:
            self.break_off(self.server.break_after)
        elif self.server.trickle:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b"x")
                    time.sleep(self.server.trickle)
        else:
            super().do_GET()

    def break_off(self, after: int) -> None:
        """Send the start of the requested range, then close the connection."""
        data = Path(self.translate_path(self.path)).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        if self.server.sends_length:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + after])


def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder until the fixture that uses this generator is torn down."""
    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.requested = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
