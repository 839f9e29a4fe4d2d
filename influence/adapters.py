"""Adapters by URL: a process that loads one of an object store fetches it to a folder first."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from influence import storage
from influence.checkpoints import ADAPTER_FILES, copy
from influence.errors import ModelLoadError

ADAPTER_WEIGHTS = ADAPTER_FILES[1]


def local_adapter(adapter: str) -> str:
    """A folder with the adapter of a URL (s3://...); folders and hub names stay as they are.

    Raises:
        ModelLoadError: there is no adapter below the URL.
    """
    if "://" not in adapter:
        return adapter
    found = storage.head(storage.join(adapter, ADAPTER_WEIGHTS))
    if found is None:
        raise ModelLoadError(
            f"model.adapter: {adapter}: no {ADAPTER_WEIGHTS} there; expected the output of "
            "`influence finetune` or an adapter that PEFT saved with safe_serialization=True"
        )
    return _fetched(adapter, f"{found.etag} {found.size}")


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Without what transformers warns about PEFT's own calls: it is not the user's to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@lru_cache(maxsize=8)
def _fetched(url: str, _version: str) -> str:
    folder = tempfile.mkdtemp(prefix="adapter-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy(url, folder, ADAPTER_FILES)
    return folder
