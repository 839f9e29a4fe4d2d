"""What the cache's commands print."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC

from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence.cache_listing import Contents, StoredShard, describe
from influence.cache_prune import Pruning
from influence.cache_record import CachedFingerprint, CacheListing, OtherObjects
from influence.cache_use import Place
from influence.report_format import DASH, size, whole
from influence.vector_export import Exported

_DIGITS = 8


def print_listing(
    listing: CacheListing, users: Sequence[str], inner: str | None, console: Console
) -> None:
    """A table of stages and fingerprints, who `users` are, and what the fingerprints cover."""
    entries = listing.fingerprints
    if entries:
        console.print(_listing_table(entries, users))
        shards, volume = sum(e.shards for e in entries), sum(e.bytes for e in entries)
        _line(console, f"{listing.cache}: {shards:,} shards, {size(volume)}")
    else:
        _line(console, _no_shards(listing.cache, inner))
    for number, user in enumerate(users, 1):
        used = sum(e.bytes for e in entries if user in e.used_by)
        _line(console, f"{number} = {user}: uses {size(used)}")
    for entry in entries:
        if entry.values is not None:
            _line(console, f"{_name(entry)}: {describe(entry.values)}")
        elif entry.made:
            made = ", ".join(f"{key} {value}" for key, value in entry.made.items())
            _line(console, f"{_name(entry)}: {made}")
    if any(entry.values is None for entry in entries):
        _line(console, "model and settings are shown of what a given --config or --run uses")
    _print_others(listing.empty, "of a shard's name, but empty", console)
    _print_others(listing.foreign, "no shard", console)


def _listing_table(entries: Sequence[CachedFingerprint], users: Sequence[str]) -> Table:
    headings = ["stage", "fingerprint", "shards", "rows", "size", "newest (UTC)"]
    table = Table()
    for heading in [*headings, "used by"] if users else headings:
        right = heading in ("shards", "rows", "size")
        no_wrap = heading != "newest (UTC)"  # what gives way on a narrow terminal
        table.add_column(heading, justify="right" if right else "left", no_wrap=no_wrap)
    for entry in entries:
        cells = [
            entry.stage,
            entry.fingerprint[:_DIGITS],
            whole(entry.shards),
            whole(entry.rows),
            size(entry.bytes),
            entry.newest.astimezone(UTC).strftime("%Y-%m-%d %H:%M"),
        ]
        if users:
            by = [str(number) for number, user in enumerate(users, 1) if user in entry.used_by]
            cells.append(" ".join(by) or DASH)
        table.add_row(*cells)
    return table


def print_pruning(
    pruning: Pruning,
    contents: Contents,
    older_than: str,
    *,
    removed: bool,
    console: Console,
) -> None:
    """What goes (or went) of every stage, what stays and why, and how to go on."""
    if not contents.shards:
        _line(console, _no_shards(contents.url, contents.inner))
        return
    doomed = _all(pruning.doomed)
    if doomed:
        console.print(_pruning_table(pruning, "removed" if removed else "would go"))
    kept = _all(pruning.kept)
    _line(console, f"in use: {len(kept):,} shards, {_volume(kept)}")
    young = _all(pruning.young)
    if young:
        _line(
            console,
            f"not in use, but the newest is younger than {older_than}: {len(young):,} shards, "
            f"{_volume(young)} (--older-than)",
        )
    if contents.foreign:
        _line(console, f"no shards, left alone: {len(contents.foreign):,} objects")
    for note in () if removed else pruning.notes:
        _line(console, f"note: {note}")
    if not doomed:
        _line(console, "nothing to remove")
    elif removed:
        _line(console, f"removed: {len(doomed):,} shards, {_volume(doomed)}")
    else:
        _line(
            console,
            f"Nothing was removed. To remove {len(doomed):,} shards, {_volume(doomed)}: the same "
            "command with --yes",
        )


def _pruning_table(pruning: Pruning, what: str) -> Table:
    table = Table()
    for heading in (what, "fingerprints", "shards", "size"):
        table.add_column(heading, justify="left" if heading == what else "right")
    for stage in dict.fromkeys(stage for stage, _fingerprint in pruning.doomed):
        mine = {place: shards for place, shards in pruning.doomed.items() if place[0] == stage}
        shards = _all(mine)
        table.add_row(stage, whole(len(mine)), whole(len(shards)), _volume(shards))
    return table


def print_exported(done: Exported, out: str, console: Console) -> None:
    """How many rows of what were written, and how many were not, and why."""
    for folder, rows in done.rows.items():
        _line(console, f"{out}/{folder}: {rows:,} rows")
    _line(console, f"files: {done.files:,}")
    if done.left_out:
        reasons = ", ".join(f"{reason}: {rows:,}" for reason, rows in done.left_out.most_common())
        total = sum(done.left_out.values())
        _line(console, f"rows without a vector, left out: {total:,} ({reasons})")
    if done.repeated:
        _line(console, f"rows that an earlier shard had, too, left out: {done.repeated:,}")
    if done.missing:
        _line(console, f"shards that are missing or damaged: {done.missing:,}")


def _print_others(others: OtherObjects, what: str, console: Console) -> None:
    if others.objects:
        names = ", ".join(others.examples)
        dots = ", ..." if others.objects > len(others.examples) else ""
        _line(console, f"{what}: {others.objects:,} objects, {size(others.bytes)}: {names}{dots}")


def _no_shards(url: str, inner: str | None) -> str:
    hint = "a config's cache is its `cache`, by default RUN/cache"
    return f"{url}: no shards" + (f"; did you mean {inner}?" if inner else f"; {hint}")


def _name(entry: CachedFingerprint) -> str:
    return f"{entry.stage} {entry.fingerprint[:_DIGITS]}"


def _all(places: dict[Place, list[StoredShard]]) -> list[StoredShard]:
    return [shard for shards in places.values() for shard in shards]


def _volume(shards: Sequence[StoredShard]) -> str:
    return size(sum(shard.size for shard in shards))


def _line(console: Console, text: str) -> None:
    """A line as it is: rich looks for neither markup nor emoji codes, and breaks nothing."""
    console.print(Text(text), soft_wrap=True, highlight=False)
