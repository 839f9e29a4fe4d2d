"""An HTTP proxy on loopback before a store, which fails as stores and networks do."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: What happens to a share of all requests; each request meets one of them at most.
#: `refused`: 503 at once. `lost`: 503 after the store has done what was asked.
#: `hung up`: the connection is closed after that, without a word.
#: `cut`: the connection is closed in the middle of the answer's body, or of the request's.
KINDS = ("refused", "lost", "hung up", "cut")


class FlakyProxy:
    """Passes requests on to `upstream` and fails some of them.

    Attributes:
        shares: part of the requests (0 to 1) that meets each of KINDS.
        delay: seconds that a request waits, drawn between 0 and this.
        counts: how many requests met each kind, "away" among them, and "passed" for all others.
        created: when (time.time) the store confirmed the first create of each key.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.shares: dict[str, float] = {}
        self.delay = 0.0
        self.counts: Counter[str] = Counter()
        self.created: dict[str, float] = {}
        self._draw, self._lock = random.Random(seed), threading.Lock()
        self._open: set[socket.socket] = set()
        self._leave: tuple[str, int, float] | None = None
        self._away: threading.Thread | None = None
        self._server: ThreadingHTTPServer | None = None
        self._listen(0)

    @property
    def endpoint(self) -> str:
        """Where clients are to go instead of `upstream`."""
        return f"http://127.0.0.1:{self._own_port}"

    def go_away(self, part: str, creates: int, seconds: float) -> None:
        """Refuse connections for so long, once so many keys with `part` in them are created."""
        self._leave = (part, creates, seconds)

    def close(self) -> None:
        """End the proxy."""
        if self._away is not None:
            self._away.join()
        self._hang_up()

    def draw(self, method: str) -> tuple[str, float]:
        """(what this request meets, how long it waits)."""
        with self._lock:
            at, wait = self._draw.random(), self._draw.uniform(0.0, self.delay)
            for kind in KINDS:
                at -= self.shares.get(kind, 0.0)
                if at < 0:
                    break
            else:
                kind = "passed"
            self.counts[kind] += 1
        return kind, wait

    def note(self, path: str) -> None:
        """The store has created an object."""
        key = unquote(urlsplit(path).path).lstrip("/")
        with self._lock:
            self.created.setdefault(key, time.time())
            if self._leave is None:
                return
            part, creates, seconds = self._leave
            if sum(part in key for key in self.created) < creates:
                return
            self._leave = None
        self._away = threading.Thread(target=self._stay_away, args=(seconds,), daemon=True)
        self._away.start()

    def _stay_away(self, seconds: float) -> None:
        self._hang_up()
        self.counts["away"] += 1
        time.sleep(seconds)
        self._listen(self._own_port)

    def _hang_up(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            left, self._open = self._open, set()
        for connection in left:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self, port: int) -> None:
        server = _Server(("127.0.0.1", port), _Handler)
        server.proxy = self
        self._own_port = server.server_port
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def opened(self, connection: socket.socket) -> None:
        """A client has come."""
        with self._lock:
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """A client has gone."""
        with self._lock:
            self._open.discard(connection)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: FlakyProxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def setup(self) -> None:
        super().setup()
        self.server.proxy.opened(self.connection)

    def finish(self) -> None:
        self.server.proxy.closed(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            super().handle()

    def pass_on(self) -> None:
        proxy: FlakyProxy = self.server.proxy
        kind, wait = proxy.draw(self.command)
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "cut" and length > 1:
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        time.sleep(wait)
        if kind == "refused":
            self._answer(503, [], b"")
            return
        status, headers, data = self._asked(body)
        if self.command == "PUT" and status == 200:
            proxy.note(self.path)
        if kind == "lost":
            self._answer(503, [], b"")
        elif kind == "hung up":
            self._hang_up()
        elif kind == "cut" and self.command == "GET" and len(data) > 1:
            self._answer(status, headers, data, send=len(data) // 2)
            self._hang_up()
        else:
            self._answer(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def _asked(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """(status, headers, body) of the store's answer; the request goes on as it came."""
        proxy: FlakyProxy = self.server.proxy
        upstream = http.client.HTTPConnection(proxy.host, proxy.port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        send: int | None = None,
    ) -> None:
        self.send_response_only(status)
        dropped = {"connection", "transfer-encoding", "content-length"}
        length = str(len(data))
        for name, value in headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
            elif name.lower() == "content-length" and self.command == "HEAD":
                length = value
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:send])
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None: ...


@contextlib.contextmanager
def flaky_proxy(upstream: str, seed: int = 0) -> Iterator[FlakyProxy]:
    """A proxy that passes everything on until it is told otherwise."""
    proxy = FlakyProxy(upstream, seed)
    try:
        yield proxy
    finally:
        proxy.close()
