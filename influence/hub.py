"""Models and adapters on the hub: which commit a name stands for, and pinning a config to it."""

from __future__ import annotations

import re

from influence.config import Config
from influence.errors import ModelLoadError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_commit(key: str, name: str, revision: str | None, file: str) -> str:
    """The commit (40 hex digits) of a hub repository: of the local cache, else of the hub.

    A `revision` that is a whole commit stands for itself. `file` is one that the repository must
    have, by which the local cache finds it; `key` is the config key that errors name.

    Raises:
        ModelLoadError: the hub does not know the name, or cannot be reached.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            # .../snapshots/COMMIT/FILE, where FILE may lie in a folder
            return cached.removesuffix(file).rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        commit = HfApi().model_info(name, revision=revision).sha
    except Exception as error:
        raise ModelLoadError(
            f"{key}: {name!r} is no folder, and the hub does not know it or cannot be "
            f"reached: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if commit is None:
        raise ModelLoadError(f"{key}: the hub names no commit for {name!r}; set model.revision")
    return commit


def hub_has(key: str, name: str, revision: str | None, file: str) -> bool:
    """Whether a hub repository has a file: in the local cache, else on the hub.

    Raises:
        ModelLoadError: the hub cannot be reached and the cache does not hold the file.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return True
        return HfApi().file_exists(name, file, revision=revision)
    except Exception as error:
        raise ModelLoadError(
            f"{key}: cannot tell whether {name!r} has {file}, which is needed: the local cache "
            f"lacks it, and the hub cannot be reached: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def resolve_revision(config: Config) -> Config:
    """The config with the commits that its hub names stand for now; folders stay as they are.

    Called once per job, before any worker is made: all of them then load the very files that the
    fingerprints cover, whatever a branch points to later. Fingerprints hold the commit and do not
    change by it.

    Raises:
        ModelLoadError: a name that is neither a folder nor known to the hub.
    """
    from influence.fingerprints import adapter_commit, model_commit

    pinned = {"revision": model_commit(config.model), "adapter_revision": None}
    if config.model.adapter is not None:
        pinned["adapter_revision"] = adapter_commit(config.model)
    found = {key: commit for key, commit in pinned.items() if commit is not None}
    if not found:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update=found)})
