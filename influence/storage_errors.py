"""What a store's exceptions mean to a user: which bucket, which endpoint, what to check."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError

from influence.errors import InputError, StorageError


@dataclass(frozen=True, slots=True)
class Location:
    """Where a URL points: its scheme ("" for a local path), bucket, and key or absolute path."""

    scheme: str
    bucket: str
    key: str

    def describe(self) -> str:
        """For a message: the local path, or the bucket and its endpoint."""
        if not self.scheme:
            return self.key
        if self.scheme == "hf":
            return f"dataset {self.bucket!r} on the hub"
        endpoint = endpoint_of(self.scheme)
        return f"bucket {self.bucket!r} at {endpoint or 'the default endpoint of ' + self.scheme}"


#: Where a store's address and its credentials come from: what a user can check.
_ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "gs": ("GOOGLE_BASE_URL",)}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}
_ADDRESS = {"s3": "AWS_ENDPOINT_URL, AWS_REGION", "gs": "GOOGLE_BASE_URL"}
_CONFIGURED = {
    "s3": "AWS_ENDPOINT_URL and AWS_ALLOW_HTTP (an http:// endpoint needs it)",
    "gs": "GOOGLE_BASE_URL and GOOGLE_APPLICATION_CREDENTIALS",
}
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def endpoint_of(scheme: str, *, whole: bool = False) -> str | None:
    """The endpoint of the environment; unless `whole`, without any user or query part."""
    names = _ENDPOINTS.get(scheme, ())
    raw = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if raw is None or whole:
        return raw
    parts = urlsplit(raw)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def disk_error(path: str, error: Exception) -> InputError | None:
    """What a disk without room means to a user; None for any other error.

    No retry mends it: what is committed stands, and the job goes on when it is started again.
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = getattr(error, "errno", None) or (int(found.group(1)) if found else None)
    if number not in _FULL:
        return None
    return InputError(
        f"{path}: {_FULL[number]}; make room (`influence cache prune` removes shards that nothing "
        "uses), or put `run` and `cache` elsewhere, and run the same command again: what is "
        "committed stands, and it goes on from there"
    )


@contextlib.contextmanager
def translated(where: Location, url: str | None = None) -> Iterator[None]:
    """Turn the store's exceptions into errors a user can act on.

    The store's own text is not passed on: it may hold signed requests and key ids.

    Raises:
        InputError: what no retry can mend: nothing there, refused, wrongly configured.
        StorageError: it cannot be reached, times out or fails (5xx), after the client's retries.
    """
    name = url or where.describe()
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        if "NoSuchBucket" in str(error):
            raise _no_bucket(where) from None
        raise InputError(f"{name}: no such file or object; check the path") from None
    except PermissionError:  # obstore's own PermissionDeniedError is another class
        raise InputError(f"{name}: permission denied") from None
    except BaseError as error:
        raise _explained(where, name, error) from None
    except OSError as error:
        if not where.scheme:
            raise disk_error(name, error) or error from None
        raise _explained(where, name, error) from None  # a reader's own class of error


def _no_bucket(where: Location) -> InputError:
    return InputError(f"{where.describe()} does not exist; create it, or correct its name")


def _explained(where: Location, name: str, error: Exception) -> Exception:
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    short = " ".join(m.group(1) for m in (status, code) if m) or type(error).__name__
    if not where.scheme:
        reason = text.split("\n", 1)[0]
        refused = InputError(f"{name}: the file system refused: {reason}")
        return disk_error(name, error) or refused
    if code and code.group(1) == "NoSuchBucket":
        return _no_bucket(where)
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    if refused or (status and status.group(1) in ("401", "403")):
        return InputError(
            f"{where.describe()} refused access ({short}); check "
            f"{_CREDENTIALS[where.scheme]}, or the node's role and its policy"
        )
    if "builder error" in text:
        return InputError(
            f"{where.describe()} cannot be used as it is configured; check "
            f"{_CONFIGURED[where.scheme]}"
        )
    if isinstance(error, GenericError | OSError) and status is None:
        return StorageError(
            f"{where.describe()} cannot be reached; check {_ADDRESS[where.scheme]}, the "
            "credentials and the network"
        )
    if status and status.group(1) in ("301", "307", "400"):
        return InputError(
            f"{where.describe()} rejected the request ({short}); check {_ADDRESS[where.scheme]}"
        )
    return StorageError(f"{name}: {where.describe()} failed ({short}) and kept failing")
