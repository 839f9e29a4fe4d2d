"""What `influence cache list` and `prune` do, for the command and for programs."""

from __future__ import annotations

from collections.abc import Sequence

from influence.cache_listing import Contents, make_listing
from influence.cache_prune import (
    Pruning,
    check_kept,
    other_settings,
    parse_age,
    plan_prune,
    remove,
)
from influence.cache_record import CacheListing
from influence.cache_use import recorded_use, use_of


def listing_of(contents: Contents, configs: Sequence[str], runs: Sequence[str]) -> CacheListing:
    """The listing of a cache, with what each config uses and each run used, in that order.

    Raises:
        InputError: a config or run that is not there, or whose files or model are not.
    """
    uses = [use_of(named, contents.url) for named in configs]
    uses += [recorded_use(named) for named in runs]
    return make_listing(contents, uses)


def prune(contents: Contents, keep: Sequence[str], older_than: str, *, removing: bool) -> Pruning:
    """Decide what goes, and with `removing` remove it; `keep` are configs and run directories.

    Raises:
        InputError: one of `keep` cannot be resolved, or none uses anything here: nothing is
            removed then.
        StorageError: the store cannot be reached, or keeps failing.
    """
    guard = parse_age(older_than)
    uses = [use_of(each, contents.url) for each in dict.fromkeys(keep)]
    used = {place for use in uses for place in use.places}
    pruning = plan_prune(contents, used, guard)
    check_kept(uses, pruning, contents.url)
    pruning.notes.extend(other_settings(uses, pruning))
    if removing:
        remove(pruning)
    return pruning
