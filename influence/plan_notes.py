"""What a plan says beside its numbers: what is reused and why not, what the run decides itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from influence.config import Config
from influence.job import Job
from influence.plan_schemas import Measured
from influence.planned_work import Work
from influence.speeds import kind_of

_DIGESTS = ("template", "model", "adapter", "optimizer_state", "pool", "texts")
# Of values that a fingerprint covers: what says nothing to a reader, or is told otherwise.
_UNSAID = ("format_version", "target_vectors")


def notes_of(job: Job, work: Work, history: Sequence[Measured]) -> list[str]:
    """Everything but what `plan_work` itself noted, which comes first."""
    notes = list(work.notes)
    notes += _anew(job, work, history)
    gradients = next((s for s in work.stages.values() if s.most is not None and s.shards), None)
    if gradients is not None and work.chosen is not None:
        first = sum(len(rows) for _file, rows in work.chosen)
        landmarks = job.config.landmarks
        notes.append(
            f"certified: from {first:,} landmarks, rounds go on until the recall is "
            f"{landmarks.recall:g}, to landmarks.count = {landmarks.count:,} at most; the lines "
            "'at most' take further rows of mean length"
        )
    return notes


def unlike_replicas(config: Config, measured: Measured) -> str:
    """Why speeds that were asked for say nothing of this config; nothing if they do."""
    mine, theirs = kind_of(config).model_dump(), measured.replica.model_dump()
    differing = [
        f"{name} {theirs[name]}, here {mine[name]}" for name in mine if mine[name] != theirs[name]
    ]
    if not differing:
        return ""
    return f"speeds of {measured.source} are not used: other replicas ({'; '.join(differing)})"


def _anew(job: Job, work: Work, history: Sequence[Measured]) -> list[str]:
    """Why shards that earlier runs on this cache made do not fit any more."""
    causes: dict[str, list[str]] = {}
    runs: dict[str, str] = {}
    for name, stage in work.stages.items():
        if not stage.missing or stage.cached or stage.fingerprint is None:
            continue
        made = [(run, run.stages[name]) for run in history if name in run.stages]
        if any(found.fingerprint == stage.fingerprint.hex for _run, found in made):
            continue  # other rows, not other settings
        differing = [
            (len(changed), run.source, ", ".join(changed))
            for run, found in made
            if (changed := _differences(found.values, stage.fingerprint.values))
        ]
        if differing:
            _number, source, cause = min(differing)
            causes.setdefault(cause, []).append(name)
            runs.setdefault(cause, source)
    return [
        f"all anew: {', '.join(names)}; those of {runs[cause]} do not fit: {cause}"
        for cause, names in causes.items()
    ]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: was x, now y` of every value that differs; digests are not spelt out, and neither are
    settings that only the one or the other has (of another kind of embedding, say)."""
    found = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if name in _UNSAID or old == new:
            continue
        digest = name in _DIGESTS
        found.append(f"another {name}" if digest else f"{name} was {old}, is now {new}")
    return sorted(found)
