"""A web server that fails as it is told."""

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves a folder; fails as it is told."""

    daemon_threads = True
    failures = 0  # of the next requests
    break_after: int | None = None  # bytes, of each answer
    tells_length = True  # of an answer that it breaks off
    trickle = 0.0  # seconds between two bytes
    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
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
        """Answer a range, and die in the middle of it."""
        data = Path(self.translate_path(self.path)).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + after])


def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder until the fixture that yields from this ends."""
    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
