"""`layers: auto`: which layers a run keeps, chosen on a pilot, and how workers learn of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float

from influence import storage
from influence.array_files import put_named
from influence.cache import Cache
from influence.catalogue import Catalogue
from influence.datainf import LayerBlock, Rows, datainf, layer_influences
from influence.errors import InputError
from influence.fingerprints import Fingerprint, fingerprint
from influence.gradient_rows import gradient_rows, layer_blocks
from influence.layer_economy import Choice, Economy, LayerGroup, economise, module_groups
from influence.memory_budget import parse_memory
from influence.records import LayerChoice, LayerSubset
from influence.shard_reader import read_shards
from influence.units import ExactUnits

TABLE_ROWS = 32


def restricted_fingerprint(whole: Fingerprint, names: Sequence[str]) -> Fingerprint:
    """Of the gradients of these layers alone; the same as if `layers` had named them."""
    return fingerprint({**whole.values, "layers": sorted(names)})


def write_names(url: str, names: Sequence[str]) -> str:
    """Put the names of the layers to keep below a URL; returns the key."""
    data = json.dumps(list(names)).encode()
    key = f"layers/{hashlib.blake2b(data, digest_size=16).hexdigest()}.json"
    put_named(url, key, data, lambda: read_names(url, key))
    return key


def read_names(url: str, key: str) -> tuple[str, ...]:
    """Read what `write_names` left.

    Raises:
        InputError: the object is not the one that its name says.
    """
    data = storage.read_bytes(storage.join(url, key))
    if f"layers/{hashlib.blake2b(data, digest_size=16).hexdigest()}.json" != key:
        raise InputError(f"{key}: its contents are not what its name says; remove it")
    return tuple(json.loads(data))


def choose_layers(
    cache: Cache,
    exact: ExactUnits,
    pool: Catalogue,
    targets: Float[np.ndarray, "m d"],
    memory: str | int,
    *,
    unit: bool,
) -> LayerChoice:
    """Judge subsets of the layers on a pilot's influences; a shard of the pilot at a time.

    targets: mean gradients of the columns, all layers.

    Raises:
        InputError: not one layer is within the memory, or the pilot has fewer than 4 usable rows.
    """
    blocks: list[LayerBlock] = []

    def rows() -> Iterator[Rows]:
        for found, vectors, norms in pilot_rows(cache, exact, pool, unit=unit):
            blocks[:] = found
            yield torch.from_numpy(vectors), torch.from_numpy(norms)

    count = sum(len(vectors) for vectors, _ in rows())
    if count < 4:
        raise InputError(
            f"layer_economy.pilot: {count} of its rows have a usable gradient; expected 4 at least"
        )
    groups = module_groups(blocks)
    V = torch.from_numpy(targets.astype(np.float32))
    products = datainf(rows, V, blocks)
    parts = np.concatenate([_group_parts(v, products, blocks, groups) for v, _ in rows()])
    full = sum(group.bytes for group in groups)
    share, whole = parse_memory(memory)
    budget = share * full if share is not None else (whole or 0.0) / len(pool)
    economy = economise(parts, groups, budget)
    if economy is None:
        least = min(group.bytes for group in groups)
        raise InputError(
            f"layer_economy.memory: {memory!r} is {budget:,.0f} bytes a row, and the smallest "
            f"layer takes {least:,}; expected at least {least * len(pool):,} bytes for "
            f"{len(pool):,} rows"
        )
    return LayerChoice(
        names=[blocks[i].name for g in economy.chosen.groups for i in groups[g].layers],
        rule=economy.chosen.rule,
        pilot=count,
        groups=len(groups),
        row_bytes=economy.chosen.bytes,
        full_row_bytes=full,
        budget_row_bytes=budget,
        rows=len(pool),
        spearman=economy.chosen.spearman,
        held_out=economy.chosen.held_out,
        table=[
            LayerSubset(
                rule=choice.rule,
                groups=len(choice.groups),
                row_bytes=choice.bytes,
                spearman=choice.spearman,
                held_out=choice.held_out,
            )
            for choice in _thinned(economy)
        ],
    )


def _thinned(economy: Economy) -> list[Choice]:
    """At most TABLE_ROWS subsets of each rule, among them the largest and the one that is used."""
    by_rule: dict[str, list[Choice]] = {}
    for choice in economy.choices:
        by_rule.setdefault(choice.rule, []).append(choice)
    kept = []
    for choices in by_rule.values():
        count = min(len(choices), TABLE_ROWS)
        places = set(np.linspace(0, len(choices) - 1, count).round().astype(int).tolist())
        kept += [c for i, c in enumerate(choices) if i in places or c is economy.chosen]
    return kept


def _group_parts(
    vectors: torch.Tensor,
    products: torch.Tensor,
    blocks: Sequence[LayerBlock],
    groups: Sequence[LayerGroup],
) -> np.ndarray:
    """Influences of some rows by group (b x m x groups)."""
    parts = layer_influences(vectors, products, blocks)
    return torch.stack([parts[:, :, list(g.layers)].sum(2) for g in groups], dim=2).numpy()


def pilot_rows(
    cache: Cache, exact: ExactUnits, pool: Catalogue, *, unit: bool
) -> Iterable[tuple[list[LayerBlock], np.ndarray, np.ndarray]]:
    """(layers, gradients, norms) of the wanted rows with a usable gradient, shard by shard."""
    files = {file.url: file for file in pool.files}
    left = pool.scorable.copy()
    if exact.wanted is not None:
        left[:] = False
        for url, numbers in exact.wanted.items():
            left[pool.positions(files[url], numbers)] = True
    for each, shard in read_shards(cache, exact.sketches):
        rows = gradient_rows(shard, unit=unit)
        if rows is None:
            continue
        numbers = shard.table.column("row").to_numpy()[rows.usable]
        where = pool.positions(each.file, numbers.tolist())
        new = left[where]  # a row may be in several shards, made for other choices of rows
        left[where] = False
        if new.any():
            yield layer_blocks(shard.layout), rows.vectors[new], rows.norms[new]
