"""Coverage of a run's targets: from the scores, and from the texts of candidates and targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.candidates import read_rows
from influence.catalogue import Catalogue
from influence.landmarks import row_keys
from influence.records import Coverage, CoverageRow
from influence.score_table import ScoreTable
from influence.sentence_encoder import SentenceEncoder, text_of
from influence.target_columns import TargetColumns
from influence.target_coverage import Nearest, ProponentSums, over_rows

_CHUNK = 512


@dataclass(frozen=True)
class Likeness:
    """Cosines of the sentence embeddings of every column's rows with their nearest candidates."""

    encoder: str
    candidates: int
    highest: Float[np.ndarray, " m"]
    mean: Float[np.ndarray, " m"]


def coverage_of(
    table: ScoreTable, pool: Catalogue, columns: TargetColumns, likeness: Likeness | None
) -> Coverage:
    """Proponents' mass and effective number of every column, in one walk over the scores."""
    sums = ProponentSums(len(columns.columns))
    for block in table.blocks():
        sums.add(block.P[pool.scorable[block.positions]])
    effective = sums.effective
    rows = [
        CoverageRow(
            target=column.target,
            label=column.label,
            proponents=int(sums.proponents[j]),
            opponents=int(sums.opponents[j]),
            mass=float(sums.mass[j]),
            harm=float(sums.harm[j]),
            effective=float(effective[j]),
            nearest=None if likeness is None else float(likeness.highest[j]),
            nearest_mean=None if likeness is None else float(likeness.mean[j]),
        )
        for j, column in enumerate(columns.columns)
    ]
    if likeness is None:
        return Coverage(rows=rows)
    return Coverage(encoder=likeness.encoder, candidates=likeness.candidates, rows=rows)


def likeness_of(
    name: str,
    pool: Catalogue,
    targets: Mapping[str, Catalogue],
    columns: TargetColumns,
    *,
    nearest: int,
    candidates: int,
    seed: int,
) -> Likeness:
    """Encode the targets' rows and the candidates: of a large pool a random part."""
    encoder = SentenceEncoder(name)
    eligible = pool.eligible
    if len(eligible) > candidates:
        keys = row_keys(seed, pool.digests, purpose=b"coverage")[eligible]
        eligible = np.sort(eligible[np.argsort(keys, kind="stable")[:candidates]])
    highest, mean = np.empty(len(columns.columns)), np.empty(len(columns.columns))
    found = {}
    for target, catalogue in targets.items():
        texts = [text for some in _texts(catalogue, np.arange(len(catalogue))) for text in some]
        found[target] = Nearest(encoder.encode(texts), nearest)
    for some in _texts(pool, eligible):
        embeddings = encoder.encode(some)
        for each in found.values():
            each.add(embeddings)
    for target, each in found.items():
        own = [j for j, column in enumerate(columns.columns) if column.target == target]
        rows = [np.asarray(columns.columns[j].rows) for j in own]
        highest[own], mean[own] = over_rows(each.highest, rows), over_rows(each.mean, rows)
    return Likeness(name, len(eligible), highest, mean)


def _texts(catalogue: Catalogue, positions: Int[np.ndarray, " r"]) -> Iterator[list[str]]:
    """What the rows say, some rows at a time, in the order of the positions."""
    for file, rows in catalogue.by_file(positions):
        for first in range(0, len(rows), _CHUNK):
            examples = read_rows(file, rows[first : first + _CHUNK])
            yield [text_of(example.messages) for example in examples]
