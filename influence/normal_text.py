"""Texts as they are compared: words without case, white space and punctuation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from influence.row_formats import Message

# Scripts that are written without spaces: every character of theirs is a word of its own, and
# n-grams of words are n-grams of characters there.
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3134F),
)
# Beside the mathematical symbols: 3 / 4 is not 3 + 4.
_OPERATORS = "/%"
# Brackets that stand by themselves are what a text is about, as in "not ( True and False )"; those
# around or behind a word are punctuation. They pass as characters that no text has a use for.
_ALONE = re.compile(r"(?<!\S)[()\[\]{}]+(?!\S)")
_BRACKETS = {ord(bracket): 0xF0000 + i for i, bracket in enumerate("()[]{}")}
_KEPT = frozenset(_BRACKETS.values())


class _Spaced(dict[int, str]):
    """What `str.translate` puts for a character, found when it is first met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)
        made = " "
        if kind[0] in "LMN":
            apart = any(first <= code <= last for first, last in _WITHOUT_SPACES)
            made = f" {character} " if apart else character
        elif kind == "Sm" or character in _OPERATORS or code in _KEPT:
            made = f" {character} "
        self[code] = made
        return made


_SPACED = _Spaced()


@dataclass(frozen=True, slots=True)
class Views:
    """A row's words: those of the user's turns, and those of all turns but the system's."""

    prompt: list[str]
    whole: list[str]


def words(text: str) -> list[str]:
    """The words of a text: NFKC, case folded, letters and digits.

    Operators such as + are words, and so are brackets between spaces. Everything else parts words.
    Of scripts without spaces every character is a word. The words of a text without any are its
    characters.
    """
    if not text.isascii():
        # Folding may undo a composition (of capitals with accents), so it is composed once more.
        folded = unicodedata.normalize("NFKC", text).casefold()
        text = unicodedata.normalize("NFKC", folded)
    if _ALONE.search(text):
        text = _ALONE.sub(lambda match: match[0].translate(_BRACKETS), text)
    found = text.lower().translate(_SPACED).split()
    return found or [character for character in text if not character.isspace()]


def views(messages: Sequence[Message]) -> Views:
    """The words of a row's turns.

    System turns are left out: the same one often stands in all rows of a file, and says nothing.
    """
    prompt: list[str] = []
    whole: list[str] = []
    for message in messages:
        if message.role == "system":
            continue
        found = words(message.content)
        whole += found
        if message.role == "user":
            prompt += found
    return Views(prompt, whole)
