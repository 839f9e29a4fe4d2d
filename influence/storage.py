"""Local paths, s3://, gs:// and (to read) hf:// behind one set of functions on URLs.

Every function takes strings only, so that nothing here has to travel between processes. Settings
of a remote store (endpoint, region, credentials) come from the environment or the node's role,
never from a URL or a config.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, PreconditionError

from influence import hub_files
from influence.errors import InputError, StorageError
from influence.globs import has_magic, local_matches, remote_matcher
from influence.remote_file import RemoteFile
from influence.storage_errors import Location, translated
from influence.stores import SCHEME, ask, locate

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
    where = locate(url)
    return url if where.scheme else where.key


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        InputError: there is no such object, or the store refuses.
        StorageError: the store cannot be reached, or keeps failing.
    """
    where = _local_if_hub(url)
    if not where.scheme:
        with translated(where, url):
            return Path(where.key).read_bytes()
    return ask(where, url, lambda store: bytes(obstore.get(store, where.key).bytes()))


def load(url: str) -> tuple[bytes, ObjectInfo] | None:
    """The whole object and what is known of this very version of it; None if there is none."""
    where = locate(url)

    def get(store: Any) -> tuple[bytes, ObjectInfo] | None:
        try:
            found = obstore.get(store, where.key)
            return bytes(found.bytes()), _info(where, url, found.meta)
        except FileNotFoundError:
            return None

    return ask(where, url, get)


def open_input(url: str) -> Any:
    """A seekable binary file (read, seek, tell, close) that pyarrow accepts as a source.

    A local file is memory-mapped, so pyarrow reads it without a copy.

    Raises:
        InputError: there is no such object, or the store refuses.
        StorageError: the store cannot be reached, or keeps failing.
    """
    where = _local_if_hub(url)
    if not where.scheme:
        with translated(where, url):
            if Path(where.key).stat().st_size == 0:  # an empty file cannot be mapped
                return pa.BufferReader(b"")
            return pa.memory_map(where.key, "r")

    def opened(store: Any) -> Any:
        return obstore.open_reader(store, where.key, buffer_size=_READER_BYTES)

    return RemoteFile(where, url, lambda: ask(where, url, opened))


def put_new(url: str, data: bytes) -> bool:
    """Create the object in one single put: True if this call created it, False if it was there.

    Nobody ever sees a part of it. After an answer lost on the way the store may hold this call's
    own object while False is returned: False means "look at what is there".
    """
    where = locate(url)

    def create(store: Any) -> bool:
        try:
            obstore.put(store, where.key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    return ask(where, url, create)


def put(url: str, data: bytes) -> None:
    """Write the object in one atomic step, over whatever was there."""
    where = locate(url)
    ask(
        where,
        url,
        lambda store: obstore.put(store, where.key, data, mode="overwrite", use_multipart=False),
    )


def replace(url: str, data: bytes, etag: str | None) -> bool:
    """Overwrite the object if it is still the one with this `ObjectInfo.etag`: True if replaced.

    As with `put_new`, False means "look at what is there". On a local disk an `etag` of None
    overwrites whatever is there; elsewhere there must be one.
    """
    where = locate(url)
    if not where.scheme:
        with _alone_in(os.path.dirname(where.key)):
            if etag is not None:
                now = head(url)
                if now is None or now.etag != etag:
                    return False
            put(url, data)
        return True
    if etag is None:
        raise ValueError(f"replace needs the etag of the object it replaces: {url}")
    version: Any = {"version": etag} if where.scheme == "gs" else {"e_tag": etag}

    def update(store: Any) -> bool:
        try:
            obstore.put(store, where.key, data, mode=version, use_multipart=False)
        except PreconditionError:
            return False
        return True

    return ask(where, url, update)


def head(url: str) -> ObjectInfo | None:
    """Size and etag of the object, or None if there is none."""
    where = locate(url)
    if where.scheme == "hf":
        return _head_of_copy(url, where)

    def look(store: Any) -> ObjectInfo | None:
        try:
            return _info(where, url, obstore.head(store, where.key))
        except FileNotFoundError:
            return None

    return ask(where, url, look)


def list_objects(prefix_url: str) -> list[ObjectInfo]:
    """All objects below a folder, at any depth, sorted by URL; a folder that is not there is empty.

    Raises:
        InputError: the bucket does not exist, or the store refuses.
        StorageError: the store cannot be reached, or keeps failing.
    """
    where = locate(prefix_url, key_needed=False)
    base = where.key.strip("/")
    found = ask(where, prefix_url, lambda store: obstore.list(store, prefix=base or None).collect())
    cut = len(base) + 1 if base else 0
    infos = [
        _info(where, join(prefix_url, meta["path"][cut:]), meta)
        for meta in found
        if meta["path"] != base  # some stores list a folder's own marker
    ]
    return sorted(infos, key=lambda info: info.url)


def delete(url: str) -> None:
    """Remove the object; one that is not there is no error."""
    where = locate(url)

    def remove(store: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(store, where.key)

    ask(where, url, remove)


def delete_all(prefix_url: str) -> None:
    """Remove everything below a folder, and on a disk the folder; what is not there is no error."""
    for info in list_objects(prefix_url):
        delete(info.url)
    where = locate(prefix_url, key_needed=False)
    if not where.scheme:
        for folder, _, _ in os.walk(where.key, topdown=False):
            with contextlib.suppress(OSError):  # another process has written into it
                os.rmdir(folder)


def expand(pattern: str) -> list[str]:
    """The files that a glob matches, sorted; a pattern without a wildcard is itself.

    `*`, `?` and `[...]` stay within one path segment and `**` spans any number of them; a leading
    wildcard does not match a name that starts with a dot. URLs of the hub come back with a commit.

    Raises:
        InputError: nothing matched, or the pattern is no usable URL.
    """
    where = locate(pattern, key_needed=False)
    if where.scheme == "hf":
        matches = hub_files.matching(where)
    elif not has_magic(pattern):
        return [pattern]
    elif not where.scheme:
        local = pattern if not SCHEME.match(pattern) else where.key
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
    # Nobody else uses this name: "already exists" is the answer to this very put, sent again.
    put_new(url, b"first")
    try:
        second = put_new(url, b"second")
        kept = read_bytes(url)
    finally:
        delete(url)
    if second or kept != b"first":
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


@contextlib.contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """Keep others who ask for the same on this machine out of a folder; best effort elsewhere."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _local_if_hub(url: str) -> Location:
    """Where the bytes are read: a file of the hub is one on this machine's disk."""
    where = locate(url)
    if where.scheme != "hf":
        return where
    return Location("", "", str(hub_files.local_copy(where)))


def _head_of_copy(url: str, where: Location) -> ObjectInfo:
    at = hub_files.pinned(where)
    found = hub_files.local_copy(at).stat()
    commit = at.bucket.rpartition("@")[2]  # the same on every node
    return ObjectInfo(url, found.st_size, commit, datetime.fromtimestamp(found.st_mtime, UTC))


def _info(where: Location, url: str, meta: Any) -> ObjectInfo:
    etag = meta.get("version") if where.scheme == "gs" else meta.get("e_tag")
    return ObjectInfo(url, meta["size"], etag, meta["last_modified"])
