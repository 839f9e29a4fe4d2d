"""Method Influence Distillation (arXiv 2505.19051): few gradients, and a regression to the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from influence.certified import rounds_at_most
from influence.curvature_stages import second_order
from influence.embedding_choice import choose_embedding
from influence.embedding_plan import plan_embedding
from influence.exact_price import certified_line
from influence.exact_work import exact_units, further_units
from influence.job import Job, run_units, timed
from influence.methods.kind import Method
from influence.pool_units import embedding_units
from influence.result_bytes import selected_rows
from influence.rounds_work import most_work
from influence.score_map import map_scores
from influence.units import ExactUnits, Unit

if TYPE_CHECKING:
    from influence.config import Config
    from influence.planned_work import Planner


def run(job: Job, reduce: Any) -> None:
    """Exact gradients for landmarks and targets, embeddings for all, a regression between them."""
    if note := count_note(job.config, job.log.manifest.counts):
        job.progress.note(note)
    chosen = job.chosen if job.chosen is not None else reduce.choose_landmarks()
    exact = exact_units(job, reduce, chosen)
    if job.config.embedding.kind == "auto":
        waiting, embedding = choose_embedding(job, reduce, exact, chosen)
    else:
        waiting, embedding = exact.all, embedding_units(job)
    run_units(job, [*waiting, *embedding])
    if job.config.landmarks.choose == "certified":
        _rounds(job, reduce, embedding, exact)
        return
    if job.config.weights.order == 2:
        second_order(job, reduce, exact)
    with timed(job, "regression"):
        predictor = reduce.fit_landmarks(embedding, exact)
    scores = map_scores(job, embedding, predictor)
    with timed(job, "scores", quiet=True):
        reduce.take_predicted(scores)


def count_note(config: Config, counts: Mapping[str, Any]) -> str | None:
    """What to say where `landmarks.count` cannot certify the recall that is asked for.

    counts: of the catalogue. The recall is the part of the selection with exact scores.
    """
    landmarks, rows = config.landmarks, selected_rows(config.selection.budget, counts)
    if landmarks.choose != "certified" or landmarks.count >= landmarks.recall * rows:
        return None
    return (
        f"landmarks.count: {landmarks.count:,} exact gradients at most, and {rows:,} rows are to "
        f"be selected: no recall above {landmarks.count / rows:.0%} can be certified, and "
        f"{landmarks.recall:g} is asked for; several times as many as are to be selected do"
    )


def _rounds(job: Job, reduce: Any, embedding: list[Unit], exact: ExactUnits) -> None:
    """More exact gradients, where the regression says that they decide (`influence.certified`)."""
    while True:
        with timed(job, "regression", quiet=True):
            predictor = reduce.fit_round(embedding, exact)
        scores = map_scores(job, embedding, predictor)
        with timed(job, "regression", quiet=True):
            step = reduce.next_round(scores)
        job.progress.note(step.text)
        if not step.rows:
            _say_price(job, reduce, step.exact)
            return
        exact = further_units(job, reduce, step.rows)
        run_units(job, exact.candidates)


def _say_price(job: Job, reduce: Any, exact: int) -> None:
    """Whether the rounds cost less than exact scores of all candidates."""
    shape = job.model_shape
    load, columns = reduce.pool_load(), reduce.column_count()
    if line := certified_line(job.config, shape, load, columns, exact):
        job.progress.note(line)
        record = job.log.manifest.stages["regression"]
        record.notes = [line]


def plan(planner: Planner) -> None:
    """Landmarks and embeddings; of certified rounds the least and the most, or what was decided."""
    job, config, missing = planner.job, planner.job.config, planner.missing
    if note := count_note(config, planner.counts):
        planner.work.notes.append(note)
    chosen = planner.work.chosen = missing.reduce.choose_landmarks()
    if config.embedding.kind == "auto":
        pilot, notes = plan_embedding(missing, chosen)
        planner.work.notes += notes
        if pilot is not None:
            planner.add(pilot)
        job = planner.job
    landmarks = sum(len(rows) for _file, rows in chosen)
    gradients = planner.gradients(chosen)
    units = embedding_units(job)
    embedding = missing.stage("embedding", units)
    certified = config.landmarks.choose == "certified"
    maps, most, centres = 1, None, landmarks
    if certified and planner.decided is not None:
        maps, gradients = planner.decided.maps, planner.as_decided(gradients, planner.decided)
        centres = (landmarks + planner.decided.rows) // 2  # of all rounds, in the mean
        landmarks = planner.decided.rows
    elif certified:
        limit = max(landmarks, min(config.landmarks.count, planner.counts["scored"]))
        rounds = rounds_at_most(landmarks, limit)
        of_targets = [target["columns"] for target in planner.counts["targets"].values()]
        extra = limit - landmarks
        all_rounds = most_work(missing, gradients, chosen, of_targets, extra, rounds)
        planner.note_others(gradients)
        gradients, most = replace(gradients, most=all_rounds), (limit, rounds + 1)
    planner.add(gradients)
    planner.add(embedding)
    planner.second_order(gradients, chosen)
    planner.fit(embedding, gradients, landmarks, maps, most)
    planner.scores(embedding, units, missing.width, centres, maps, most, variance=certified)
    planner.selection(landmarks)


METHOD = Method(
    title="Influence Distillation",
    run=run,
    plan=plan,
    needs_gradients=True,
    embeds=True,
    draws_landmarks=True,
    steps=True,
    solves_weights=True,
)
