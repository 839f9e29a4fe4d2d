"""How much to select: rows, a share of the pool, tokens, or a share of the proponents."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from influence.errors import InputError

_BUDGET = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKmMbB]?)\s*(%|rows|tokens)?\s*")
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_OF_PROPONENTS = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s+of\s+(?:the\s+)?proponents\s*")
_BUDGET_FORMS = (
    "expected a number of rows (5000), a percentage (5%), tokens (2M tokens) or, with method: "
    "in2core, a share of the proponents (50% of proponents)"
)


@dataclass(frozen=True)
class Budget:
    """How much to select; exactly one field is set. `share` is of the scored rows, in (0, 1],
    `proponents` of those with a score above 0."""

    rows: int | None = None
    share: float | None = None
    tokens: int | None = None
    proponents: float | None = None


def parse_budget(text: str | int | float) -> Budget:
    """`5000`, `5%`, `2M tokens`, `50% of proponents`; raises InputError naming selection.budget."""
    if isinstance(text, bool):
        raise InputError(f"selection.budget: {text}; {_BUDGET_FORMS}")
    if isinstance(text, int | float):
        if 0 < text < 1:
            raise InputError(
                f"selection.budget: {text} is neither rows nor a percentage; write {text * 100:g}%"
            )
        if text < 1 or not np.isfinite(text) or text != int(text):
            raise InputError(f"selection.budget: {text}; {_BUDGET_FORMS}")
        return Budget(rows=int(text))
    of_proponents = _OF_PROPONENTS.fullmatch(text)
    if of_proponents is not None:
        return Budget(proponents=_share(of_proponents[1], text))
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise InputError(f"selection.budget: {text!r}; {_BUDGET_FORMS}")
    number, suffix, unit = match.groups()
    value = float(number.replace("_", ""))
    if unit == "%":
        if suffix:
            raise InputError(f"selection.budget: {text!r}; expected a percentage in (0, 100]")
        return Budget(share=_share(number.replace("_", ""), text))
    if unit is None and not suffix and 0 < value < 1:
        return parse_budget(value)
    count = value * _SUFFIX[suffix.lower()]
    if count < 1 or abs(count - round(count)) > 1e-6:
        raise InputError(f"selection.budget: {text!r} is no whole number; {_BUDGET_FORMS}")
    if unit == "tokens":
        return Budget(tokens=round(count))
    return Budget(rows=round(count))


def _share(percent: str, text: str) -> float:
    if not 0 < float(percent) <= 100:
        raise InputError(f"selection.budget: {text!r}; expected a percentage in (0, 100]")
    return float(percent) / 100


@dataclass(frozen=True)
class RowLimit:
    """The most rows that a budget can hold.

    exceeds_pool: it is larger than the pool. proponents: rows that may be taken at all, None for
    every scored one; short: the budget would hold more rows than these are.
    """

    rows: int
    exceeds_pool: bool
    proponents: int | None = None
    short: bool = False


def limit_to_proponents(
    budget: Budget,
    scored: Bool[np.ndarray, " n"],
    proponents: Bool[np.ndarray, " n"],
    n_tokens: Int[np.ndarray, " n"] | None,
) -> RowLimit:
    """`row_limit`, where only some of the scored rows may be taken.

    Raises InputError if there are none.
    """
    count = int(np.count_nonzero(proponents))
    if not count:
        raise InputError(
            f"selection: not one of the {int(np.count_nonzero(scored))} scored candidates is a "
            "proponent (a score above 0): training on any of them is expected to raise the "
            "target's loss"
        )
    if budget.proponents is not None:
        return RowLimit(max(1, round(budget.proponents * count)), False, count)
    rows, exceeds = row_limit(budget, scored, n_tokens)
    if budget.tokens is not None:
        rows, short = row_limit(budget, proponents, n_tokens)
    else:
        short = rows > count
    return RowLimit(min(rows, count), exceeds, count, short)


def row_limit(
    budget: Budget, scored: Bool[np.ndarray, " n"], n_tokens: Int[np.ndarray, " n"] | None
) -> tuple[int, bool]:
    """The most rows the budget can hold, and whether it is larger than the pool."""
    n = int(np.count_nonzero(scored))
    if budget.proponents is not None:
        raise InputError(
            "selection.budget: a share of the proponents needs scores with a sign: method: in2core"
        )
    if budget.tokens is not None:
        if n_tokens is None or len(n_tokens) != len(scored):
            raise InputError("selection.budget: a token budget needs the tokens of every row")
        tokens = np.asarray(n_tokens)[scored]
        shortest = max(1, int(tokens.min()))
        return min(n, budget.tokens // shortest), bool(budget.tokens > tokens.sum())
    if budget.share is not None:
        return max(1, round(budget.share * n)), False
    if budget.rows is None or budget.rows < 1:
        raise InputError(f"selection.budget: {budget}; {_BUDGET_FORMS}")
    return min(budget.rows, n), budget.rows > n
