"""A web server that serves bytes and, by script, misbehaves."""

from __future__ import annotations

import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """`files` by path; `script[path]` is what the next requests for it meet, one word each, "ok" once it is empty:
    drop (closes halfway), stall (sends half, then nothing), short (answers with half of the range, complete as such),
    alter (flips a bit), 404, 503, no-range (sends everything), elsewhere (sends another range), gone (closes at once).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.script: dict[str, deque[str]] = defaultdict(deque)
        self.always: str | None = None  # instead of the script
        self.fail_after: int | None = None  # answer 503 from this request on
        self.requests: list[tuple[str, str | None]] = []  # path and Range
        self.connections: set[int] = set()  # client ports
        self.authorizations: list[str | None] = []  # of each request
        self.expects: str | None = None  # answer 401 to any other
        self.moved: dict[str, str] = {}  # path to address
        self.closing = threading.Event()
        self.address = ""

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            asked = self.headers.get("Range")
            server.requests.append((path, asked))
            server.connections.add(self.client_address[1])
            server.authorizations.append(self.headers.get("Authorization"))
            if path in server.moved:
                self.send_response(302)
                self.send_header("Location", server.moved[path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            script = server.script[path]
            behaviour = server.always or (script.popleft() if script else "ok")
            if server.fail_after is not None and len(server.requests) > server.fail_after:
                behaviour = "503"
            data = server.files.get(path)
            if server.expects not in (None, server.authorizations[-1]):
                behaviour = "401"
            self.close_connection = behaviour != "ok"
            if behaviour == "gone":
                return
            if behaviour.isdigit() or data is None:
                self.send_response(int(behaviour) if behaviour.isdigit() else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, stop = 0, len(data)
            if asked and behaviour != "no-range":
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()  # type: ignore[union-attr]
                start, stop = int(first), min(int(last) + 1, stop) if last else stop
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            body = data[start:stop]
            if behaviour == "short" and asked:
                body = body[: len(body) // 2]
                stop = start + len(body)
            if behaviour == "elsewhere":
                body = body[1:] + b"?"
            if behaviour == "alter":
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            self.send_response(206 if asked and behaviour != "no-range" else 200)
            if asked and behaviour != "no-range":
                shown = start + 1 if behaviour == "elsewhere" else start
                self.send_header("Content-Range", f"bytes {shown}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if behaviour in ("drop", "stall"):
                body = body[: len(body) // 2]
            self.wfile.write(body)
            self.wfile.flush()
            if behaviour == "stall":
                server.closing.wait(20)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    http = Quiet(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()
