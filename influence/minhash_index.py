"""Near-duplicates of a few texts by MinHash of character shingles.

An n-gram of words is lost with any of its letters. Small changes all over a text (spelling,
inflection, numbers) leave no n-gram of eight words and nearly all runs of five characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from influence.ngram_index import complete, counted, rolling

#: Characters of a shingle.
CHARACTERS = 5
#: Hash functions: the estimate of a Jaccard similarity J has a standard error of
#: sqrt(J (1 - J) / FUNCTIONS), 0.025 at 0.8 (Broder 1997, "On the resemblance and containment of
#: documents", section 4).
FUNCTIONS = 256
_SCHEME = "affine64"
_TABLE_BITS, _SLOTS = 16, 16
# An odd factor spreads hashes over the high bits, and keeps different ones different.
_MIX = np.uint64(0xD6E8FEB86659FD93)
# Of a text's shingles, beside those that a near-duplicate may lack: what has to be found of it
# before a signature is made.
_MARGIN = 0.2


@dataclass(frozen=True)
class Estimate:
    """The most similar indexed text of a row, and the similarity as MinHash estimates it."""

    text: int
    jaccard: float


class MinhashIndex:
    """Signatures of texts, and which of them a further text could be a near-duplicate of.

    |A \u2229 T| >= j |A \u222a T| needs |T \\ A| <= (1 - j) |T|: of any p shingles of T, A has
    p - (1 - j) |T| at least. Asking that of the rarest ones of every T spares nearly all rows a
    signature, and none whose similarity is j or more.

    Args:
        texts: each one's words, joined by single spaces. The character 0 parts a text: no shingle
            has it. A text without shingles is found never.
        jaccard: smallest similarity that counts.
    """

    def __init__(self, texts: Sequence[str], *, jaccard: float) -> None:
        self.jaccard = jaccard
        sets = [shingles(text) for text in texts]
        self._sizes = np.array([len(each) for each in sets], dtype=np.int64)
        everything = np.concatenate([*sets, np.empty(0, np.uint64)])
        values, times = np.unique(everything, return_counts=True)
        asked, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        self._needed = np.zeros(len(texts), dtype=np.int64)
        for position, each in enumerate(sets):
            missing = int((1 - jaccard) * len(each) + 1e-9)
            size = min(len(each), missing + max(1, round(_MARGIN * len(each))))
            order = np.lexsort((each, times[np.searchsorted(values, each)]))
            asked.append(each[order[:size]])
            owners.append(np.full(size, position))
            self._needed[position] = size - missing
        every, owner = np.concatenate(asked), np.concatenate(owners)
        order = np.lexsort((owner, every))
        self._owner = owner[order]
        self._values, first = np.unique(every[order], return_index=True)
        self._first = np.append(first, len(every))
        # Where the values of each slot begin; most slots are empty, which is faster than a search.
        bits = max(_TABLE_BITS, int(np.ceil(np.log2(_SLOTS * max(1, len(self._values))))))
        self._shift = np.uint64(64 - bits)
        slots = np.arange((1 << bits) + 1, dtype=np.uint64)
        self._begin = np.searchsorted(self._values >> self._shift, slots).astype(np.int32)
        self._used = np.diff(self._begin) > 0
        self._deepest = int(np.diff(self._begin).max(initial=0))
        self._signatures = np.stack(
            [signature(each) for each in sets] or [np.empty(FUNCTIONS, np.uint64)]
        )

    def best(self, text: str, among: Int[np.ndarray, " p"]) -> Estimate | None:
        """Of these indexed texts the most similar one, if its similarity is `jaccard` or more."""
        own = shingles(text)
        # |A and T| is at most the smaller of the two sets, |A or T| at least the larger.
        smaller = np.minimum(self._sizes[among], len(own))
        among = among[smaller >= self.jaccard * np.maximum(self._sizes[among], len(own))]
        if len(own) and len(among):
            times = np.bincount(self._owners(self._find(own)[1])[1])
            among = among[np.append(times, np.zeros(among.max() + 1))[among] >= self._needed[among]]
        if not len(own) or not len(among):
            return None
        similar = (self._signatures[among] == signature(own)).mean(axis=1)
        best = int(np.argmax(similar))
        if similar[best] < self.jaccard:
            return None
        return Estimate(int(among[best]), float(similar[best]))

    def plausible(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        """Pairs (text, indexed text), in order, that share enough of the indexed one's rarest
        shingles."""
        if not len(self._values):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        lengths = np.fromiter((len(text) for text in texts), np.int64, len(texts))
        starts = np.cumsum(lengths + 1) - (lengths + 1)
        # A run that spans two texts is nobody's shingle.
        at, place = self._find(rolling(_codes("\0".join(texts)), CHARACTERS) * _MIX)
        row = np.searchsorted(starts, at, side="right") - 1
        times, owner = self._owners(place)
        # A shingle that a text has twice counts twice, which spares fewer rows and loses none.
        pairs, counts = counted(np.repeat(row, times) * len(self._needed) + owner)
        pairs = pairs[counts >= self._needed[pairs % len(self._needed)]]
        return pairs // len(self._needed), pairs % len(self._needed)

    def _owners(
        self, place: Int[np.ndarray, " s"]
    ) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " o"]]:
        """Of indexed shingles: how many texts each is asked of, and which, one after the other."""
        times = self._first[place + 1] - self._first[place]
        offset = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        return times, self._owner[np.repeat(self._first[place], times) + offset]

    def _find(
        self, hashed: UInt64[np.ndarray, " s"]
    ) -> tuple[Int[np.ndarray, " h"], Int[np.ndarray, " h"]]:
        """(position among these, place among the index's) of the shingles that are indexed."""
        slot = hashed >> self._shift
        at = np.flatnonzero(self._used[slot])
        place, hashed = self._begin[slot[at]], hashed[at]
        last, hit = len(self._values) - 1, np.zeros(len(at), dtype=bool)
        for _ in range(self._deepest):
            hit |= self._values[place] == hashed
            place = np.where(hit, place, np.minimum(place + 1, last))
        return at[hit], place[hit]


def shingles(text: str) -> UInt64[np.ndarray, " s"]:
    """The different runs of CHARACTERS characters of a text, hashed, in increasing order."""
    codes = _codes(text)
    ordered = np.sort(rolling(codes, CHARACTERS)[complete(codes != 0, CHARACTERS)] * _MIX)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def signature(values: UInt64[np.ndarray, " s"]) -> UInt64[np.ndarray, " f"]:
    """The MinHash signature of a set of hashes."""
    from datasketch import MinHash  # half a second, which no other worker should pay

    made = MinHash(
        num_perm=FUNCTIONS,
        hashfunc=int,
        permutations=_permutations(),
        scheme=_SCHEME,
    )
    made.update_batch(values.tolist())
    return made.hashvalues


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=FUNCTIONS, seed=1, scheme=_SCHEME).permutations


def _codes(text: str) -> UInt64[np.ndarray, " c"]:
    """The code points of a text."""
    raw = text.encode("utf-32-le", "surrogatepass")
    return np.frombuffer(raw, dtype="<u4").astype(np.uint64)
