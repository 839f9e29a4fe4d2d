"""Quotas per source: a least and a most share of the budget's rows for the sources of a pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Bool, Int

from influence.errors import InputError
from influence.text_columns import Labels


@dataclass(frozen=True)
class Quota:
    """Shares of the budget's rows, in [0, 1], for all sources of one pattern together."""

    min: float = 0.0
    max: float = 1.0


@dataclass
class QuotaState:
    """Quotas in whole rows, and what is left of them while rows are taken.

    `group` is the quota of every row (index into `names`; the last one, "", has no quota) and
    `barred` the rows that may no longer be taken. A group is barred for good once it is full, or
    once every place left in the budget is needed for other groups' minima.
    """

    names: tuple[str, ...]
    group: Int[np.ndarray, " n"]
    barred: Bool[np.ndarray, " n"]
    owed: Int[np.ndarray, " g"]
    room: Int[np.ndarray, " g"]
    places: int

    def take(self, row: int) -> None:
        """Count a taken row and bar the groups that may take no more."""
        group = self.group[row]
        self.places -= 1
        self.room[group] -= 1
        self.owed[group] = max(0, self.owed[group] - 1)
        if self.room[group] == 0:
            self.barred[self.group == group] = True
        self._reserve(group)

    def _reserve(self, group: int | None = None) -> None:
        """With no place to spare, bar the groups that are owed nothing."""
        if self.places > self.owed.sum():
            return
        for closed in np.flatnonzero(self.owed == 0):
            if self.room[closed] > 0:
                self.room[closed] = 0
                self.barred[self.group == closed] = True


def open_quotas(
    per_source: Mapping[str, Quota],
    sources: Sequence[str],
    scored: Bool[np.ndarray, " n"],
    k: int,
) -> QuotaState:
    """The quotas for a budget of k rows.

    Keys are fnmatch patterns on the source (case counts); a source belongs to the first pattern
    that matches it, and a quota binds the sources of its pattern together. Shares become whole rows
    by rounding a minimum down and a maximum up, so that shares that can be met stay so.
    Taking the best allowed row each time is optimal for a sum of scores: sets of k rows within
    such bounds are the bases of a matroid.
    Raises InputError naming the key: shares outside [0, 1], a minimum above its maximum, minima
    that sum to more than 1, a pattern that matches no source, a minimum of more rows than its
    sources have, maxima that leave too few rows for the budget.
    """
    _check_shares(per_source)
    names = (*per_source, "")
    coded = sources if isinstance(sources, Labels) else Labels(sources)
    used = np.unique(coded.codes)
    labels = sorted(str(coded.values[code]) for code in used)
    place = {label: index for index, label in enumerate(labels)}
    to_label = np.asarray([place.get(str(value), -1) for value in coded.values], dtype=np.int64)
    codes = to_label[coded.codes]
    matches = [
        next((g for g, key in enumerate(per_source) if fnmatchcase(label, key)), len(per_source))
        for label in labels
    ]
    group = np.asarray(matches, dtype=np.int64)[codes]
    rows = np.bincount(group[scored], minlength=len(names))
    owed, room = np.zeros(len(names), dtype=np.int64), rows.copy()
    for g, (key, quota) in enumerate(per_source.items()):
        if g not in matches:
            shown = ", ".join(labels[:8])
            raise InputError(
                f"selection.per_source.{key}: matches no source (or only sources of an earlier "
                f"pattern); expected a pattern for one of: {shown}"
            )
        # The small term keeps 0.29 * 100 from becoming 28 rows.
        owed[g] = int(np.floor(quota.min * k + 1e-9))
        room[g] = min(int(rows[g]), int(np.ceil(quota.max * k - 1e-9)))
        if owed[g] > rows[g]:
            raise InputError(
                f"selection.per_source.{key}.min: {quota.min:g} of {k} rows are {owed[g]}, but "
                f"these sources have {rows[g]} rows with scores; expected {rows[g] / k:.4g} at most"
            )
    if room.sum() < k:
        raise InputError(
            f"selection.per_source: the maxima of {', '.join(per_source)} leave room for "
            f"{room.sum()} of the {k} rows of the budget; raise a maximum or lower the budget"
        )
    barred = np.isin(group, np.flatnonzero(room == 0))
    state = QuotaState(names, group, barred, owed, room, k)
    state._reserve()
    return state


def _check_shares(per_source: Mapping[str, Quota]) -> None:
    for key, quota in per_source.items():
        for name, share in (("min", quota.min), ("max", quota.max)):
            if not 0 <= share <= 1:
                raise InputError(
                    f"selection.per_source.{key}.{name}: {share}; expected a share from 0 to 1"
                )
        if quota.min > quota.max:
            raise InputError(
                f"selection.per_source.{key}: min {quota.min:g} is above max {quota.max:g}"
            )
    total = sum(quota.min for quota in per_source.values())
    if total > 1 + 1e-9:
        raise InputError(
            f"selection.per_source: the minima of {', '.join(per_source)} sum to {total:g}; "
            "expected 1 at most"
        )
