"""What a run found of its targets among the candidates: RUN/contamination.json."""

from __future__ import annotations

from pydantic import BaseModel


class Found(BaseModel):
    """Candidates that match, and how many of them are selected (None: not selected yet)."""

    rows: int
    selected: int | None = None


class MatchedRow(BaseModel):
    """One candidate beside the target row that it matches; rank from 1 among the selected."""

    id: str
    source: str | None
    rank: int | None
    kind: str
    overlap: float
    target: str
    text: str
    target_text: str


class Contamination(BaseModel):
    """Candidates that are target rows, or nearly, of those that could be scored otherwise.

    Attributes:
        action: what became of them: flag, drop or keep.
        kinds: by kind of match: exact, ngram, minhash.
        targets: by target, or further file, with a match.
        examples: the worst ones.
    """

    action: str
    all: Found
    kinds: dict[str, Found]
    targets: dict[str, Found]
    examples: list[MatchedRow] = []
