"""Matches against oracles in loops: n-grams of tuples, sets of shingles, equality of words."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from influence.minhash_index import CHARACTERS, FUNCTIONS, MinhashIndex, shingles, signature
from influence.near_duplicates import Match, NearDuplicates
from influence.ngram_index import PARTED, SHORTEST, TEMPLATE_ROWS, NgramIndex
from influence.normal_text import Views, views
from influence.row_formats import Message

VOCABULARY = [f"w{i}" for i in range(400)]


def _grams(text: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}


def _contains(text: list[str], part: list[str]) -> bool:
    return tuple(part) in _grams(text, len(part))


def _template(texts: list[list[str]], groups: list[int], n: int) -> set[tuple[str, ...]]:
    rows: dict[tuple[str, ...], set[int]] = {}
    for text, group in zip(texts, groups, strict=True):
        for gram in _grams(text, n):
            rows.setdefault(gram, set()).add(group)
    return {gram for gram, of in rows.items() if len(of) > TEMPLATE_ROWS}


def _shares_in_loops(
    texts: list[list[str]], groups: list[int], rows: list[list[list[str]]], n: int, overlap: float
) -> dict[tuple[int, int], float]:
    """Every pair for itself, n-grams as tuples."""
    template, found = _template(texts, groups, n), {}
    for i, row in enumerate(rows):
        there = set().union(*(_grams(text, n) for text in row))
        for j, text in enumerate(texts):
            own = _grams(text, n) - template
            share = len(own & there) / len(own) if own else 0.0
            if SHORTEST <= len(text) < n:
                holding = [other for other in row if _contains(other, text)]
                share = max((len(text) / len(other) for other in holding), default=0.0)
            if share >= overlap:
                found[i, j] = share
    return found


def _sentence(draw: random.Random, low: int, high: int) -> list[str]:
    return [draw.choice(VOCABULARY) for _ in range(draw.randint(low, high))]


def _mixed(draw: random.Random, texts: list[list[str]]) -> list[str]:
    """A part of a text among other words, or other words alone."""
    text = list(draw.choice(texts))
    kind = draw.randrange(4)
    if kind == 0:
        return _sentence(draw, 0, 40)
    if kind == 1:
        return _sentence(draw, 0, 9) + text + _sentence(draw, 0, 9)
    if kind == 2:
        cut = draw.randint(0, len(text))
        return text[:cut] + _sentence(draw, 0, 20)
    for _ in range(draw.randint(1, 4)):
        text[draw.randrange(len(text))] = draw.choice(VOCABULARY)
    return text


@pytest.mark.parametrize("n", [1, 3, 5, 8])
@pytest.mark.parametrize("overlap", [0.3, 0.5, 1.0])
def test_shares_are_those_of_a_loop_over_all_pairs(n: int, overlap: float) -> None:
    draw = random.Random(n)
    shared = _sentence(draw, 12, 12)  # in more texts than TEMPLATE_ROWS
    texts = [_sentence(draw, 1, 30) for _ in range(30)]
    texts += [shared + _sentence(draw, 1, 12) for _ in range(TEMPLATE_ROWS + 1)]
    texts += [texts[4], texts[0][:6] or ["w1"]]
    groups = list(range(len(texts)))
    rows = [[_mixed(draw, texts) for _ in range(draw.randint(1, 2))] for _ in range(150)]
    rows += [[shared], [[]], [shared + _sentence(draw, 5, 5)]]
    found = NgramIndex(texts, groups, n=n, overlap=overlap).shares(rows)
    pairs = zip(found.row.tolist(), found.text.tolist(), strict=True)
    ours = dict(zip(pairs, found.share.tolist(), strict=True))
    expected = _shares_in_loops(texts, groups, rows, n, overlap)
    first = {key: value for key, value in expected.items() if texts.index(texts[key[1]]) == key[1]}
    # Of equal short texts only the first one is told, which decides nothing.
    assert {**expected, **ours} == expected, "pairs or shares that a loop does not find"
    assert {**ours, **first} == ours, "a loop finds pairs that are missing"
    assert expected, "nothing to find: the test shows nothing"


def test_what_stands_in_many_rows_counts_for_nothing() -> None:
    draw = random.Random(0)
    task = _sentence(draw, 30, 30)
    questions = [_sentence(draw, 12, 12) for _ in range(TEMPLATE_ROWS + 5)]
    texts = [task + question for question in questions]
    index = NgramIndex(texts, range(len(texts)), n=8, overlap=0.5)
    other = task + _sentence(draw, 12, 12)
    assert not len(index.shares([[other]]).row), "the task's own words were taken for the question"
    assert index.shares([[task + questions[3]]]).text.tolist() == [3]
    (left,) = index.without_templates([other])
    assert left == [PARTED] * 30 + other[30:]
    same = NgramIndex(texts, [0] * len(texts), n=8, overlap=0.5)
    assert not len(same.templates), "one row's texts are no template, however many they are"


def test_a_short_text_is_no_match_in_a_long_one() -> None:
    index = NgramIndex([["what", "is", "this"]], [0], n=8, overlap=0.5)
    near, far = "so what is this then", "tell me what is this and why it is there"
    found = index.shares([[near.split()], [far.split()], [["what", "is", "that"]]])
    assert found.row.tolist() == [0]
    assert found.share.tolist() == [3 / 5]


def _words_text(draw: random.Random, count: int) -> str:
    return " ".join(
        "".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 7))) for _ in range(count)
    )


def _jaccard(one: str, other: str) -> float:
    def runs(text: str) -> set[str]:
        return {text[i : i + CHARACTERS] for i in range(len(text) - CHARACTERS + 1)}

    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def _changed(draw: random.Random, text: str, places: int) -> str:
    characters = list(text)
    for place in draw.sample(range(len(characters)), places):
        characters[place] = "z"
    return "".join(characters)


def test_estimates_are_the_jaccard_similarity_within_their_error() -> None:
    """Unbiased with a standard error of sqrt(J (1 - J) / FUNCTIONS): z-scores of 200 pairs."""
    draw, z = random.Random(1), []
    for _ in range(200):
        text = _words_text(draw, 60)
        other = _changed(draw, text, draw.randint(1, 40))
        estimate = (signature(shingles(text)) == signature(shingles(other))).mean()
        exact = _jaccard(text, other)
        z.append((estimate - exact) / np.sqrt(exact * (1 - exact) / FUNCTIONS))
    assert abs(np.mean(z)) < 0.25, "the estimate is biased"
    assert np.std(z) == pytest.approx(1, abs=0.2), "the error is not what is stated"


@pytest.mark.parametrize("jaccard", [0.5, 0.8, 0.95])
def test_no_pair_that_is_similar_enough_is_passed_over(jaccard: float) -> None:
    """Rows without a signature are those whose exact similarity is too small."""
    draw = random.Random(2)
    texts = [_words_text(draw, draw.randint(5, 60)) for _ in range(40)]
    texts += [texts[0] + " " + texts[1], texts[2] * 2, "abcde", "abcd", ""]
    rows = [_changed(draw, text, len(text) // draw.randint(12, 90)) for text in texts * 6]
    rows += [_words_text(draw, 30) for _ in range(100)] + ["", "abcde", texts[1] + texts[5]]
    index = MinhashIndex(texts, jaccard=jaccard)
    found = list(zip(*(each.tolist() for each in index.plausible(rows)), strict=True))
    similar = {
        (i, j)
        for i, row in enumerate(rows)
        for j, text in enumerate(texts)
        if min(len(row), len(text)) >= CHARACTERS and _jaccard(row, text) >= jaccard
    }
    assert similar <= set(found), "a near-duplicate got no signature"
    assert len(similar) > 20, "nothing to find: the test shows nothing"
    assert len(found) < len(rows) * len(texts) / 4, "nearly every pair is looked at"
    for i, row in enumerate(rows):
        among = np.array(sorted(j for other, j in found if other == i), dtype=np.int64)
        best = index.best(row, among)
        exact = [_jaccard(row, texts[j]) if len(row) >= CHARACTERS else 0.0 for j in among]
        if best is not None:
            error = 5 * np.sqrt(0.25 / FUNCTIONS)
            assert best.jaccard == pytest.approx(_jaccard(row, texts[best.text]), abs=error)
            assert best.jaccard >= jaccard
        else:
            assert max(exact, default=0.0) < jaccard + 0.12, "a near-duplicate was not told"


def _row(prompt: str, answer: str) -> Views:
    return views([Message("user", prompt), Message("assistant", answer)])


QUESTION = (
    "Janet has sixteen eggs a day, eats three for breakfast and bakes muffins with four. "
    "She sells the rest at two dollars each. How much does she make every day?"
)
ANSWER = "She sells 16 - 3 - 4 = 9 eggs a day, and makes 9 * 2 = 18 dollars."
TARGETS = [
    _row(QUESTION, ANSWER),
    _row("Who wrote Hamlet?", "William Shakespeare."),
    _row("从前有一座山,山里有一座庙,庙里有一个老和尚在讲故事。", "讲的是什么?"),
    _row("", "only an answer, and no question was ever put to anyone about it"),
]


def _matches(rows: list[Views], **changes: float) -> list[Match | None]:
    settings = {"ngram": 8, "overlap": 0.5, "jaccard": 0.8, **changes}
    index = NearDuplicates(
        TARGETS,
        ngram=int(settings["ngram"]),
        overlap=settings["overlap"],
        jaccard=settings["jaccard"],
    )
    return list(index.matches(rows))


@pytest.mark.parametrize(
    ("row", "target", "kind"),
    [
        (_row(QUESTION.upper(), "forty-two"), 0, "exact"),
        (_row("  who wrote HAMLET", "I do not know."), 1, "exact"),
        (_row("Here is one more. " + QUESTION + " Answer in one word.", "No."), 0, "ngram"),
        (_row("Is this right?", QUESTION + " " + ANSWER), 0, "ngram"),
        (_row(QUESTION.replace("Janet", "Jane"), "x"), 0, "ngram"),
        (_row("Tell me, who wrote Hamlet?", "x"), 1, "ngram"),
        (_row("听我说:从前有一座山,山里有一座庙,庙里有一个老和尚。", "x"), 2, "ngram"),
        (_row("从前有一座山 山里有一座庙 庙里有一个老和尚在讲故事", "x"), 2, "exact"),
        (_row("", "only an answer, and no question was ever put to anyone about it!"), 3, "exact"),
    ],
)
def test_planted_rows_are_found(row: Views, target: int, kind: str) -> None:
    (found,) = _matches([row])
    assert found is not None, "a contaminated row was passed over"
    assert (found.target, found.kind) == (target, kind)
    assert (found.overlap == 1.0) or kind != "exact"


def test_spelling_all_over_a_text_is_found_by_minhash_alone() -> None:
    """A letter in every seventh word: no run of eight words is left."""
    words = QUESTION.lower().split()
    for place in range(3, len(words), 7):
        words[place] = words[place][:-1]
    (found,) = _matches([_row(" ".join(words), "x")], jaccard=0.7)
    assert found is not None, "n-grams were asked alone"
    assert (found.kind, found.target) == ("minhash", 0)


@pytest.mark.parametrize(
    "row",
    [
        _row("", ""),
        _row("", "another answer"),
        _row("Who wrote Faust, and who wrote Hamlet, and in which years did they write?", "x"),
        _row("Ken has nine hens and feeds two of them. How many are left for every day?", "seven"),
        _row("从前有一条河", "讲的是什么呢"),
        _row("hamlet", "William"),
    ],
)
def test_other_rows_are_not(row: Views) -> None:
    assert _matches([row]) == [None]


def test_matches_do_not_depend_on_the_rows_beside() -> None:
    draw = random.Random(4)
    rows = [_row(_changed(draw, QUESTION.lower(), draw.randint(0, 40)), "x") for _ in range(600)]
    rows += [_row(" ".join(_mixed(draw, [QUESTION.split()])), "y") for _ in range(300)]
    together = _matches(rows)
    assert Counter(match.kind for match in together if match).keys() >= {"ngram", "minhash"}
    index = NearDuplicates(TARGETS, ngram=8, overlap=0.5, jaccard=0.8)
    alone = [match for row in rows for match in index.matches([row])]
    assert together == alone, "a row's match depends on its neighbours"
    assert list(index.matches(rows[::-1])) == alone[::-1]


def test_the_best_match_does_not_depend_on_duplicated_targets() -> None:
    index = NearDuplicates([*TARGETS, TARGETS[0]], ngram=8, overlap=0.5, jaccard=0.8)
    rows = [_row(QUESTION, "x"), _row(QUESTION + " Say why.", "x")]
    assert [match.target for match in index.matches(rows) if match] == [0, 0]


def test_no_targets_match_nothing() -> None:
    index = NearDuplicates([Views([], [])], ngram=8, overlap=0.5, jaccard=0.8)
    assert list(index.matches([_row(QUESTION, ANSWER), Views([], [])])) == [None, None]
