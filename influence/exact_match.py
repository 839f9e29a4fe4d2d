"""Whether a generated answer is the reference's: final answers, compared after normalising."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

#: Goes up when what is called the same answer changes: answers of an older rule are not reused.
RULE = 2
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_BEHIND = re.compile(r"####(?P<text>.*)")
_BOXED = re.compile(r"\\boxed\s*\{(?P<text>[^{}]*)\}")
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)(?=(?P<text>.*))", re.IGNORECASE)  # may repeat
_AROUND = " \t\"'`*$().,:;!?"


def same_answer(generated: str, reference: str) -> bool:
    r"""Whether the final answers are the same.

    A text may mark its answer: `#### 72` (gsm8k), `\boxed{72}`, or `the answer is 72.` and
    `Answer: 72` to the end of the line. Where what the reference marks begins with a number, that
    is compared with the first number that the generated text marks, or else with its last one. Any
    other answer that the reference marks, or its whole text where it marks none, has to be what the
    generated text marks, or all of it. White space, case, and quotes, brackets and punctuation
    around an answer do not count; within it they do.
    """
    marked = _marked(reference)
    number = None if marked is None else _NUMBER.match(marked.lstrip(_AROUND.replace("$", "")))
    if number is not None:
        return final_number(generated) == _value(number[0])
    wanted = plain_text(reference if marked is None else marked)
    given = _marked(generated)
    return wanted in {plain_text(generated), None if given is None else plain_text(given)}


def final_number(text: str) -> Decimal | None:
    """The first number of the answer that the text marks; without one, the text's last number."""
    marked = _marked(text)
    found = None if marked is None else _NUMBER.search(marked)
    return last_number(text) if found is None else _value(found[0])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if it has none. Commas and dollar signs do not count."""
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def plain_text(text: str) -> str:
    """In lower case, single spaces within, without white space and punctuation at the ends."""
    return " ".join(text.split()).strip(_AROUND).casefold()


def _marked(text: str) -> str | None:
    """The answer that a text marks: behind the first `####`, else in the last box, else after the
    last `answer is`. What follows the first is another question that a model asked itself."""
    if found := _BEHIND.search(text):
        return found["text"]
    for pattern in (_BOXED, _PHRASE):
        if marks := list(pattern.finditer(text)):
            return marks[-1]["text"]
    return None


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
