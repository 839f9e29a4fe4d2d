"""A stand-in for Google Cloud Storage on loopback: the part of its XML API that the product uses.

Objects are in memory. Every request needs the token; generations are compared as GCS does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

BUCKET = "gs-pool"
TOKEN = "gs-test-token-never-shown"


@dataclass(frozen=True)
class Stored:
    """One object: its bytes, generation, and when it was written."""

    data: bytes
    generation: int
    written: datetime

    @property
    def headers(self) -> dict[str, str]:
        """As GCS sends them with an object."""
        return {
            "ETag": f'"{self.generation:x}"',
            "x-goog-generation": str(self.generation),
            "Last-Modified": format_datetime(self.written, usegmt=True),
        }


@dataclass
class Bucket:
    """The objects of the one bucket there is."""

    objects: dict[str, Stored] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1_700_000_000_000_000))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, key: str, data: bytes, match: str | None) -> Stored | None:
        """The new object; None if the generation is not the one to match (0: there is none)."""
        with self.lock:
            there = self.objects.get(key)
            if match is not None and int(match) != (there.generation if there else 0):
                return None
            self.objects[key] = Stored(data, next(self.numbers), datetime.now(UTC))
            return self.objects[key]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def _key(self) -> str | None:
        """The object's name, or None once an error has been answered."""
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b"<Error><Code>AuthenticationRequired</Code></Error>")
        elif bucket != BUCKET:
            self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        else:
            return key
        return None

    def do_GET(self) -> None:
        key = self._key()
        if key == "":
            self._list()
        elif key is not None:
            self._send(key)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = self._key()
        if key is None:
            return
        stored = self.server.bucket.put(key, data, self.headers.get("x-goog-if-generation-match"))
        if stored is None:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self._answer(200, b"", stored.headers)

    def do_DELETE(self) -> None:
        key = self._key()
        if key is not None:
            gone = self.server.bucket.objects.pop(key, None)
            self._answer(404 if gone is None else 204, b"")

    def _send(self, key: str) -> None:
        stored = self.server.bucket.objects.get(key)
        if stored is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        wanted = self.headers.get("Range")
        if not wanted:
            self._answer(200, stored.data, stored.headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1 if last else len(stored.data), len(stored.data))
        span = {"Content-Range": f"bytes {first}-{stop - 1}/{len(stored.data)}"}
        self._answer(206, stored.data[int(first) : stop], stored.headers | span)

    def _list(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        prefix = query.get("prefix", [""])[0]
        entries = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(stored.data)}</Size>"
            f"<LastModified>{stored.written:%Y-%m-%dT%H:%M:%S.%fZ}</LastModified>"
            f"<ETag>{escape(stored.headers['ETag'])}</ETag></Contents>"
            for key, stored in sorted(self.server.bucket.objects.items())
            if key.startswith(prefix)
        ]
        self._answer(200, f"<ListBucketResult>{''.join(entries)}</ListBucketResult>".encode())

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@contextlib.contextmanager
def running_gcs() -> Iterator[str]:
    """Its endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.bucket = Bucket()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def gcs_endpoint() -> Iterator[str]:
    """One stand-in for the whole session."""
    with running_gcs() as endpoint:
        yield endpoint


@pytest.fixture
def gs_url(gcs_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A gs:// folder of this test's own, the environment set so that it can be used."""
    for name in [n for n in os.environ if n.startswith("GOOGLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOOGLE_BASE_URL", gcs_endpoint)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
    return f"gs://{BUCKET}/{uuid.uuid4().hex}"
