"""Removing shards that no given config uses: decided first, from listings alone, then done."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from influence import storage
from influence.cache_listing import Contents, StoredShard
from influence.cache_use import Place, Use, recorded_use
from influence.contamination_units import STAGE
from influence.errors import InputError
from influence.run_log import read_manifest

_REMOVERS = 16
_AT_ONCE = 512
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Pruning:
    """What a prune removes, and what it leaves.

    Attributes:
        doomed: shards of fingerprints that nobody named uses.
        young: shards of such fingerprints, one of whose shards is younger than the age guard.
        kept: shards of fingerprints in use.
        notes: lines on what goes although a run used it.
    """

    doomed: dict[Place, list[StoredShard]]
    young: dict[Place, list[StoredShard]]
    kept: dict[Place, list[StoredShard]]
    notes: list[str] = field(default_factory=list)


def parse_age(text: str) -> timedelta:
    """`90s`, `30m`, `1h`, `7d`, `2w` or `0`.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([smhdw]?)\s*", text)
    if match is None or (not match[2] and float(match[1])):
        raise InputError(
            f"--older-than {text!r}: expected a number and a unit (s, m, h, d or w), such as 30m, "
            "12h or 7d; 0 for no limit"
        )
    return timedelta(seconds=float(match[1]) * _UNITS[match[2] or "s"])


def plan_prune(contents: Contents, used: Collection[Place], older_than: timedelta) -> Pruning:
    """Decide what goes. Only fingerprints as a whole go, never some of their shards.

    A job that works on a fingerprint commits shards to it again and again: as long as its newest
    shard is not `older_than` by the store's own clock, all of it stays.

    Raises:
        InputError, StorageError: the store's clock cannot be read.
    """
    pruning = Pruning({}, {}, {})
    unused = {}
    for place, shards in contents.by_place().items():
        (pruning.kept if place in used else unused)[place] = shards
    if not unused:
        return pruning
    now: datetime | None = storage.clock(contents.url) if older_than else None
    for place, shards in unused.items():
        newest = max(shard.modified for shard in shards)
        young = now is not None and now - newest < older_than
        (pruning.young if young else pruning.doomed)[place] = shards
    return pruning


def check_kept(uses: Sequence[Use], pruning: Pruning, url: str) -> None:
    """See that what is to be kept has something in this cache: else it is hardly the right one.

    Raises:
        InputError: shards would go, and none would stay for the configs that are to be kept.
    """
    # Comparisons with targets' texts know of no model: a config of other settings has them, too.
    kept = [place for place in pruning.kept if place[0] != STAGE]
    if uses and pruning.doomed and not kept:
        caches = ", ".join(dict.fromkeys(use.cache for use in uses if use.cache))
        raise InputError(
            f"{url}: not one shard in it is used by what --keep names (whose cache is {caches}); "
            "is this the right cache? If nothing in it is of use any more: --all"
        )


def other_settings(uses: Sequence[Use], pruning: Pruning) -> list[str]:
    """A line for each config whose run directory used something that would go.

    The run was then made with `--set`, or the config was changed after it.
    """
    lines = []
    for use in uses:
        if use.run == use.label or read_manifest(use.run) is None:
            continue
        lost = [place for place in recorded_use(use.run).places if place in pruning.doomed]
        if lost:
            stages = ", ".join(dict.fromkeys(stage for stage, _fingerprint in lost))
            lines.append(
                f"{use.run} was made with other settings than {use.label} has now, and its shards "
                f"would go ({stages}); --keep {use.run} keeps them"
            )
    return lines


def remove(pruning: Pruning) -> None:
    """Remove what is doomed. Cut short, it has removed a part: the same command goes on.

    Raises:
        InputError: the store refuses.
        StorageError: the store cannot be reached, or keeps failing.
    """
    with ThreadPoolExecutor(_REMOVERS) as removers:
        for urls in _portions(pruning):
            list(removers.map(storage.delete, urls))


def _portions(pruning: Pruning) -> Iterator[list[str]]:
    """URLs a few hundred at a time: an interruption waits for one portion at most."""
    urls = [shard.url for shards in pruning.doomed.values() for shard in shards]
    for start in range(0, len(urls), _AT_ONCE):
        yield urls[start : start + _AT_ONCE]
