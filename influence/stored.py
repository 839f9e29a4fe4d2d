"""Which shards a cache holds, and how large they are: from its listing alone."""

from __future__ import annotations

from collections.abc import Sequence

from influence import storage
from influence.cache import Cache


class Stored:
    """A cache's listing, folder by folder, each listed once when it is first asked for."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._folders: dict[str, dict[str, int]] = {}

    def sizes(self, keys: Sequence[str]) -> dict[str, int]:
        """Of these keys, the bytes of those whose object is listed (not verified)."""
        found = {}
        for key in keys:
            folder, name = key.rsplit("/", 1)
            if name in self.folder(folder):
                found[key] = self.folder(folder)[name]
        return found

    def folder(self, folder: str) -> dict[str, int]:
        """Names and bytes of everything in STAGE/FINGERPRINT."""
        if folder not in self._folders:
            listed = storage.list_objects(self._cache.locate(folder))
            self._folders[folder] = {i.url.rsplit("/", 1)[1]: i.size for i in listed}
        return self._folders[folder]
