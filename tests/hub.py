"""A stand-in for the Hugging Face hub on loopback: datasets, their commits and their files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hub-test-token-never-shown"


@dataclass
class Hub:
    """Datasets by name: {revision: commit}, {commit: {path: bytes}}.

    Attributes:
        gated: names whose files need the token.
        fails: how many of the next requests are answered 503.
        asked: requests so far, by kind: info, tree, file.
    """

    endpoint: str = ""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    fails: int = 0
    asked: Counter[str] = field(default_factory=Counter)

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files on a branch as its next commit; returns the commit."""
        known = json.dumps(sorted(self.files)) + repr(sorted(files.items()))
        commit = hashlib.sha1(f"{name} {known}".encode()).hexdigest()
        self.files[commit] = files
        self.branches.setdefault(name, {})[branch] = commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        if hub.fails:
            hub.fails -= 1
            self._answer(503, b"")
            return
        parts = [unquote(part) for part in urlsplit(self.path).path.lstrip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            parts = parts[1:]
        if parts[0] != "datasets" or len(parts) < 5:  # the client asks for things of its own, too
            self._answer(404, b"{}")
            return
        name, kind, revision, below = "/".join(parts[1:3]), *parts[3:5], parts[5:]
        path = "/".join(below)
        hub.asked["info" if kind == "revision" else "tree" if kind == "tree" else "file"] += 1
        branches = hub.branches.get(name)
        if branches is None:
            self._refuse(404, "RepoNotFound")
            return
        commit = branches.get(revision, revision if revision in hub.files else None)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
        elif kind == "revision":
            self._answer(200, json.dumps({"id": name, "sha": commit}).encode())
        elif kind == "tree":
            self._tree(commit, path)
        elif name in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(403, "GatedRepo")
        else:
            self._file(commit, path)

    do_HEAD = do_GET

    def _tree(self, commit: str, folder: str) -> None:
        files = self.server.hub.files[commit]
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
            for path, data in files.items()
            if not folder or path.startswith(folder + "/")
        ]
        if found:
            self._answer(200, json.dumps(found).encode())
        else:
            self._refuse(404, "EntryNotFound")

    def _file(self, commit: str, path: str) -> None:
        data = self.server.hub.files[commit].get(path)
        if data is None:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'}
        wanted = self.headers.get("Range")
        if wanted:
            data = data[int(wanted.removeprefix("bytes=").partition("-")[0]) :]
        self._answer(206 if wanted else 200, data, headers)

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub without any dataset."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def data_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to, with an empty cache of its files."""
    from huggingface_hub import constants

    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
