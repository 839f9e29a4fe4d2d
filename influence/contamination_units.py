"""The contamination stage: candidates against the targets' texts, without a model.

Its fingerprint covers the texts that are looked for, by their files' contents, and the settings;
a shard says of every candidate which row of which of those files it matches, if any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from influence.cache import Cache
from influence.candidates import SourceFile, read_examples
from influence.config import Config
from influence.errors import InputError
from influence.fingerprints import Fingerprint, fingerprint
from influence.near_duplicates import Match, NearDuplicates
from influence.normal_text import views
from influence.schemas import contamination_schema
from influence.units import Unit

STAGE = "contamination"
# Counted up whenever the same texts and settings would give other matches.
_VERSION = 1

Guards = Sequence[tuple[str, SourceFile]]


def contamination_print(config: Config, guards: Guards) -> dict[str, Fingerprint]:
    """The stage's fingerprint, by its name; nothing where the stage is switched off."""
    settings = config.contamination
    if settings is None:
        return {}
    texts = sorted({(file.content_hash, file.rows) for _name, file in guards})
    found = fingerprint(
        {
            "matching": _VERSION,
            "ngram": settings.ngram,
            "overlap": settings.overlap,
            "jaccard": settings.jaccard,
            "texts": fingerprint({"files": texts}).hex,
        }
    )
    return {STAGE: found}


def guards_of(
    targets: Mapping[str, Sequence[SourceFile]], against: Mapping[str, Sequence[SourceFile]]
) -> Guards:
    """(name, file) of everything that is looked for: the targets, then the further files.

    Raises:
        InputError: a name is a target's and a further file's.
    """
    both = sorted(targets.keys() & against.keys())
    if both:
        raise InputError(
            f"contamination.against.{both[0]}: a target has this name, and its rows are looked for "
            "anyway; expected another name"
        )
    return [(name, file) for of in (targets, against) for name in of for file in of[name]]


class Contamination:
    """Computes and commits units; the index of the targets' texts is made with the first one."""

    def __init__(self, config: Config, cache: Cache) -> None:
        self._config, self._cache = config, cache
        self._made: tuple[str, list[tuple[SourceFile, int]], NearDuplicates] | None = None

    def run(self, unit: Unit) -> tuple[str, int]:
        """(outcome of the commit, rows); a whole shard that is there already is left alone."""
        if self._cache.verified(unit.key):
            return "exists", 0
        places, index = self._index(unit)
        examples = read_examples(unit.file, unit.first, unit.last)
        matches = list(index.matches([views(example.messages) for example in examples]))
        rows = [example.row for example in examples]
        table = _table(rows, matches, places)
        meta = {
            "stage": STAGE,
            "fingerprint": unit.fingerprint,
            "first": unit.first,
            "last": unit.last,
            "device": "cpu",
        }
        return self._cache.commit(unit, table, meta), len(rows)

    def _index(self, unit: Unit) -> tuple[list[tuple[SourceFile, int]], NearDuplicates]:
        if self._made is None or self._made[0] != unit.fingerprint:
            settings = self._config.contamination
            assert settings is not None  # or there would be no units
            places, texts = [], []
            # By content, so that neither names nor their order decide between equal matches.
            files = {(file.content_hash, file.rows): file for _name, file in unit.against}
            for _key, file in sorted(files.items()):
                for example in read_examples(file, 0, file.rows - 1):
                    places.append((file, example.row))
                    texts.append(views(example.messages))
            index = NearDuplicates(
                texts, ngram=settings.ngram, overlap=settings.overlap, jaccard=settings.jaccard
            )
            self._made = (unit.fingerprint, places, index)
        return self._made[1:]


def _table(
    rows: Sequence[int],
    matches: Sequence[Match | None],
    places: Sequence[tuple[SourceFile, int]],
) -> pa.Table:
    found = [None if match is None else (match, *places[match.target]) for match in matches]
    columns = {
        "row": rows,
        "kind": [None if each is None else each[0].kind for each in found],
        "overlap": [None if each is None else each[0].overlap for each in found],
        "target_file": [None if each is None else each[1].content_hash for each in found],
        "target_row": [None if each is None else each[2] for each in found],
    }
    return pa.table(columns, schema=contamination_schema())
