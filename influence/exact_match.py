"""Whether a generated answer is the reference's: final answers, compared after normalising."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from functools import partial

#: Goes up when what is called the same answer changes: answers of an older rule are not reused.
RULE = 4
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_BEHIND = re.compile(r"####(?P<text>.*)")
_BOX = re.compile(r"\\boxed\s*\{")
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)(?=(?P<text>.*))", re.IGNORECASE)  # may repeat
_AROUND = " \t\"'`*$().,:;!?"
#: The same of an answer that is nothing else but brackets.
_AROUND_BRACKETS = " \t\"'`*$.,:;!?"
_MINUS = "\u2212"  # as it is typeset
#: Behind a number, what makes it a part of something else: 1/2, 3:45, 10^6, 2x + 7, 3 - x.
_GOES_ON = re.compile(r"[A-Za-z]|.*(?:[\d/^=+*\\{}]|(?:^|\s)-)", re.DOTALL)
_JOINED = re.compile(r"\s*[/:^]\s*\d")


def same_answer(generated: str, reference: str) -> bool:
    r"""Whether the final answers are the same.

    A text may mark its answer: `#### 72` (gsm8k), `\boxed{72}`, or `the answer is 72.` and
    `Answer: 72` to the end of the line. Where what the reference marks is a number, with words
    behind it or none (`72 apples`, but no `1/2`, `3:45` or `2x + 7`), that is compared with the
    first number that the generated text marks, or else with its last one. Any other answer that the
    reference marks, or its whole text where it marks none, has to be what the generated text marks,
    or all of it. White space, case, and quotes, brackets and punctuation around an answer do not
    count; within it they do, and where there is nothing else.
    """
    generated, reference = (text.replace(_MINUS, "-") for text in (generated, reference))
    marked = _marked(reference)
    number = None if marked is None else _plain_number(marked)
    if number is not None:
        return final_number(generated) == number
    wanted = plain_text(reference if marked is None else marked)
    given = _marked(generated)
    return wanted in {plain_text(generated), None if given is None else plain_text(given)}


def final_number(text: str) -> Decimal | None:
    """The first number of the answer that the text marks, None if it is a part of something else
    (1/2, 3:45); where none is marked, the text's last number."""
    marked = _marked(text)
    found = None if marked is None else _NUMBER.search(marked)
    if marked is None or found is None:
        return last_number(text)
    return None if _JOINED.match(marked, found.end()) else _value(found[0])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if it has none. Commas and dollar signs do not count."""
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def plain_text(text: str) -> str:
    """In lower case, single spaces within, without white space and punctuation at the ends; of a
    text of brackets alone these stay, and of other punctuation all of it."""
    spaced = " ".join(text.split()).casefold()
    return spaced.strip(_AROUND) or spaced.strip(_AROUND_BRACKETS) or spaced


def _marked(text: str) -> str | None:
    """The answer that a text marks: behind the first `####`, else in the last box, else after the
    last `answer is`. What follows the first is another question that a model asked itself."""
    if found := _BEHIND.search(text):
        return found["text"]
    if boxes := [box for box in map(partial(_box, text), _BOX.finditer(text)) if box is not None]:
        return boxes[-1]
    phrases = list(_PHRASE.finditer(text))
    return phrases[-1]["text"] if phrases else None


def _box(text: str, begin: re.Match[str]) -> str | None:
    """What is in a box, braces in it among it; None for one without an end."""
    depth = 1
    for place in range(begin.end(), len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[begin.end() : place]
    return None


def _plain_number(marked: str) -> Decimal | None:
    """The number that an answer is, with words behind it or none; else None."""
    found = _NUMBER.match(marked := marked.lstrip(_AROUND.replace("$", "")))
    if found is None or _GOES_ON.match(marked[found.end() :].replace("**", "").rstrip(_AROUND)):
        return None
    return _value(found[0])


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
