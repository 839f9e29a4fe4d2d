"""What a store's exceptions mean to a user: which bucket, which endpoint, what to check."""

from __future__ import annotations

import contextlib
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
        endpoint = endpoint_of(self.scheme)
        return f"bucket {self.bucket!r} at {endpoint or 'the default endpoint of ' + self.scheme}"


def endpoint_of(scheme: str) -> str | None:
    """The S3 endpoint of the environment, without any user or query part."""
    raw = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
    if scheme != "s3" or not raw:
        return None
    parts = urlsplit(raw)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


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
            raise
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
        return InputError(f"{name}: the file system refused: {reason}")
    if code and code.group(1) == "NoSuchBucket":
        return _no_bucket(where)
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    if refused or (status and status.group(1) in ("401", "403")):
        return InputError(
            f"{where.describe()} refused access ({short}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_REGION, or the node's role and its policy"
        )
    if "builder error" in text:
        return InputError(
            f"{where.describe()} cannot be used as it is configured; check AWS_ENDPOINT_URL and "
            "AWS_ALLOW_HTTP (an http:// endpoint needs it)"
        )
    if isinstance(error, GenericError | OSError) and status is None:
        return StorageError(
            f"{where.describe()} cannot be reached; check AWS_ENDPOINT_URL, AWS_REGION, the "
            "credentials and the network"
        )
    if status and status.group(1) in ("301", "307", "400"):
        return InputError(
            f"{where.describe()} rejected the request ({short}); check AWS_REGION and the endpoint"
        )
    return StorageError(f"{name}: {where.describe()} failed ({short}) and kept failing")
