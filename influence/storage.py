"""Local paths, s3:// and gs:// behind one set of functions on URLs.

Every function takes strings only, so that nothing here has to travel between processes. Settings
of a remote store (endpoint, region, credentials) come from the environment or the node's role,
never from a URL or a config.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import GCSStore, LocalStore, S3Store

from influence.errors import InputError, StorageError
from influence.globs import has_magic, local_matches, remote_matcher
from influence.storage_errors import Location, translated

_REMOTE = ("s3", "gs")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_RETRY: dict[str, Any] = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=4),
        "base": 2,
    },
}
_CLIENT: dict[str, Any] = {"connect_timeout": "3s", "read_timeout": "30s", "timeout": "300s"}
_READER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object: its URL, size in bytes, and the token that `replace` compares.

    `etag` is opaque: the ETag on S3 and local disks, the generation on gs:// where `head` knows it.
    `modified` is the time of the last change (UTC), by the store's own clock.
    """

    url: str
    size: int
    etag: str | None
    modified: datetime


@dataclass
class _RemoteFile:
    """The part of Python's file protocol that pyarrow and gzip need, over an obstore reader."""

    reader: Any
    location: Location
    closed: bool = False

    def read(self, size: int | None = -1) -> bytes:
        with translated(self.location):
            return bytes(self.reader.read(None if size is None or size < 0 else size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.reader.seek(offset, whence)

    def tell(self) -> int:
        return self.reader.tell()

    def size(self) -> int:
        return self.reader.size

    def close(self) -> None:
        if not self.closed:
            self.reader.close()
        self.closed = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


def join(base: str, *parts: str) -> str:
    """`base` and `parts` with single slashes between them; an empty part adds nothing."""
    out = base
    for part in parts:
        clean = part.strip("/")
        if clean:
            out = f"{out.rstrip('/')}/{clean}" if out else clean
    return out


def absolute(url: str) -> str:
    """The URL in a form that means the same in every working directory."""
    where = _locate(url)
    return url if where.scheme else where.key


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        InputError: there is no such object, or the store refuses.
        StorageError: the store cannot be reached, or keeps failing.
    """
    where = _locate(url)
    with translated(where, url):
        if not where.scheme:
            return Path(where.key).read_bytes()
        return bytes(obstore.get(_store(where), where.key).bytes())


def open_input(url: str) -> Any:
    """A seekable binary file (read, seek, tell, close) that pyarrow accepts as a source.

    A local file is memory-mapped, so pyarrow reads it without a copy.

    Raises:
        InputError: there is no such object, or the store refuses.
        StorageError: the store cannot be reached, or keeps failing.
    """
    where = _locate(url)
    with translated(where, url):
        if not where.scheme:
            if Path(where.key).stat().st_size == 0:  # an empty file cannot be mapped
                return pa.BufferReader(b"")
            return pa.memory_map(where.key, "r")
        reader = obstore.open_reader(_store(where), where.key, buffer_size=_READER_BYTES)
        return _RemoteFile(reader, where)


def put_new(url: str, data: bytes) -> bool:
    """Create the object in one single put: True if this call created it, False if it was there.

    Nobody ever sees a part of it. After a connection lost half-way the store may hold this call's
    own object while False is returned: False means "look at what is there".
    """
    where = _locate(url)
    with translated(where, url):
        try:
            obstore.put(_store(where), where.key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
    return True


def put(url: str, data: bytes) -> None:
    """Write the object in one atomic step, over whatever was there."""
    where = _locate(url)
    with translated(where, url):
        obstore.put(_store(where), where.key, data, mode="overwrite", use_multipart=False)


def replace(url: str, data: bytes, etag: str | None) -> bool:
    """Overwrite the object if it is still the one with this `ObjectInfo.etag`: True if replaced.

    A local disk has no conditional update: there it is an atomic overwrite, and always True.
    """
    where = _locate(url)
    if not where.scheme:
        put(url, data)
        return True
    if etag is None:
        raise ValueError(f"replace needs the etag of the object it replaces: {url}")
    version: Any = {"version": etag} if where.scheme == "gs" else {"e_tag": etag}
    with translated(where, url):
        try:
            obstore.put(_store(where), where.key, data, mode=version, use_multipart=False)
        except PreconditionError:
            return False
    return True


def head(url: str) -> ObjectInfo | None:
    """Size and etag of the object, or None if there is none."""
    where = _locate(url)
    with translated(where, url):
        try:
            meta = obstore.head(_store(where), where.key)
        except FileNotFoundError:
            return None
    return ObjectInfo(url, meta["size"], _etag(where, meta), meta["last_modified"])


def list_objects(prefix_url: str) -> list[ObjectInfo]:
    """All objects below a folder, at any depth, sorted by URL; a folder that is not there is empty.

    Raises:
        InputError: the bucket does not exist, or the store refuses.
        StorageError: the store cannot be reached, or keeps failing.
    """
    where = _locate(prefix_url, key_needed=False)
    base = where.key.strip("/")
    with translated(where, prefix_url):
        found = obstore.list(_store(where), prefix=base or None).collect()
    cut = len(base) + 1 if base else 0
    infos = [
        ObjectInfo(
            join(prefix_url, meta["path"][cut:]),
            meta["size"],
            _etag(where, meta),
            meta["last_modified"],
        )
        for meta in found
        if meta["path"] != base  # some stores list a folder's own marker
    ]
    return sorted(infos, key=lambda info: info.url)


def delete(url: str) -> None:
    """Remove the object; one that is not there is no error."""
    where = _locate(url)
    with translated(where, url), contextlib.suppress(FileNotFoundError):
        obstore.delete(_store(where), where.key)


def expand(pattern: str) -> list[str]:
    """The files that a glob matches, sorted; a pattern without a wildcard is itself.

    `*`, `?` and `[...]` stay within one path segment and `**` spans any number of them; a leading
    wildcard does not match a name that starts with a dot.

    Raises:
        InputError: nothing matched, or the pattern is no usable URL.
    """
    where = _locate(pattern, key_needed=False)
    if not has_magic(pattern):
        return [pattern]
    if not where.scheme:
        local = pattern if not _SCHEME.match(pattern) else where.key
        matches = [local] if Path(local).is_file() else local_matches(local)
    else:
        if has_magic(where.bucket):
            raise InputError(f"{pattern}: a bucket's name cannot hold a wildcard; name one bucket")
        folder, matches_key = remote_matcher(where.key)
        root = f"{where.scheme}://{where.bucket}"
        listed = [info.url for info in list_objects(join(root, folder))]
        matches = [url for url in listed if matches_key(url[len(root) + 1 :])]
    if not matches:
        raise InputError(f"{pattern}: no file matches this pattern; check the folder and the name")
    return sorted(matches)


def probe_create_only(base_url: str) -> None:
    """Check that the store refuses a second create of the same object, on which commits rest.

    Raises:
        StorageError: the second create was not refused, or the store cannot be reached.
        InputError: the store cannot be written at all.
    """
    url = join(base_url, f".probe-{uuid.uuid4().hex}")
    first = put_new(url, b"first")
    try:
        second = put_new(url, b"second")
        kept = read_bytes(url)
    finally:
        delete(url)
    if not first or second or kept != b"first":
        raise StorageError(
            f"{base_url}: this store lets a second create-only put replace the first (or refuses "
            "the first), so two workers could overwrite each other's results; use a store that "
            "honours If-None-Match (S3, GCS, a local disk) for `run` and `cache`"
        )


def clock(base_url: str) -> datetime:
    """The store's own time (UTC), by which `ObjectInfo.modified` goes: a probe is put and removed.

    Raises:
        StorageError: the store cannot be reached.
        InputError: the store cannot be written.
    """
    url = join(base_url, f".probe-{uuid.uuid4().hex}")
    put(url, b"what time is it?")
    try:
        info = head(url)
    finally:
        delete(url)
    if info is None:
        raise StorageError(f"{url}: gone right after it was written; nothing can be dated here")
    return info.modified


def _locate(url: str, key_needed: bool = True) -> Location:
    """Take a URL apart; credentials in it are refused without being repeated."""
    found = _SCHEME.match(url)
    if found is None:
        if not url:
            raise InputError("an empty path; expected a local path, s3://BUCKET/KEY or gs://...")
        return Location("", "", os.path.abspath(url))
    scheme = found.group(1).lower()
    rest = url[found.end() :]
    bucket, _, key = rest.partition("/")
    if scheme not in (*_REMOTE, "file"):
        raise InputError(f"{scheme}:// is not supported; use a local path, s3:// or gs://")
    # A secret key may itself hold slashes, so a colon in the bucket's place is enough.
    if "@" in bucket or ":" in bucket or "X-Amz-" in rest:
        raise InputError(
            f"a {scheme}:// URL holds credentials; write {scheme}://BUCKET/KEY and give the "
            "credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by the "
            "node's role"
        )
    if scheme == "file":
        return Location("", "", os.path.abspath(unquote(urlsplit(url).path)))
    if not bucket or (key_needed and not key.strip("/")):
        raise InputError(f"{url}: expected {scheme}://BUCKET/KEY")
    return Location(scheme, bucket, key)


def _store(where: Location) -> Any:
    if not where.scheme:
        return _local_store()
    prefixes = ("AWS_",) if where.scheme == "s3" else ("GOOGLE_",)
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(prefixes)))
    return _remote_store(where.scheme, where.bucket, settings)


@lru_cache(maxsize=1)
def _local_store() -> LocalStore:
    return LocalStore()


@lru_cache(maxsize=16)
def _remote_store(scheme: str, bucket: str, settings: tuple[tuple[str, str], ...]) -> Any:
    """One client per bucket and environment: a changed environment gets a client of its own."""
    env = dict(settings)
    if scheme == "gs":
        return GCSStore(bucket, client_options=_CLIENT, retry_config=_RETRY)  # pyright: ignore
    endpoint = env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT") or ""
    # An http:// endpoint is the user's own choice unless AWS_ALLOW_HTTP says otherwise.
    allow = env.get("AWS_ALLOW_HTTP", str(endpoint.startswith("http://"))).lower()
    client = {**_CLIENT, "allow_http": allow in ("1", "true", "yes")}
    extra: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    return S3Store(bucket, client_options=client, retry_config=_RETRY, **extra)  # pyright: ignore


def _etag(where: Location, meta: Any) -> str | None:
    return meta.get("version") if where.scheme == "gs" else meta.get("e_tag")
