"""Rows that are one of a few target rows, or nearly: equal, by n-grams, or by MinHash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from influence.minhash_index import MinhashIndex
from influence.ngram_index import PARTED, NgramIndex
from influence.normal_text import Views

#: In order of their weight: the first kind that is found of a row is the one that is told.
KINDS = ("exact", "ngram", "minhash")
_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Match:
    """The best match of a row: the target row's position, the kind, and 1 for equal texts, the
    share of the target row's n-grams, or the estimated Jaccard similarity."""

    target: int
    kind: str
    overlap: float


class NearDuplicates:
    """Finds rows that match one of some target rows.

    Both the prompt alone and the whole conversation count: a row with the test's question and
    another answer is contaminated.

    - exact: the same words in the prompt, or in the whole.
    - ngram: `overlap` or more of the n-grams of the target row's prompt, or of all of it, stand in
      the row. See `NgramIndex` for target rows of fewer than n words.
    - minhash: the prompts, or the whole conversations, have a Jaccard similarity of `jaccard` or
      more, as MinHash estimates it; of texts of n words or more, templates left out.

    Of several matches of a kind that with the largest overlap is told, of those the first.
    """

    def __init__(
        self, targets: Sequence[Views], *, ngram: int, overlap: float, jaccard: float
    ) -> None:
        self._n = ngram
        self._exact: dict[tuple[bool, str], int] = {}
        texts: list[list[str]] = []
        self._target_of: list[int] = []
        groups: dict[str, int] = {}
        group_of: list[int] = []
        for position, target in enumerate(targets):
            for is_prompt, words in ((True, target.prompt), (False, target.whole)):
                if words:
                    self._exact.setdefault((is_prompt, " ".join(words)), position)
                    texts.append(words)
                    self._target_of.append(position)
                    key = " ".join(target.prompt or target.whole)
                    group_of.append(groups.setdefault(key, len(groups)))
        self._grams = NgramIndex(texts, group_of, n=ngram, overlap=overlap)
        self._minhash = [
            MinhashIndex(self._shingled([target.prompt for target in targets]), jaccard=jaccard),
            MinhashIndex(self._shingled([target.whole for target in targets]), jaccard=jaccard),
        ]

    def matches(self, rows: Sequence[Views]) -> Iterator[Match | None]:
        """The best match of each row, or None. A row's does not depend on the others."""
        for start in range(0, len(rows), _AT_ONCE):
            yield from self._block(rows[start : start + _AT_ONCE])

    def _block(self, rows: Sequence[Views]) -> list[Match | None]:
        found: list[Match | None] = [self._equal(row) for row in rows]
        left = [position for position, match in enumerate(found) if match is None]
        grams = self._of_ngrams([rows[position] for position in left])
        for position, match in zip(left, grams, strict=True):
            found[position] = match
        left = [position for position, match in enumerate(found) if match is None]
        similar = self._similar([rows[position] for position in left])
        for position, match in zip(left, similar, strict=True):
            found[position] = match
        return found

    def _equal(self, row: Views) -> Match | None:
        for is_prompt, words in ((True, row.prompt), (False, row.whole)):
            if words:
                target = self._exact.get((is_prompt, " ".join(words)))
                if target is not None:
                    return Match(target, "exact", 1.0)
        return None

    def _of_ngrams(self, rows: Sequence[Views]) -> list[Match | None]:
        shares = self._grams.shares([self._apart(row) for row in rows])
        best: list[Match | None] = [None] * len(rows)
        for row, text, share in zip(
            shares.row.tolist(), shares.text.tolist(), shares.share.tolist(), strict=True
        ):
            best[row] = _better(best[row], Match(self._target_of[text], "ngram", share))
        return best

    def _apart(self, row: Views) -> tuple[list[str], ...]:
        """The texts of a row, without the prompt where all of its n-grams stand in the whole."""
        begins = row.whole[: len(row.prompt)] == row.prompt
        if begins and len(row.prompt) > self._grams.longest:
            return (row.whole,)
        return row.whole, row.prompt

    def _similar(self, rows: Sequence[Views]) -> list[Match | None]:
        best: list[Match | None] = [None] * len(rows)
        sides = ([row.prompt for row in rows], [row.whole for row in rows])
        for index, texts in zip(self._minhash, sides, strict=True):
            # Without templates a text has fewer shingles, and none that it has not with them.
            numbers, indexed = index.plausible([" ".join(text) for text in texts])
            some = np.unique(numbers)
            own = self._shingled([texts[row] for row in some])
            for row, text in zip(some.tolist(), own, strict=True):
                estimate = index.best(text, indexed[numbers == row])
                if estimate is not None:
                    match = Match(estimate.text, "minhash", estimate.jaccard)
                    best[row] = _better(best[row], match)
        return best

    def _shingled(self, texts: Sequence[Sequence[str]]) -> list[str]:
        """What shingles are made of: nothing of a text that has fewer than n words of its own."""
        own = self._grams.without_templates(texts)
        return [" ".join(text) if len(text) - text.count(PARTED) >= self._n else "" for text in own]


def _better(one: Match | None, other: Match) -> Match:
    if one is None:
        return other
    return min(one, other, key=lambda match: (-match.overlap, match.target))
