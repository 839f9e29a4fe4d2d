"""Texts are compared by words: what does not count, and what does."""

from __future__ import annotations

import unicodedata

import pytest

from influence.normal_text import views, words
from influence.row_formats import Message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "what  IS\nit"),
        ("“Take it,” she said…", "take it she said"),
        ("well-known (and so on)", "Well known: and, so on!"),
        ("caf\u00e9 CAF\u00c9", "cafe\u0301 cafe\u0301"),  # composed or not
        ("\uff21\uff11", "a1"),  # wide forms
        ("\u0130stanbul", unicodedata.normalize("NFD", "\u0130stanbul")),
        ("Stra\u00dfe", "STRASSE"),
        ("数学 问题。", "数学问题"),
        ("**bold** `code`", "bold code"),
        ("(A) this [one]", "A) this one"),
    ],
)
def test_case_spaces_and_punctuation_do_not_count(one: str, other: str) -> None:
    assert words(one) == words(other), "texts that differ in form alone are told apart"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 + 4", "3 / 4"),
        ("3+4", "34"),
        ("x < y", "x > y"),
        ("a cat", "acat"),
        ("1.5", "15"),
        ("数学", "学数"),
        ("( [ {", "( ( {"),
        ("close them: ( [ {", "close them: ( ( {"),
        ("not ( True and False )", "( not True ) and False"),
    ],
)
def test_what_means_something_counts(one: str, other: str) -> None:
    assert words(one) != words(other), "different texts are taken for the same"


def test_scripts_without_spaces_are_split_into_characters() -> None:
    assert words("今天天气 very nice") == ["今", "天", "天", "气", "very", "nice"]
    assert len(words("สวัสดี")) == 6, "Thai is written without spaces"
    assert words("안녕 세계") == ["안녕", "세계"], "Korean is written with spaces"
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"], "vowel signs do not end a word"


def test_a_text_without_a_word_is_its_characters() -> None:
    assert words("?! ...") == ["?", "!", ".", ".", "."]
    assert len(words("[ ( )")) == 3
    assert words(" \n\t") == []


def test_views_leave_the_system_out_and_join_the_turns() -> None:
    turns = [("system", "Be kind."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    found = views([Message(*turn) for turn in turns])
    assert found.prompt == ["one", "three"]
    assert found.whole == ["one", "two", "three"]
