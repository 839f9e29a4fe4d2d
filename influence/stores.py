"""Which store a URL means, and the client for it: one for each bucket and environment."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from obstore.store import GCSStore, LocalStore, S3Store

from influence.errors import InputError, StorageError
from influence.hub_files import parse_hub_url
from influence.storage_errors import Location, endpoint_of, translated

T = TypeVar("T")

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
#: How long a store that has answered before may fail until an operation on it does. One that has
#: never answered is given up after the client's own retries: its address is likely to be wrong.
PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_REMOTE = ("s3", "gs")
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
_answered: set[tuple[Any, ...]] = set()


def locate(url: str, key_needed: bool = True) -> Location:
    """Take a URL apart; credentials in it are refused without being repeated.

    Raises:
        InputError: it is no URL of a store that is known here.
    """
    found = SCHEME.match(url)
    if found is None:
        if not url:
            raise InputError("an empty path; expected a local path, s3://BUCKET/KEY or gs://...")
        return Location("", "", os.path.abspath(url))
    scheme = found.group(1).lower()
    rest = url[found.end() :]
    bucket, _, key = rest.partition("/")
    if scheme not in (*_REMOTE, "file", "hf"):
        raise InputError(f"{scheme}:// is not supported; use a local path, s3://, gs:// or hf://")
    # A secret key may itself hold slashes, so a colon in the bucket's place is enough.
    if "@" in bucket or ":" in bucket or "X-Amz-" in rest:
        raise InputError(
            f"a {scheme}:// URL holds credentials; write {_FORMS[scheme]} and give the "
            f"credentials in {_SECRETS[scheme]}"
        )
    if scheme == "file":
        return Location("", "", os.path.abspath(unquote(urlsplit(url).path)))
    if scheme == "hf":
        return parse_hub_url(url, rest, path_needed=key_needed)
    if not bucket or (key_needed and not key.strip("/")):
        raise InputError(f"{url}: expected {scheme}://BUCKET/KEY")
    return Location(scheme, bucket, key)


_FORMS = {
    "s3": "s3://BUCKET/KEY",
    "gs": "gs://BUCKET/KEY",
    "hf": "hf://datasets/OWNER/NAME/PATH",
    "file": "file:///PATH",
}
_SECRETS = {
    "s3": "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by the node's role",
    "gs": "the environment (GOOGLE_APPLICATION_CREDENTIALS) or by the node's role",
    "hf": "the environment (HF_TOKEN)",
    "file": "no way at all: a disk needs none",
}


def ask(where: Location, name: str | None, call: Callable[[Any], T]) -> T:
    """`call(client)`; where a store that has answered before fails for a while, again and again.

    A `call` may thus have happened although it failed: it has to be one that can be repeated.

    Raises:
        InputError: what no retry can mend.
        StorageError: the store has never answered, or has failed for too long.
    """
    began = time.monotonic()
    client, known = store_of(where)
    while True:
        try:
            with translated(where, name):
                result = call(client)
        except StorageError:
            late = time.monotonic() - began > PATIENCE_SECONDS
            if late or known not in _answered:
                raise
            time.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.5))
        else:
            if where.scheme:
                _answered.add(known)
            return result


def store_of(where: Location) -> tuple[Any, tuple[Any, ...]]:
    """The client of a store, and what tells it from every other one.

    Raises:
        InputError: nothing can be written there or listed: it is the hub.
    """
    if not where.scheme:
        return _local_store(), ()
    if where.scheme == "hf":
        raise InputError(
            f"hf://{where.bucket}: the hub is read only here, for candidates and targets; use a "
            "local path, s3:// or gs:// for `run` and `cache`"
        )
    prefix = "AWS_" if where.scheme == "s3" else "GOOGLE_"
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(prefix)))
    key = (where.scheme, where.bucket, settings)
    return _remote_store(*key), key


@lru_cache(maxsize=1)
def _local_store() -> LocalStore:
    return LocalStore()


@lru_cache(maxsize=16)
def _remote_store(scheme: str, bucket: str, settings: tuple[tuple[str, str], ...]) -> Any:
    """One client per bucket and environment: a changed environment gets a client of its own."""
    env = dict(settings)
    endpoint = endpoint_of(scheme, whole=True) or ""
    # An http:// endpoint is the user's own choice unless AWS_ALLOW_HTTP says otherwise.
    allow = env.get("AWS_ALLOW_HTTP", str(endpoint.startswith("http://"))).lower()
    client: Any = {**_CLIENT, "allow_http": allow in ("1", "true", "yes")}
    if scheme == "gs":  # the endpoint is in its environment
        return GCSStore(bucket, client_options=client, retry_config=_RETRY)  # pyright: ignore
    extra: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    return S3Store(bucket, client_options=client, retry_config=_RETRY, **extra)  # pyright: ignore
