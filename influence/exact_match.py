"""Whether a generated answer is the reference's: final answers, compared after normalising."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

MARKER = "####"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def same_answer(generated: str, reference: str) -> bool:
    """Whether the final answers are the same.

    Where the reference marks its answer as gsm8k does (`#### 72`), and it is a number, that number
    counts: of the generated text the one behind the marker, else the last one. Otherwise the whole
    texts are compared, with single spaces for white space.
    """
    if MARKER in reference:
        expected = last_number(reference.rsplit(MARKER, 1)[1])
        if expected is not None:
            return final_number(generated) == expected
    return plain_text(generated) == plain_text(reference)


def final_number(text: str) -> Decimal | None:
    """The first number behind the first `####`; without one behind it, the last number."""
    _, marker, behind = text.partition(MARKER)
    found = _NUMBER.search(behind) if marker else None
    return last_number(text) if found is None else _value(found[0])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if it has none. Commas and dollar signs do not count."""
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def plain_text(text: str) -> str:
    """Without white space at the ends, and with single spaces within."""
    return " ".join(text.split())


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
