"""What In2Core's own steps take: DataInf's sums, and gradients of layers that a pilot chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from influence import cost, shard_bytes
from influence.curvature_units import STAGE, group_count
from influence.quantities import Quantities, StageWork
from influence.units import Unit

# What the file of a query takes beside its numbers, and a group's list beside keys and masks.
_QUERY_BYTES, _PAIR_BYTES = 1_500, 8


def curvature_work(
    gradients: Sequence[Unit], size: int, columns: int, width: int, layers: int
) -> StageWork:
    """DataInf's passes 0 and 1 over gradient shards of `size` bytes, targets' ones among them.

    Norms are a small part of the shards, and count as read once more with the rest of pass 0.
    """
    rows = sum(unit.count for unit in gradients)
    groups = group_count(len(gradients), 8 * columns * width)
    query = 4 * columns * width + 8 * layers + _QUERY_BYTES
    lists = sum(len(unit.key) + 2 * -(-unit.count // 8) + _PAIR_BYTES for unit in gradients)
    sums = groups * shard_bytes.curvature_shard(columns, width)
    numbers = Quantities(
        shards=groups,
        bundles=groups,
        rows=groups * columns,
        effort=cost.curvature(rows, width, columns),
        read=size + groups * query + lists + sums,
        written=query + lists + sums,
        objects=2 * groups + 1,
    )
    return StageWork(STAGE, numbers, shards=groups)


def together(pilot: StageWork, rest: StageWork, kept: float) -> StageWork:
    """A pilot's gradients, and then those of all rows of which a part of the bytes is kept.

    Which shards the rest will be is not known beforehand.
    """
    one, two = pilot.least, rest.least
    least = Quantities(
        shards=one.shards + two.shards,
        bundles=one.bundles + two.bundles,
        rows=(one.rows or 0) + (two.rows or 0),
        tokens=(one.tokens or 0) + (two.tokens or 0),
        flops=(one.flops or 0.0) + (two.flops or 0.0),
        effort=one.effort + two.effort,
        read=one.read + two.read,
        written=(one.written or 0) + round(kept * (two.written or 0)),
        objects=one.objects + two.objects,
    )
    return replace(pilot, least=least, shards=pilot.shards + rest.shards)
