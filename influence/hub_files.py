"""Files of datasets on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION]/PATH`, read only.

A file is downloaded once to the hub's own cache on each node that reads it (HF_HOME) and is then a
local file. Branches are pinned to a commit where a job looks for its files, so that every replica
reads what was scanned.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from influence.errors import InputError, StorageError
from influence.globs import has_magic, remote_matcher
from influence.storage_errors import Location, disk_error

# Revisions with a slash, as the hub's own tools know them; another branch's is written %2F.
_REVISION = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)|[^/]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[\w.-]+")
_ATTEMPTS = 4
_PAUSE_SECONDS = 1.0


def parse_hub_url(url: str, rest: str, *, path_needed: bool = True) -> Location:
    """The dataset (OWNER/NAME@REVISION, as bucket) and the path in it, of what follows hf://.

    Raises:
        InputError: it is not of that form.
    """
    kind, _, rest = rest.partition("/")
    owner, _, rest = rest.partition("/")
    name, at, rest = _cut(rest)
    revision = "main"
    if at == "@":
        found = _REVISION.match(rest)
        revision = found.group() if found else ""
        rest = rest[len(revision) :]
    good = kind == "datasets" and _NAME.fullmatch(owner) and _NAME.fullmatch(name) and revision
    path = rest.strip("/")
    if not good or (path_needed and not path):
        raise InputError(
            f"{url}: expected hf://datasets/OWNER/NAME/PATH, or .../NAME@REVISION/PATH (other "
            "repositories of the hub hold no rows)"
        )
    return Location("hf", f"{owner}/{name}@{unquote(revision)}", path)


def _cut(rest: str) -> tuple[str, str, str]:
    """(name, "@" or "/", what follows)."""
    for position, char in enumerate(rest):
        if char in "@/":
            return rest[:position], char, rest[position + 1 :]
    return rest, "", ""


def hub_url(where: Location) -> str:
    """The URL that means this place; a revision with a slash is quoted."""
    dataset, _, revision = where.bucket.partition("@")
    return f"hf://datasets/{dataset}@{revision.replace('/', '%2F')}/{where.key}"


def pinned(where: Location) -> Location:
    """The same place with the commit that its revision stands for now.

    Offline: the commit that the local cache knows by that name.

    Raises:
        InputError: no such dataset or revision, or no access to it.
        StorageError: the hub cannot be reached.
    """
    dataset, _, revision = where.bucket.partition("@")
    if _COMMIT.fullmatch(revision):
        return where
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        commit = None
        if not has_magic(where.key):
            kept = try_to_load_from_cache(
                dataset, where.key, revision=revision, repo_type="dataset"
            )
            # .../snapshots/COMMIT/PATH
            commit = str(kept)[: -len(where.key)].rstrip("/\\")[-40:] if kept else None
    else:
        commit = _asked(where, lambda: HfApi().dataset_info(dataset, revision=revision).sha)
    if commit is None or not _COMMIT.fullmatch(commit):
        raise _offline(where)
    return Location("hf", f"{dataset}@{commit}", where.key)


def local_copy(where: Location) -> Path:
    """The file on this machine; downloaded first if it is not in the hub's cache yet.

    Raises:
        InputError: no such dataset, revision or file, no access to it, or offline and not cached.
        StorageError: the hub cannot be reached, or keeps failing.
    """
    from huggingface_hub import hf_hub_download

    at = pinned(where)
    dataset, _, commit = at.bucket.partition("@")
    found = _asked(
        where, lambda: hf_hub_download(dataset, at.key, repo_type="dataset", revision=commit)
    )
    return Path(found)


def matching(where: Location) -> list[str]:
    """URLs of the files of a dataset whose path matches the pattern, pinned, sorted.

    Raises:
        InputError: no such dataset or revision, no access to it, or offline.
        StorageError: the hub cannot be reached, or keeps failing.
    """
    at = pinned(where)
    if not has_magic(at.key):
        return [hub_url(at)]
    dataset, _, commit = at.bucket.partition("@")
    folder, matches = remote_matcher(at.key)
    paths = _asked(where, lambda: _files_below(dataset, commit, folder))
    return sorted(hub_url(Location("hf", at.bucket, path)) for path in paths if matches(path))


def _files_below(dataset: str, commit: str, folder: str) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = HfApi().list_repo_tree(
            dataset, folder or None, recursive=True, revision=commit, repo_type="dataset"
        )
        return [entry.path for entry in tree if isinstance(entry, RepoFile)]
    except EntryNotFoundError:  # no such folder
        return []


def _asked(where: Location, call: Any) -> Any:
    """What the hub answers; tried a few times where it cannot be reached or fails."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _translated(where):
                return call()
        except StorageError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    return None


@contextlib.contextmanager
def _translated(where: Location) -> Iterator[None]:
    """Turn the hub's exceptions into errors that a user can act on."""
    from huggingface_hub import errors

    url = hub_url(where)
    dataset, _, revision = where.bucket.partition("@")
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{url}: dataset {dataset!r} is gated: ask for access on its page on the hub, and set "
            "HF_TOKEN in the environment of every node"
        ) from None
    except errors.HFValidationError:
        raise InputError(f"{url}: {dataset!r} is no name of a dataset on the hub") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{url}: dataset {dataset!r} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{url}: the hub has no dataset {dataset!r}, or it is private: check the name, and "
            "set HF_TOKEN in the environment of every node if it needs one"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise _offline(where) from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise _offline(where) from None
        raise StorageError(
            f"{url}: the hub cannot be reached ({_hub()}); check the network and HF_ENDPOINT"
        ) from None
    except errors.EntryNotFoundError:
        raise InputError(f"{url}: dataset {dataset!r} has no file of this name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"{url}: the hub refused access ({status}); check HF_TOKEN in the environment"
            ) from None
        raise StorageError(f"{url}: the hub ({_hub()}) failed with {status}") from None
    except InputError:
        raise
    except OSError as error:
        raise disk_error(str(error.filename or _hub_cache()), error) or _unreachable(
            url, error
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> StorageError:
    return StorageError(
        f"{url}: the hub cannot be reached ({_hub()}: {type(error).__name__}); check the network "
        "and HF_ENDPOINT"
    )


def _offline(where: Location) -> InputError:
    if has_magic(where.key):
        why = "a pattern needs the hub's list of files; name the files one by one, or unset it"
    else:
        why = (
            "the hub's cache here does not have this file under this name; unset it, or name the "
            "commit that it has (NAME@COMMIT/PATH), or a local file"
        )
    return InputError(f"{hub_url(where)}: the hub is switched off (HF_HUB_OFFLINE), and {why}")


def _hub() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
