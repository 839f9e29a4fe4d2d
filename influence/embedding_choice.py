"""`embedding.kind: auto`: a pilot embeds some rows in every way, and the cheapest way is taken.

Dear embeddings are paid for on every candidate, poor ones by the exact gradients that they leave to
be taken. A pilot's landmarks, which the run takes exact gradients of anyway, tell how many those
would be. The choice is kept in the cache beside the shards: a run that goes on, a plan, and another
run that asks the same do not choose again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from influence import history, storage
from influence.config import Config
from influence.embedding_kind import (
    EmbeddingKind,
    default_kinds,
    distinct,
    embedding_fingerprint,
    kind_of,
    named,
    variants,
)
from influence.embedding_record import CHOICES, EmbeddingChoice, EmbeddingOption
from influence.embedding_reduce import Judged
from influence.exact_price import embedding_flops, gradient_flops
from influence.exact_work import Chosen
from influence.job import Job, run_units, timed
from influence.load import Load
from influence.model_shape import ModelShape
from influence.pool_units import embedding_units
from influence.records import to_json
from influence.report_format import amount, decimal
from influence.units import ExactUnits, Unit, sparse_units

#: The pilot's record among the stages of a manifest, and of a bill.
PILOT = "pilot"


def kinds_to_choose(config: Config, blocks: int) -> list[EmbeddingKind]:
    """What `embedding.choices` names, or the default ones in a model of so many blocks."""
    if config.embedding.choices is None:
        return default_kinds(blocks)
    return distinct([kind_of(section) for section in config.embedding.choices])


def kinds_to_compare(config: Config, shape: ModelShape) -> list[EmbeddingKind]:
    """Those of `evaluation.fidelity`: the config's own first, then those that it names, or else
    those to choose from and, where nobody named any, the own one with one thing changed."""
    section = config.evaluation.fidelity
    assert section is not None
    embedding = config.embedding
    own = EmbeddingKind(*(getattr(embedding, name) for name in EmbeddingKind._fields))
    first = [] if own.kind == "auto" else [own]  # not chosen yet
    if section.embeddings is not None:
        return distinct([*first, *map(kind_of, section.embeddings)])
    changed = variants(own, shape.hidden) if embedding.choices is None else []
    return distinct([*first, *kinds_to_choose(config, shape.blocks), *changed])


def choose_embedding(
    job: Job, reduce: Any, exact: ExactUnits, chosen: Chosen
) -> tuple[list[Unit], list[Unit]]:
    """Decide on the job's embedding, from here on.

    Returns what is still to do of `exact`, and the units of all candidates' embeddings.

    chosen: the landmarks, of which `exact` holds the exact scores.

    Raises:
        InputError: the model has fewer blocks than an embedding asks for, or too few landmarks.
        ShardsFailedError: some of the pilot's shards failed for good.
    """
    shape = job.model_shape
    digest = job.asked or history.decision_digest(job)
    found, waiting = recorded_choice(job.config.cache_url, digest), exact.all
    if found is None:
        kinds = kinds_to_choose(job.config, shape.blocks)
        pilots = pilot_units(job, kinds, chosen, reduce.choose_pilot())
        run_units(job, [*exact.all, *(unit for units in pilots for unit in units)])
        _apart(job)
        with timed(job, PILOT, quiet=True):
            judged = reduce.judge_embeddings(exact, pilots)
            found = priced_choice(
                job.config,
                shape,
                reduce.pool_load(),
                reduce.column_count(),
                [*zip(kinds, judged, strict=True)],
            )
        found, waiting = _keep(job.config.cache_url, digest, found), []
    take_embedding(job, found)
    job.log.manifest.embedding = found
    job.progress.note("\n".join(choice_lines(found)))
    kind = EmbeddingKind(*found.settings)
    return waiting, [replace(unit, embedding=kind) for unit in embedding_units(job)]


def pilot_units(
    job: Job, kinds: Sequence[EmbeddingKind], chosen: Chosen, others: Chosen
) -> list[list[Unit]]:
    """For every kind the units of the landmarks and of other rows, in the order of the files."""
    rows: dict[str, set[int]] = {}
    files = {file.url: file for part in (chosen, others) for file, _rows in part}
    for part in (chosen, others):
        for file, members in part:
            rows.setdefault(file.url, set()).update(members)
    whole, per_shard = job.fingerprints["embedding"], job.config.replicas.rows_per_shard
    return [
        [
            replace(unit, embedding=kind)
            for url in sorted(rows)
            for unit in sparse_units(
                "embedding",
                embedding_fingerprint(whole, job.config, kind).hex,
                files[url],
                sorted(rows[url]),
                per_shard,
            )
        ]
        for kind in kinds
    ]


def take_embedding(job: Job, choice: EmbeddingChoice) -> None:
    """From here on the job's embedding is the chosen one, as if the config had named it."""
    kind = EmbeddingKind(*choice.settings)
    found = embedding_fingerprint(job.fingerprints["embedding"], job.config, kind)
    job.fingerprints = {**job.fingerprints, "embedding": found}
    job.config = named(job.config, kind)


def recorded_choice(cache: str, digest: str) -> EmbeddingChoice | None:
    """What a run decided that asked the same, if one did."""
    url = storage.join(cache, CHOICES, f"{digest}.json")
    if storage.head(url) is None:
        return None
    try:
        return EmbeddingChoice.model_validate_json(storage.read_bytes(url))
    except ValidationError:
        return None  # of another version, or cut short


def _keep(cache: str, digest: str, found: EmbeddingChoice) -> EmbeddingChoice:
    """Keep a choice; where another run was first, that one's stands."""
    url = storage.join(cache, CHOICES, f"{digest}.json")
    if storage.put_new(url, to_json(found)):
        return found
    first = recorded_choice(cache, digest)
    if first is None:
        storage.put(url, to_json(found))
    return first or found


def _apart(job: Job) -> None:
    """The pilot's embeddings are of several kinds: they have a record of their own."""
    stages, computed = job.log.manifest.stages, job.log.computed
    stages[PILOT] = stages.pop("embedding")
    computed[PILOT] = computed.pop("embedding", set())


def priced_choice(
    config: Config,
    shape: ModelShape,
    load: Load,
    columns: int,
    judged: Sequence[tuple[EmbeddingKind, Judged]],
) -> EmbeddingChoice:
    """Put prices to what a pilot found; `load` is that of all candidates that can be scored."""
    n, exact = load.rows, gradient_flops(config, shape, load, columns) / max(1, load.rows)
    options = []
    for kind, found in judged:
        flops = embedding_flops(config, shape, load, kind) / max(1, n)
        look_at = round(found.share * max(0, n - found.rows[0]))
        options.append(
            EmbeddingOption(
                label=kind.label,
                settings=(kind.kind, kind.blocks, kind.tangents, kind.tangent, kind.dim),
                width=found.width,
                flops=flops,
                spearman=found.spearman,
                recall=found.recall,
                look_at=look_at,
                cost=n * flops + look_at * exact,
            )
        )
    best = min(options, key=lambda option: option.cost)
    first = judged[0][1]
    why = _why(best, options, config.landmarks.count - first.rows[0])
    if best.cost >= n * exact:
        why += f"; exact scores of all (`method: exact`) cost no more: {amount(n * exact)} FLOP"
    return EmbeddingChoice(
        chosen=best.label,
        settings=best.settings,
        why=why,
        options=options,
        candidates=n,
        landmarks=first.rows[0],
        pilot=first.rows[1],
        recall=config.landmarks.recall,
        share=first.selected,
        gradient_flops=exact,
        count=config.landmarks.count,
    )


def _why(best: EmbeddingOption, options: Sequence[EmbeddingOption], room: int) -> str:
    """The reason in words."""
    fewest = min(option.look_at for option in options)
    cheapest = min(option.flops for option in options)
    if best.look_at == fewest and best.flops == cheapest:
        why = "it is the cheapest, and leaves the fewest rows to look at"
    elif best.look_at == fewest:
        why = "it leaves the fewest rows to look at, which saves more than it costs"
    elif best.flops == cheapest:
        why = "it is the cheapest, and dearer ones save fewer gradients than they cost"
    else:
        why = "embeddings and exact gradients together cost the least"
    if best.look_at > room:
        why += f"; landmarks.count has room for {max(0, room):,} of its rows"
    return why


def choice_lines(found: EmbeddingChoice) -> list[str]:
    """The choice for the terminal."""
    lines = [
        f"embedding: {found.chosen}; {found.why} (auto: {found.landmarks:,} landmarks and "
        f"{found.pilot:,} random candidates, for a recall of {found.recall:g})"
    ]
    for option in found.options:
        lines.append(
            f"  {option.label}: {amount(option.flops)} FLOP a candidate, certified Spearman "
            f"{decimal(option.spearman)}, {option.look_at:,} rows to look at, "
            f"{amount(option.cost)} FLOP in all"
        )
    return lines
