"""Which of a few texts have most of their n-grams in another one: an inverted index of the few."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

#: An n-gram of more indexed rows than this is a template's, and says nothing of any one of them.
TEMPLATE_ROWS = 10
#: Texts of fewer words are found by being equal only.
SHORTEST = 3
#: Stands for a template's word; no word has this character.
PARTED = "\0"
# Of the rolling hash: any odd number without a pattern. Two different n-grams of 10^9 and of 10^5
# share one of its 2^64 values with a probability of some 10^-5.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BINS = 1 << 20  # counting takes a pass over them, sorting is slower up to about there

Words = Sequence[str]


@dataclass(frozen=True)
class Shares:
    """Pairs of a row and an indexed text, with the share of the text's n-grams in the row."""

    row: Int[np.ndarray, " h"]
    text: Int[np.ndarray, " h"]
    share: Float[np.ndarray, " h"]


@dataclass(frozen=True)
class _Hashed:
    """The n-grams of a block of texts, laid end to end; a position is that of its first word."""

    values: UInt64[np.ndarray, " w"]
    at: Int[np.ndarray, " w"]
    text: Int[np.ndarray, " w"]
    starts: Int[np.ndarray, " t"]
    length: int


def rolling(codes: UInt64[np.ndarray, " c"], n: int) -> UInt64[np.ndarray, " c-n+1"]:
    """Hashes of all runs of n codes: polynomials in an odd base, modulo 2^64."""
    count = max(0, len(codes) - n + 1)
    found = codes[:count].copy()
    for step in range(1, n):
        found *= _BASE
        found += codes[step : step + count]
    return found


def complete(known: Bool[np.ndarray, " c"], n: int) -> Int[np.ndarray, " w"]:
    """Where runs of n begin that are True throughout."""
    if len(known) < n:
        return np.empty(0, dtype=np.int64)
    total = np.concatenate([[0], np.cumsum(known)])
    return np.flatnonzero(total[n:] - total[:-n] == n)


def counted(
    numbers: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " u"], Int[np.ndarray, " u"]]:
    """The different ones among small numbers, in order, and how often each occurs."""
    if not len(numbers) or int(numbers.max()) > _BINS:
        return np.unique(numbers, return_counts=True)
    times = np.bincount(numbers)
    found = np.flatnonzero(times)
    return found, times[found]


class NgramIndex:
    """An inverted index of texts.

    A text's own n-grams are its different n-grams but those of templates, which stand in texts of
    more than TEMPLATE_ROWS different groups: `groups` says which texts are of one row (its prompt
    and the whole of it, or two rows with the same prompt).

    Args:
        texts: the words of each one.
        groups: the group of each text.
        n: words of an n-gram.
        overlap: smallest share that counts.
    """

    def __init__(
        self, texts: Sequence[Words], groups: Sequence[int], *, n: int, overlap: float
    ) -> None:
        self.n, self.overlap = n, overlap
        self._codes = {word: _code(word) for text in texts for word in text}
        hashed = self._hash(texts)
        self._short: dict[tuple[str, ...], int] = {}
        for position, text in enumerate(texts):
            if SHORTEST <= len(text) < n:
                self._short.setdefault(tuple(text), position)
        self._lengths = sorted({len(text) for text in self._short})
        #: Words of the longest text that a text of fewer than n words can make up enough of.
        self.longest = self._lengths[-1] / overlap if self._short else 0.0
        pairs = np.unique(np.stack([hashed.values, hashed.text.astype(np.uint64)]), axis=1)
        grams, owner = pairs[0], pairs[1].astype(np.int64)
        rows = np.unique(np.stack([grams, np.asarray(groups, np.uint64)[owner]]), axis=1)[0]
        values, times = np.unique(rows, return_counts=True)
        self.templates = values[times > TEMPLATE_ROWS]
        own = ~_among(grams, self.templates)
        grams, owner = grams[own], owner[own]
        self._grams, first = np.unique(grams, return_index=True)
        self._first = np.append(first, len(grams))
        self._owner = owner
        self._sizes = np.bincount(owner, minlength=len(texts))

    def shares(self, rows: Sequence[Sequence[Words]]) -> Shares:
        """Of some rows, each with its texts: the pairs whose share is `overlap` or more.

        The share is that of the indexed text's own n-grams that stand in any text of the row. A
        text of fewer than n words is one n-gram, and it is common enough to stand in a long text by
        chance: its share is that of the row's text which it makes up, if it stands there at all.
        """
        row_of = np.repeat(np.arange(len(rows)), [len(texts) for texts in rows])
        hashed = self._hash([text for texts in rows for text in texts])
        place = np.minimum(np.searchsorted(self._grams, hashed.values), len(self._grams) - 1)
        hit = np.zeros(len(place), dtype=bool)
        if len(self._grams):
            hit = self._grams[place] == hashed.values
        width = max(1, len(self._grams))
        pairs = np.unique(row_of[hashed.text[hit]] * width + place[hit])
        row, gram = pairs // width, pairs % width
        times = self._first[gram + 1] - self._first[gram]
        offset = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        text = self._owner[np.repeat(self._first[gram], times) + offset]
        both, counts = counted(np.repeat(row, times) * len(self._sizes) + text)
        row, text = both // len(self._sizes), both % len(self._sizes)
        share = counts / self._sizes[text]
        enough = share >= self.overlap
        short = self._short_ones(rows)
        return Shares(
            np.concatenate([row[enough], [each[0] for each in short]]).astype(np.int64),
            np.concatenate([text[enough], [each[1] for each in short]]).astype(np.int64),
            np.concatenate([share[enough], [each[2] for each in short]]),
        )

    def without_templates(self, texts: Sequence[Words]) -> list[Words]:
        """The texts with PARTED in place of the words that stand in a template's n-gram."""
        if not len(self.templates):
            return list(texts)
        hashed = self._hash(texts)
        begins = hashed.at[_among(hashed.values, self.templates)]
        change = np.zeros(hashed.length + 1, dtype=np.int64)
        np.add.at(change, begins, 1)
        np.add.at(change, begins + self.n, -1)
        inside = np.cumsum(change)[:-1] > 0
        left: list[Words] = []
        for text, start in zip(texts, hashed.starts.tolist(), strict=True):
            covered = inside[start : start + len(text)]
            if covered.any():
                text = [PARTED if gone else word for word, gone in zip(text, covered, strict=True)]
            left.append(text)
        return left

    def _hash(self, texts: Sequence[Words]) -> _Hashed:
        """The n-grams of indexed words; no other can be one of the index."""
        lengths = np.fromiter((len(text) for text in texts), np.int64, len(texts))
        starts = np.cumsum(lengths + 1) - (lengths + 1)
        total = int((lengths + 1).sum())
        get, codes = self._codes.get, np.zeros(total, dtype=np.uint64)
        for text, start in zip(texts, starts.tolist(), strict=True):
            if text:
                codes[start : start + len(text)] = [get(word, 0) for word in text]
        at = complete(codes != 0, self.n)
        values = rolling(codes, self.n)[at]
        return _Hashed(values, at, np.searchsorted(starts, at, side="right") - 1, starts, total)

    def _short_ones(self, rows: Sequence[Sequence[Words]]) -> list[tuple[int, int, float]]:
        if not self._short:
            return []
        found: dict[tuple[int, int], float] = {}
        for row, texts in enumerate(rows):
            for text in texts:
                if len(text) > self.longest:
                    continue
                for length in self._lengths:
                    if not length <= len(text) or length / len(text) < self.overlap:
                        continue
                    for start in range(len(text) - length + 1):
                        known = self._short.get(tuple(text[start : start + length]))
                        if known is not None:
                            key = (row, known)
                            found[key] = max(found.get(key, 0.0), length / len(text))
        return [(row, text, share) for (row, text), share in found.items()]


def _among(
    values: UInt64[np.ndarray, " v"], ordered: UInt64[np.ndarray, " s"]
) -> Bool[np.ndarray, " v"]:
    """Which values stand in an ordered array."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values


def _code(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1  # 0 stands for words that are not indexed
