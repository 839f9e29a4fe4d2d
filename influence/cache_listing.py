"""What a cache holds: shards by stage and fingerprint, and what is no shard, from one listing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from influence import storage
from influence.cache_record import CachedFingerprint, CacheListing, OtherObjects
from influence.cache_use import Place, Use
from influence.embedding_record import CHOICES
from influence.history import FOLDER
from influence.methods import METHODS
from influence.own_training import STAGES as TRAINED
from influence.schemas import layout_of

#: The stages whose fingerprints this version can compute. What is kept under any other name (of a
#: later version, say) is no shard here, and so is never pruned.
STAGES = (
    "catalogue",
    "contamination",
    "embedding",
    "target_vectors",
    "target_gradients",
    "gradients",
    "inner_products",
    *(stage.name for method in METHODS.values() for stage in method.stages),
    *TRAINED,
)

# See `influence.units.Unit.key`: content, first and last row, the rows' digest, the group column's.
_KEY = re.compile(
    rf"({'|'.join(STAGES)})/([0-9a-f]{{32}})/"
    r"[0-9a-f]+-(\d+)-(\d+)(-[0-9a-f]{16})?(?:-[0-9a-f]{8})?\.parquet"
)
# Of a training everything goes together: adapter, checkpoints, lease.
_TRAINING = re.compile(rf"({'|'.join(TRAINED)})/([0-9a-f]{{32}})/.+")
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A listed object with a shard's name, or a file of a job's own training. `rows` is None where
    its name does not tell."""

    url: str
    place: Place
    rows: int | None
    size: int
    modified: datetime


@dataclass
class Contents:
    """What lies below a cache's URL.

    Attributes:
        shards: objects with a shard's name, empty ones among them.
        foreign: name (below the URL) and size of every other object, but for what runs leave of
            their speeds and choices (`influence.history`, `influence.embedding_choice`).
    """

    url: str
    shards: list[StoredShard] = field(default_factory=list)
    foreign: list[tuple[str, int]] = field(default_factory=list)

    @property
    def inner(self) -> str | None:
        """The URL of a cache that lies in a folder of this one: of RUN/cache if this is RUN."""
        for name, _size in self.foreign:
            folder, _, rest = name.partition("/")
            if _KEY.fullmatch(rest):
                return storage.join(self.url, folder)
        return None

    def by_place(self) -> dict[Place, list[StoredShard]]:
        """The shards of every stage and fingerprint, stages in the order of STAGES."""
        found: dict[Place, list[StoredShard]] = {}
        for shard in sorted(self.shards, key=lambda s: (STAGES.index(s.place[0]), s.url)):
            found.setdefault(shard.place, []).append(shard)
        return found


def scan_cache(url: str) -> Contents:
    """List everything below a cache's URL; no object is opened.

    Raises:
        InputError: the bucket does not exist, or the store refuses.
        StorageError: the store cannot be reached.
    """
    root = storage.join(url, "x").removesuffix("x")
    contents = Contents(url)
    for info in storage.list_objects(url):
        name = info.url.removeprefix(root)
        match = _KEY.fullmatch(name)
        if match is None and name.startswith((f"{FOLDER}/", f"{CHOICES}/")):
            continue
        if part := _TRAINING.fullmatch(name):
            place = (part[1], part[2])
            contents.shards.append(StoredShard(info.url, place, None, info.size, info.modified))
            continue
        if match is None:
            contents.foreign.append((name, info.size))
            continue
        first, last = int(match[3]), int(match[4])
        whole = match[5] is None or first == last
        rows = last - first + 1 if whole else None
        place = (match[1], match[2])
        contents.shards.append(StoredShard(info.url, place, rows, info.size, info.modified))
    return contents


def make_listing(contents: Contents, uses: Sequence[Use] = ()) -> CacheListing:
    """Sizes, ages, users and meaning of every stage and fingerprint.

    Of a fingerprint that none of `uses` explains, one shard's footer is read: it says how long its
    vectors are and what made them, though not of what.
    """
    listing = CacheListing(cache=contents.url, foreign=_others(contents.foreign))
    empty = []
    for place, members in contents.by_place().items():
        whole = [shard for shard in members if shard.size]
        empty += [
            ("/".join(shard.url.rsplit("/", 3)[1:]), 0) for shard in members if not shard.size
        ]
        if not whole:
            continue
        users = [use for use in uses if place in use.places]
        values = next((use.places[place] for use in users if use.places[place]), None)
        rows = [shard.rows for shard in whole if shard.rows is not None]
        stage, fingerprint = place
        entry = CachedFingerprint(
            stage=stage,
            fingerprint=fingerprint,
            shards=1 if stage in TRAINED else len(whole),
            rows=sum(rows) if len(rows) == len(whole) else None,
            bytes=sum(shard.size for shard in whole),
            newest=max(shard.modified for shard in whole),
            used_by=[use.label for use in users],
            values=values,
        )
        if values is None and stage not in TRAINED:
            entry.made = _footer_facts(min(whole, key=lambda shard: shard.size).url)
        listing.fingerprints.append(entry)
    listing.empty = _others(empty)
    return listing


def describe(values: Mapping[str, Any]) -> str:
    """What a fingerprint covers, in one line: digests cut short, what is not set left out."""
    shown = []
    for key, value in values.items():
        if value is None or key == "format_version":
            continue
        if key == "target_vectors" and isinstance(value, list):
            value = f"{len(value)} shard{'s' * (len(value) != 1)}"
        elif isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value):
            value = value[:8]
        elif isinstance(value, list):
            value = "[" + " ".join(str(each) for each in value) + "]"
        shown.append(f"{key} {value}")
    return ", ".join(shown)


def _others(objects: Iterable[tuple[str, int]]) -> OtherObjects:
    listed = sorted(objects)
    return OtherObjects(
        objects=len(listed),
        bytes=sum(size for _name, size in listed),
        examples=[name for name, _size in listed[:_EXAMPLES]],
    )


def _footer_facts(url: str) -> dict[str, Any]:
    """Vectors, device and torch version of a shard, from its footer; {} if it is damaged."""
    source = storage.open_input(url)
    try:
        schema = pq.read_schema(source)
        meta = json.loads((schema.metadata or {})[b"influence"])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return {}
    finally:
        source.close()
    facts: dict[str, Any] = {}
    if b"vector" in (schema.metadata or {}):
        layout = layout_of(schema)
        facts["vectors"] = f"{layout.dtype} x {layout.dim:,}"
    return facts | {name: meta[name] for name in ("device", "torch") if meta.get(name)}
